"""Which rows make which step: a pure function of (seed, step), the same on any number of hosts.

Every step draws from one source on every host; `order` says from which. Inside a source, rows are shuffled anew each epoch by the
function behind Grain's `MapDataset.shuffle`, a bijection that is computed index by index, so nothing is kept in memory and any step is
planned alone. A source's last batch holds what is left of it: its missing samples are masked, or with `tail="repeated"` taken from the
source's first ones, as the published trainer does (Accelerate's `even_batches`).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Int

from f2llm_jax.data.order import EpochOrder, Sampling
from f2llm_jax.data.task_kind import TaskKind
from f2llm_jax.errors import UserError

NegativesPer = Literal["batch", "row"]
SingleNegative = Literal["random", "first"]
Tail = Literal["masked", "repeated"]

# Hard negatives drawn a sample; graded pairs have none (F2LLM `configs/config.json` and `utils.py`).
NEGATIVES: dict[TaskKind, int] = {"retrieval": 7, "clustering": 9, "classification": 1, "graded": 0}
EVERY_ROW_ONCE = Sampling()
SHUFFLE_ROUNDS = 4  # as in Grain
PASS_SEED = 0x9E3779B1  # between the shuffles of two passes of one epoch


@dataclasses.dataclass(frozen=True)
class PlanSource:
    """What the order of data depends on."""

    rows: int  # in the split
    negatives: int  # stored a row
    kind: TaskKind
    unit: str = ""


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The samples of one step."""

    epoch: int  # 0-based
    source: str  # the one source of this step
    kind: TaskKind
    rows: Int[np.ndarray, " b"]  # row numbers within the source's split, 1 <= b <= B
    columns: Int[np.ndarray, "b n"]  # which stored negatives (0-based) each sample uses; a row that has fewer uses others of its own


class Plan:
    """The order of a run."""

    def __init__(
        self,
        sources: Mapping[str, PlanSource],
        batch_size: int,
        seed: int,
        negatives: Mapping[TaskKind, int] | None = None,
        negatives_per_sample: NegativesPer = "batch",
        single_negative: SingleNegative = "random",
        tail: Tail = "masked",
        sampling: Sampling = EVERY_ROW_ONCE,
    ):
        """Sources without rows take no part.

        Args:
          sources: by name; the order of names does not matter.
          batch_size: B, samples a step over all hosts.
          seed: of everything random here.
          negatives: hard negatives drawn by kind, at most what a source stores; the published numbers by default.
          negatives_per_sample: "batch" draws one set of columns for all samples of a step, as published; "row" one each.
          single_negative: where one negative is drawn of several, "first" always takes `negative_1`, as published.
          tail: what fills a source's last batch, "masked" samples or "repeated" rows, as published.
          sampling: how often sources come, and when.

        Raises:
          UserError: no source has rows, or an argument is out of range.
        """
        self._sources = {name: sources[name] for name in sorted(sources) if sources[name].rows > 0}
        if not self._sources:
            raise UserError("no source has any row in this split; check the prepared folder's dataset.json")
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1")
        for name, value, allowed in (
            ("negatives_per_sample", negatives_per_sample, ("batch", "row")),
            ("single_negative", single_negative, ("random", "first")),
            ("tail", tail, ("masked", "repeated")),
        ):
            if value not in allowed:
                raise UserError(f"{name}={value!r} must be {allowed[0]!r} or {allowed[1]!r}")
        if unknown := sorted((negatives or {}).keys() - NEGATIVES.keys()):
            raise UserError(f"negatives has the task kind {unknown[0]!r}; there are: {', '.join(NEGATIVES)}")
        self._batch_size, self._seed = batch_size, seed
        self._negatives = {**NEGATIVES, **(negatives or {})}
        self._per_row, self._first, self._tail = negatives_per_sample == "row", single_negative == "first", tail
        self._names = list(self._sources)
        self._shuffle_seeds = [int(np.random.default_rng((seed, index)).integers(2**31)) for index in range(len(self._names))]
        self._batches = {name: -(-source.rows // batch_size) for name, source in self._sources.items()}
        self.epochs = EpochOrder(self._batches, {name: source.unit or name for name, source in self._sources.items()}, seed, sampling)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch that all sources take part in."""
        return self.epochs.steps_per_epoch

    @property
    def max_negatives(self) -> int:
        """N: the most negatives that any sample of any source uses; at least 1, so that pairs alone have the arrays of the rest."""
        return max(1, *(min(self._negatives[s.kind], s.negatives) for s in self._sources.values()))

    def step(self, step: int) -> StepPlan:
        """The plan of one step, computed alone."""
        epoch, within = self.epochs.locate(step)
        sources, batches = self._epoch_order(epoch)
        index, batch = int(sources[within]), int(batches[within])
        name = self._names[index]
        rows = self._rows(index, epoch, batch)
        return StepPlan(epoch, name, self._sources[name].kind, rows, self._columns(index, epoch, batch, len(rows)))

    @functools.lru_cache(maxsize=2)  # noqa: B019  (a plan lives as long as its run)
    def _epoch_order(self, epoch: int) -> tuple[Int[np.ndarray, " steps"], Int[np.ndarray, " steps"]]:
        return self.epochs.order(epoch)

    def _rows(self, index: int, epoch: int, batch: int) -> Int[np.ndarray, " b"]:
        name = self._names[index]
        count = self._sources[name].rows
        repeat, batch = divmod(batch, self._batches[name])
        places = range(batch * self._batch_size, (batch + 1) * self._batch_size)
        if self._tail == "masked":
            places = range(places.start, min(places.stop, count))
        seed = (self._shuffle_seeds[index] + epoch + repeat * PASS_SEED) % 2**32
        return np.array([index_shuffle(place % count, count - 1, seed, SHUFFLE_ROUNDS) for place in places], np.int64)

    def _columns(self, index: int, epoch: int, batch: int, rows: int) -> Int[np.ndarray, "b n"]:
        source = self._sources[self._names[index]]
        used = min(self._negatives[source.kind], source.negatives)
        if used == 1 and self._first:
            return np.zeros((rows, 1), np.int64)
        rng = np.random.default_rng((self._seed, epoch, index, batch))
        if self._per_row:
            return np.stack([rng.permutation(source.negatives)[:used] for _ in range(rows)])
        return np.tile(rng.permutation(source.negatives)[:used], (rows, 1))
