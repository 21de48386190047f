"""Which rows make which step: a pure function of (seed, step), the same on any number of hosts.

An epoch is a seeded permutation of all (source, batch) pairs, so every step draws from one source on every host and every row
comes once an epoch. Inside a source, rows are shuffled anew each epoch by the function behind Grain's `MapDataset.shuffle`, a
bijection that is computed index by index, so nothing is kept in memory and any step is planned alone. A source's last batch
holds what is left: its missing samples are masked, nothing is dropped or repeated.

The published trainer draws the source at random with weights equal to the number of batches until each is exhausted
(F2LLM `run.py`, `MultiLoader`), which is a random permutation of the same pairs; only the random numbers differ.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

import numpy as np
from grain.experimental import index_shuffle

from f2llm_jax.errors import UserError

Kind = Literal["retrieval", "clustering", "classification"]
NegativesPer = Literal["batch", "row"]

# Hard negatives drawn a sample (F2LLM `configs/config.json` and `utils.py`).
NEGATIVES = {"retrieval": 7, "clustering": 9, "classification": 1}
SHUFFLE_ROUNDS = 4  # as in Grain


@dataclasses.dataclass(frozen=True)
class PlanSource:
    """What the order of data depends on: `rows` in the split, `negatives` stored a row, and the task kind."""

    rows: int
    negatives: int
    kind: Kind


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The samples of one step.

    Attributes:
      epoch: 0-based.
      source: name of the one source of this step.
      kind: its task kind.
      rows: int64 `[b]`, 1 <= b <= B, row numbers within the source's split.
      columns: int64 `[b, n]`, which stored negatives (0-based) each sample uses; where a row has fewer than its source, others
        of its own take the place of those it lacks.
    """

    epoch: int
    source: str
    kind: Kind
    rows: np.ndarray
    columns: np.ndarray


class Plan:
    """The order of a run."""

    def __init__(
        self,
        sources: Mapping[str, PlanSource],
        batch_size: int,
        seed: int,
        negatives: Mapping[Kind, int] | None = None,
        negatives_per_sample: NegativesPer = "batch",
    ):
        """Sources without rows take no part.

        Args:
          sources: by name; the order of names does not matter.
          batch_size: B, samples a step over all hosts.
          seed: of everything random here.
          negatives: hard negatives drawn by kind, at most what a source stores; the published numbers by default.
          negatives_per_sample: "batch" draws one set of columns for all samples of a step, as published; "row" one each.

        Raises:
          ValueError: no source has rows, or an argument is out of range.
        """
        self._sources = {name: sources[name] for name in sorted(sources) if sources[name].rows > 0}
        if not self._sources:
            raise UserError("no source has any row in this split; check the prepared folder's dataset.json")
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1")
        if negatives_per_sample not in ("batch", "row"):
            raise UserError(f"negatives_per_sample={negatives_per_sample!r} must be 'batch' or 'row'")
        self._batch_size, self._seed = batch_size, seed
        self._negatives = {**NEGATIVES, **(negatives or {})}
        self._per_row = negatives_per_sample == "row"
        self._names = list(self._sources)
        self._shuffle_seeds = [int(np.random.default_rng((seed, index)).integers(2**31)) for index in range(len(self._names))]
        counts = [-(-source.rows // batch_size) for source in self._sources.values()]
        self._ends = np.cumsum(counts)

    @property
    def steps_per_epoch(self) -> int:
        """Number of (source, batch) pairs."""
        return int(self._ends[-1])

    @property
    def max_negatives(self) -> int:
        """N: the most negatives that any sample of any source uses; at least 1, so that pairs alone have the arrays of the rest."""
        return max(1, *(min(self._negatives[s.kind], s.negatives) for s in self._sources.values()))

    def step(self, step: int) -> StepPlan:
        """The plan of one step, computed alone."""
        epoch, within = divmod(step, self.steps_per_epoch)
        pair = int(self._epoch_order(epoch)[within])
        index = int(np.searchsorted(self._ends, pair, side="right"))
        batch = pair - int(self._ends[index - 1] if index else 0)
        name = self._names[index]
        return StepPlan(epoch, name, self._sources[name].kind, self._rows(index, epoch, batch), self._columns(index, epoch, batch))

    @functools.lru_cache(maxsize=2)  # noqa: B019  (a plan lives as long as its run)
    def _epoch_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, epoch)).permutation(self.steps_per_epoch)

    def _rows(self, index: int, epoch: int, batch: int) -> np.ndarray:
        count = self._sources[self._names[index]].rows
        start, stop = batch * self._batch_size, min((batch + 1) * self._batch_size, count)
        seed = (self._shuffle_seeds[index] + epoch) % 2**32
        return np.array([index_shuffle(i, count - 1, seed, SHUFFLE_ROUNDS) for i in range(start, stop)], np.int64)

    def _columns(self, index: int, epoch: int, batch: int) -> np.ndarray:
        source = self._sources[self._names[index]]
        rows = min((batch + 1) * self._batch_size, source.rows) - batch * self._batch_size
        used = min(self._negatives[source.kind], source.negatives)
        rng = np.random.default_rng((self._seed, epoch, index, batch))
        if self._per_row:
            return np.stack([rng.permutation(source.negatives)[:used] for _ in range(rows)])
        return np.tile(rng.permutation(source.negatives)[:used], (rows, 1))
