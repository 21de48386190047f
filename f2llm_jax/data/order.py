"""Which batches an epoch holds, and in which order: a pure function of (seed, epoch), on any number of hosts.

A source of n batches has n of them in an epoch, unless `Sampling` says otherwise, and an epoch is as long as its sources are.

"uniform" is a random permutation of all batches. "published" is the rule of F2LLM `run.py` (`MultiLoader`): each step draws a source with
probability proportional to its number of batches at the *start* of the epoch, until it is exhausted. That is another order: sources
that by chance were drawn less often than their share are left at the end, and most of these are small.

The published order is computed without a loop. Let every source ring a bell at random times, in unit time as often on average as it
has batches (a Poisson process), and fall silent after its last batch. Whatever rang before, the next bell is a given source's with the
published probability, so the order of the bells is the order of the draws.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from f2llm_jax.errors import UserError

Order = Literal["uniform", "published"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How often sources come and when; the defaults give every row once an epoch.

    The strings are lists such as "paracrawl=0.5,squad=2", of sources or of units (the number is then that of all sources of the unit).

    Of an epoch, source s has a share in proportion to `weight * (repeats * batches) ** temperature`. The epoch is as long as it can be
    without a source that comes more than `repeats` times: so weights alone, or a temperature, leave rows out and never repeat one.

    Raises:
      UserError: a value is out of range or a list is malformed.
    """

    order: Order = "uniform"
    weights: str = ""  # relative to the default of 1; 0 leaves the source out
    temperature: float = 1.0  # below 1 small sources have more than in proportion to their size, at 0 all have the same share
    repeats: str = ""  # most times that an epoch goes over a source, a whole number; 1 by default
    starts: str = ""  # epochs after which a source is first drawn, as in 0.5 or 1; 0 by default

    def __post_init__(self) -> None:
        if self.order not in get_args(Order):
            raise UserError(f"data.order={self.order!r} must be 'uniform' or 'published'")
        if not 0 <= self.temperature <= 1:
            raise UserError(f"data.temperature={self.temperature} must be between 0 and 1")

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Sampling":
        """From a configuration's group that has these fields among others."""
        return cls(**{field.name: fields[field.name] for field in dataclasses.fields(cls) if field.name in fields})

    def of_sources(self, field: str, names: Sequence[str], units: Sequence[str], default: float) -> Float[np.ndarray, " sources"]:
        """The numbers of the list `field` for sources of the given names and units."""
        values = np.full(len(names), default)
        for name, value in _parse(f"data.{field}", getattr(self, field)).items():
            matching = [i for i, source in enumerate(names) if source == name] or [i for i, unit in enumerate(units) if unit == name]
            if not matching:
                near = difflib.get_close_matches(name, {*names, *units}, n=3)
                hint = f"; did you mean {', '.join(near)}?" if near else ""
                raise UserError(f"data.{field} names {name!r}, which is no source of the dataset and no unit{hint}")
            values[matching] = value
        return values


def _parse(field: str, text: str) -> dict[str, float]:
    found = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.rpartition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError as error:
            raise UserError(f"{field}={text!r}: {part!r} is not of the form source=number") from error
    return found


class EpochOrder:
    """The order of the batches of a dataset's sources."""

    def __init__(self, batches: Mapping[str, int], units: Mapping[str, str], seed: int, sampling: Sampling):
        """`batches` is how many each source has, at least 1; `units` is the unit of each.

        Raises:
          UserError: `sampling` names an unknown source, or leaves nothing for the first epoch.
        """
        names, of_unit = list(batches), [units[name] for name in batches]
        self._names, self._seed, self._published = names, seed, sampling.order == "published"
        weights = sampling.of_sources("weights", names, of_unit, 1.0)
        repeats = sampling.of_sources("repeats", names, of_unit, 1.0)
        self._starts = sampling.of_sources("starts", names, of_unit, 0.0)
        if (weights < 0).any() or (self._starts < 0).any() or (repeats < 1).any() or (repeats % 1).any():
            raise UserError("data.weights and data.starts must not be negative, and data.repeats must be whole numbers from 1")
        self._most = (np.fromiter(batches.values(), np.int64) * repeats).astype(np.int64)
        self._shares = weights * self._most**sampling.temperature
        if not self.counts(0).sum():
            raise UserError("data.weights or data.starts leave no source for the first epoch; give one a weight and start 0")
        # Epochs differ in length until every source takes part.
        early = [int(self.counts(epoch).sum()) for epoch in range(int(np.ceil(self._starts.max())))]
        self._ends = np.cumsum(early, dtype=np.int64)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch that all sources take part in."""
        return int(self.counts(len(self._ends)).sum())

    def counts(self, epoch: int) -> Int[np.ndarray, " sources"]:
        """Batches of each source in an epoch."""
        shares = np.where(self._starts < epoch + 1, self._shares, 0.0)
        drawn = shares > 0
        if not drawn.any():
            return np.zeros(len(shares), np.int64)
        longest = np.min(self._most[drawn] / shares[drawn])
        return np.where(drawn, np.clip(np.rint(longest * shares), 1, self._most), 0).astype(np.int64)

    def steps(self, epochs: int) -> int:
        """Steps of the first `epochs` epochs."""
        early = min(epochs, len(self._ends))
        return (int(self._ends[early - 1]) if early else 0) + (epochs - early) * self.steps_per_epoch

    def locate(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and the step within it."""
        epoch = int(np.searchsorted(self._ends, step, side="right"))
        if epoch == len(self._ends):
            epoch += (step - self.steps(epoch)) // self.steps_per_epoch
        return epoch, step - self.steps(epoch)

    def order(self, epoch: int) -> tuple[Int[np.ndarray, " steps"], Int[np.ndarray, " steps"]]:
        """For each step of an epoch the source's number and the number of its batch."""
        counts = self.counts(epoch)
        source, total = np.repeat(np.arange(len(counts)), counts), int(counts.sum())
        batch = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
        rng = np.random.default_rng((self._seed, epoch))
        if self._published:
            times = np.cumsum(rng.exponential(size=total) / counts[source])
            ends = np.cumsum(counts) - counts
            times -= np.repeat(np.concatenate([[0.0], times])[ends], counts)
        else:
            times = np.empty(total)
            times[rng.permutation(total)] = np.arange(total) / total
        late = np.clip(self._starts - epoch, 0, 1)[source]
        first = np.argsort(late + (1 - late) * times, kind="stable")
        return source[first], batch[first]
