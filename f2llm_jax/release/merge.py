"""Several checkpoints of one architecture as one model, averaged block by block.

Sums are made in float64 and rounded to float32 once, so the average of equal weights is those weights to the bit, and any
other is the float32 number nearest to the true one.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from f2llm_jax.errors import UserError
from f2llm_jax.weights.embedding_config import EmbeddingConfig
from f2llm_jax.weights.hf_mapping import Entry
from f2llm_jax.weights.models import ModelSource
from f2llm_jax.weights.parameters import Parameters


def merge(sources: Sequence[ModelSource], weights: Sequence[float] | None = None) -> ModelSource:
    """A model whose every tensor is the average of the others'.

    Args:
      sources: two or more; the first gives tokenizer and prompts.
      weights: how much each counts, in any unit; equal if None.

    Raises:
      UserError: they do not belong together, or the weights do not fit them.
    """
    weights = list(weights) if weights else [1.0] * len(sources)
    _check(sources, weights)
    shares = [weight / sum(weights) for weight in weights]

    @contextlib.contextmanager
    def open_params() -> Iterator[Parameters]:
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(source.open_params()) for source in sources]
            yield _Average(opened, shares)

    first = sources[0]
    kept = {field.name: getattr(first, field.name) for field in dataclasses.fields(ModelSource)}
    listed = ", ".join(f"{source.short_name} ({share:.4g})" for source, share in zip(sources, shares, strict=True))
    same_run = all(source.run_folder == first.run_folder for source in sources)
    return ModelSource(
        **{
            **kept,
            "name": f"linear merge of {listed}",
            "embedding": _embedding(sources),
            "open_params": open_params,
            "run_folder": first.run_folder if same_run else None,
            "step": max(s.step or 0 for s in sources) if same_run and first.run_folder else None,
        }
    )


def _embedding(sources: Sequence[ModelSource]) -> EmbeddingConfig:
    """What an average of the models can be said to be trained with: what each of them was."""
    of_each = [source.embedding for source in sources]

    def common(name: str) -> tuple[int, ...]:
        return tuple(value for value in getattr(of_each[0], name) if all(value in getattr(one, name) for one in of_each))

    shortest = min((one.max_length for one in of_each if one.max_length), default=None)
    return dataclasses.replace(
        of_each[0],
        matryoshka_dims=common("matryoshka_dims"),
        depths=common("depths"),
        table_ranks=common("table_ranks"),
        max_length=shortest,
    )


def _check(sources: Sequence[ModelSource], weights: Sequence[float]) -> None:
    if len(sources) < 2:
        raise UserError("a merge needs at least two models; name more, or a workdir with several checkpoints")
    if len(weights) != len(sources):
        raise UserError(f"{len(weights)} weights for {len(sources)} models; give one each")
    if not (all(map(math.isfinite, weights)) and sum(weights) > 0):
        raise UserError(f"weights {weights} do not make an average; they must be finite, and their sum positive")
    first = sources[0]
    for other in sources[1:]:
        if other.config != first.config:
            raise UserError(f"{other.name} is not of the architecture of {first.name}: {other.config}, not {first.config}")
        if other.matching_tokenizer().fingerprint != first.matching_tokenizer().fingerprint:
            raise UserError(f"{other.name} and {first.name} have different tokenizers; their embedding tables do not match")
        if other.width != first.width:
            raise UserError(
                f"{other.name} serves {other.width} dimensions, {first.name} serves {first.width}; merge models that serve as many"
            )


class _Average:
    def __init__(self, parts: Sequence[Parameters], shares: Sequence[float]):
        self._parts, self._shares = parts, shares

    def unit(self, entry: Entry) -> int:
        return max(part.unit(entry) for part in self._parts)

    def read(self, entry: Entry, start: int, stop: int) -> np.ndarray:
        total: np.ndarray | float = 0.0
        for part, share in zip(self._parts, self._shares, strict=True):
            total = total + share * part.read(entry, start, stop).astype(np.float64)
        return np.asarray(total, np.float32)
