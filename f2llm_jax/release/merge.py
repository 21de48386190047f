"""Several checkpoints of one architecture as one model, averaged block by block.

Sums are made in float64 and rounded to float32 once, so the average of equal weights is those weights to the bit, and any
other is the float32 number nearest to the true one.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from f2llm_jax.errors import UserError
from f2llm_jax.weights.hf_mapping import Entry
from f2llm_jax.weights.models import ModelSource
from f2llm_jax.weights.parameters import Parameters, Shape, blocks, parameter_shapes

METHODS = ("linear", "slerp")
NEARLY_PARALLEL = 0.9995  # cosine above which slerp is linear, as in mergekit's `slerp`


def merge(sources: Sequence[ModelSource], weights: Sequence[float] | None = None, method: str = "linear") -> ModelSource:
    """A model whose every tensor is the average of the others'.

    Args:
      sources: two or more; the first gives tokenizer and name.
      weights: how much each counts, in any unit; equal if None.
      method: "linear", or "slerp" of exactly two: along the arc between the two tensors, each taken as one long vector.

    Raises:
      UserError: they do not belong together, or weights or method do not fit them.
    """
    weights = list(weights) if weights else [1.0] * len(sources)
    _check(sources, weights, method)
    shares = [weight / sum(weights) for weight in weights]
    config = sources[0].config

    @contextlib.contextmanager
    def open_params() -> Iterator[Parameters]:
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(source.open_params()) for source in sources]
            shapes = parameter_shapes(config)
            yield _Linear(opened, shares) if method == "linear" else _Slerp(opened[0], opened[1], shares[1], shapes)

    first = sources[0]
    kept = {field.name: getattr(first, field.name) for field in dataclasses.fields(ModelSource)}
    listed = ", ".join(f"{source.short_name} ({share:.4g})" for source, share in zip(sources, shares, strict=True))
    same_run = all(source.run_folder == first.run_folder for source in sources)
    return ModelSource(
        **{
            **kept,
            "name": f"{method} merge of {listed}",
            "open_params": open_params,
            "run_folder": first.run_folder if same_run else None,
            "step": max(s.step for s in sources) if same_run and first.run_folder else None,
        }
    )


def _check(sources: Sequence[ModelSource], weights: Sequence[float], method: str) -> None:
    if len(sources) < 2:
        raise UserError("a merge needs at least two models; name more, or a workdir with several checkpoints")
    if method == "slerp" and len(sources) != 2:
        raise UserError(f"slerp merges exactly two models, not {len(sources)}; merge two at a time, or use --method linear")
    if len(weights) != len(sources):
        raise UserError(f"{len(weights)} weights for {len(sources)} models; give one each")
    if sum(weights) <= 0 or (method == "slerp" and min(weights) < 0):
        raise UserError(f"weights {weights} do not make an average; their sum must be positive, and for slerp each of them")
    first = sources[0]
    for other in sources[1:]:
        if other.config != first.config:
            raise UserError(f"{other.name} is not of the architecture of {first.name}: {other.config}, not {first.config}")
        if other.matching_tokenizer().fingerprint != first.matching_tokenizer().fingerprint:
            raise UserError(f"{other.name} and {first.name} have different tokenizers; their embedding tables do not match")


class _Linear:
    def __init__(self, parts: Sequence[Parameters], shares: Sequence[float]):
        self._parts, self._shares = parts, shares

    def unit(self, entry: Entry) -> int:
        return max(part.unit(entry) for part in self._parts)

    def read(self, entry: Entry, start: int, stop: int) -> np.ndarray:
        total: np.ndarray | float = 0.0
        for part, share in zip(self._parts, self._shares, strict=True):
            total = total + share * part.read(entry, start, stop).astype(np.float64)
        return np.asarray(total, np.float32)


class _Slerp:
    def __init__(self, one: Parameters, other: Parameters, share: float, shapes: dict[Entry, Shape]):
        self._one, self._other, self._share, self._shapes = one, other, share, shapes
        self._unstacked: dict[Entry, tuple[float, float]] = {}  # whose tensor may be read in several blocks

    def unit(self, entry: Entry) -> int:
        return max(self._one.unit(entry), self._other.unit(entry))

    def read(self, entry: Entry, start: int, stop: int) -> np.ndarray:
        if entry.stacked:
            return np.concatenate([self._arc(entry, i, i + 1, self._factors(entry, [(i, i + 1)])) for i in range(start, stop)])
        if entry not in self._unstacked:
            self._unstacked[entry] = self._factors(entry, blocks(self, entry, self._shapes[entry]))
        return self._arc(entry, start, stop, self._unstacked[entry])

    def _pair(self, entry: Entry, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return tuple(part.read(entry, start, stop).astype(np.float64) for part in (self._one, self._other))

    def _factors(self, entry: Entry, parts: Iterable[tuple[int, int]]) -> tuple[float, float]:
        """What each tensor is multiplied by, from the angle between them."""
        products = np.zeros(3)
        for start, stop in parts:
            one, other = (array.reshape(-1) for array in self._pair(entry, start, stop))
            products += one @ one, other @ other, one @ other
        length = np.sqrt(products[0] * products[1])
        cosine = products[2] / length if length else 1.0
        if abs(cosine) > NEARLY_PARALLEL:
            return 1 - self._share, self._share
        angle = np.arccos(cosine)
        return np.sin((1 - self._share) * angle) / np.sin(angle), np.sin(self._share * angle) / np.sin(angle)

    def _arc(self, entry: Entry, start: int, stop: int, factors: tuple[float, float]) -> np.ndarray:
        one, other = self._pair(entry, start, stop)
        return (factors[0] * one + factors[1] * other).astype(np.float32)
