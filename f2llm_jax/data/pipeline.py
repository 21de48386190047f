"""From a step number to the arrays of that step on this host's devices."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import grain
import jax
import numpy as np
from jaxtyping import Float, Int

from f2llm_jax import sharding
from f2llm_jax.batch import Batch, Samples
from f2llm_jax.data.order import Sampling
from f2llm_jax.data.packing import Packing, RowShape, lay_out
from f2llm_jax.data.plan import EVERY_ROW_ONCE, NegativesPer, Plan, PlanSource, SingleNegative, StepPlan, Tail
from f2llm_jax.data.records import QUERY_SPLITS, Dataset, allow_open_files
from f2llm_jax.data.task_kind import TaskKind
from f2llm_jax.data.teacher_cache import TeacherCache, TeacherCaches
from f2llm_jax.errors import UserError
from f2llm_jax.text import truncate


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Shape and content of a step."""

    size: int  # B, samples a step over all devices; also the pool of in-batch negatives
    row_tokens: int  # T, tokens of a packed row, at least `max_length`
    microbatch_rows: int  # rows that are kept for the backward pass, over all devices; memory and time, and nothing else, depend on it
    max_length: int  # longest text in tokens, EOS included; longer ones are truncated and still end in EOS
    row_texts: int = 64  # X, the most texts of a row
    chunk_rows: int = 0  # M, of these in a layer at once, about; 0 for all
    row_parts: int = 1  # that rows are split into for texts that fit a part
    negatives: Mapping[TaskKind, int] | None = None  # hard negatives drawn by task kind; None for the published 7, 9 and 1
    negatives_per_sample: NegativesPer = "batch"  # these and the next two: see `Plan`
    single_negative: SingleNegative = "random"
    tail: Tail = "masked"

    def __post_init__(self):
        if not 1 <= self.max_length <= self.row_tokens:
            raise UserError(f"max_length={self.max_length} must be between 1 and row_tokens={self.row_tokens}")
        if self.row_parts < 1 or self.row_tokens % self.row_parts or self.row_texts % self.row_parts:
            raise UserError(
                f"row_parts={self.row_parts} must divide row_tokens={self.row_tokens} and row_texts={self.row_texts}; 1 splits none"
            )

    def rows(self, shards: int) -> RowShape:
        """How texts are packed where rows are split over so many shards.

        Raises:
          UserError: they cannot be.
        """
        M = self.microbatch_rows
        if M % shards:
            raise UserError(f"batch.microbatch_rows={M} must be a multiple of the {shards} shards that rows are split over")
        most = max(self.chunk_rows, shards) if self.chunk_rows else M
        chunk_rows = max(rows for rows in range(shards, min(most, M) + 1, shards) if M % rows == 0)
        return RowShape(chunk_rows, self.row_tokens, self.row_texts, M // chunk_rows, self.row_parts)


@dataclasses.dataclass(frozen=True)
class StepData:
    """One step's input."""

    batch: Batch  # global arrays
    plan: StepPlan  # which samples they are
    tokens: int  # real tokens in the global batch
    squares: int  # sum of the squared lengths of its texts
    padded_tokens: int  # that the devices compute on: chunks in use x M x T


@dataclasses.dataclass(frozen=True)
class PlannedStep:
    """One step before its texts are read, for a look at it."""

    plan: StepPlan
    packing: Packing  # of all its texts
    samples: int  # B, masked ones included: texts 0 to B - 1 are queries, the next B positives, the rest negatives
    documents: Int[np.ndarray, "b 1+n"]  # positive and negatives of each sample, positions in `corpus`; -1 for none


class Pipeline:
    """Batches of one split of a prepared dataset."""

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        config: BatchConfig,
        seed: int,
        mesh: jax.sharding.Mesh | None,
        sources: list[str] | None = None,
        teacher: TeacherCache | TeacherCaches | None = None,
        sampling: Sampling = EVERY_ROW_ONCE,
    ):
        """Args as named; `sources` restricts to some of the dataset's; with a `teacher` its vectors come with the texts.

        Raises:
          UserError: there is no such split or source, or `microbatch_rows` cannot be split over the mesh.
        """
        self._dataset, self._split, self._config, self._mesh = dataset, split, config, mesh
        self._teacher = teacher
        shards = sharding.batch_shards(mesh)
        names = list(dataset.sources) if sources is None else sources
        if unknown := [name for name in names if name not in dataset.sources]:
            raise UserError(f"{dataset.folder} has no source {unknown[0]!r}; there are: {', '.join(dataset.sources)}")
        if split not in QUERY_SPLITS:
            raise UserError(f"split={split!r}: choose one of {', '.join(QUERY_SPLITS)}")
        info = {name: dataset.sources[name] for name in names}
        self.plan = Plan(
            {name: PlanSource(s.rows[split], s.negatives, s.kind, s.unit) for name, s in info.items()},
            config.size,
            seed,
            config.negatives,
            config.negatives_per_sample,
            config.single_negative,
            config.tail,
            sampling,
        )
        self._samples = -(-config.size // shards) * shards  # B, rounded up so that it splits; the extra samples are masked
        self._shape = config.rows(shards)
        self._eos_id = dataset.eos_id
        # One program serves the batches of all sources, and with pipelines of single sources those of the dataset.
        self._query_ids = all(source.query_ids for source in dataset.sources.values())
        self._scored = any(source.scored for source in dataset.sources.values())
        self._graded = any(source.kind == "graded" for source in dataset.sources.values())
        # A step opens one source; what it opened stays open for the next step of that source.
        allow_open_files()
        self._reader = functools.cache(dataset.reader)
        self._tables = functools.cache(dataset.tables)

    def steps(self, start: int, stop: int, threads: int = 2, ahead: int = 4) -> Iterator[StepData]:
        """The steps `start <= step < stop` in order, read and packed by `threads` threads up to `ahead` steps early."""
        return _arriving(grain.MapDataset.range(start, stop).map(lambda step: (self, step)), threads, ahead)

    def step(self, step: int) -> StepData:
        """One step alone."""
        batch, plan, tokens, squares, padded = self._host_arrays(step)
        return StepData(sharding.batch_to_devices(batch, self._mesh), plan, tokens, squares, padded)

    def languages(self, step: int) -> list[str]:
        """Of each of the step's samples, in order; "" where unknown."""
        plan = self.plan.step(step)
        return self._reader(plan.source, self._split).languages(plan.rows)

    def grades(self, step: int) -> Float[np.ndarray, " b"]:
        """Of each of the step's samples, the score of its positive; NaN where it has none."""
        plan = self.plan.step(step)
        return self._scores(plan)[: len(plan.rows), 0]

    def planned(self, step: int) -> PlannedStep:
        """The plan and the packing of one step; reads no record."""
        plan = self.plan.step(step)
        where = self._where(plan)
        B, b = self._samples, len(plan.rows)
        documents = np.concatenate([where[B : 2 * B, None], where[2 * B :].reshape(B, -1)], axis=1)[:b]
        return PlannedStep(plan, self._shape.pack(self._texts(plan, where)[0]), B, documents)

    def _host_arrays(self, step: int) -> tuple[Batch, StepPlan, int, int, int]:
        """The fields of `StepData`, the batch on the host."""
        plan = self.plan.step(step)
        where = self._where(plan)
        lengths, read = self._texts(plan, where)
        packing = self._shape.pack(lengths)
        # No two texts share a row in the worst case: arrays of that shape serve every step with one program.
        worst = -(-len(lengths) // self._shape.chunk_rows)
        texts = lay_out(packing, self._shape, read, chunks=worst, local_rows=sharding.local_part(self._shape.chunk_rows, self._mesh))
        B = self._samples
        documents = where[B:].reshape(-1)
        batch = Batch(
            texts,
            Samples(
                sample_mask=(where[:B] >= 0).astype(np.float32),
                negative_mask=(documents[B:].reshape(B, -1) >= 0).astype(np.float32),
                in_batch_weight=np.float32(plan.kind == "retrieval"),
                passage_ids=documents[:B].astype(np.int32),
                negative_ids=documents[B:].reshape(B, -1).astype(np.int32),
                query_ids=self._of_queries(plan) if self._query_ids else None,
                scores=self._scores(plan) if self._scored else None,
                graded_weight=np.float32(plan.kind == "graded") if self._graded else None,
            ),
            teacher=None if self._teacher is None else self._teacher_vectors(self._teacher, plan.source, where),
        )
        padded = int(texts.chunks) * self._shape.chunk_rows * self._config.row_tokens
        lengths = packing.lengths.astype(np.int64)
        return batch, plan, int(lengths.sum()), int(lengths @ lengths), padded

    def _teacher_vectors(
        self, teacher: TeacherCache | TeacherCaches, source: str, where: Int[np.ndarray, " S"]
    ) -> Float[np.ndarray, "B 2+N W"]:
        """Of each sample's query, positive and negatives; 0 for what does not exist or lives elsewhere."""
        B = self._samples
        here = sharding.local_part(B, self._mesh)
        vectors = np.zeros((B, len(where) // B, teacher.width), np.float32)
        queries = here & (where[:B] >= 0)
        vectors[queries, 0] = teacher.read(source, self._split, where[:B][queries])
        documents = np.concatenate([where[B : 2 * B, None], where[2 * B :].reshape(B, -1)], axis=1)
        present = here[:, None] & (documents >= 0)
        vectors[:, 1:][present] = teacher.read(source, "corpus", documents[present])
        return vectors

    def _of_queries(self, plan: StepPlan) -> Int[np.ndarray, " B"]:
        """The id of each sample's query; -1 for a sample that does not exist."""
        ids = self._tables(plan.source, self._split).query_ids
        assert ids is not None
        return np.pad(ids[plan.rows], (0, self._samples - len(plan.rows)), constant_values=-1)

    def _scores(self, plan: StepPlan) -> Float[np.ndarray, "B 1+N"]:
        """Of each sample's positive and the negatives that it uses; NaN for none."""
        found = np.full((self._samples, 1 + self.plan.max_negatives), np.nan, np.float32)
        tables = self._tables(plan.source, self._split)
        if tables.scores is not None:
            b, n = plan.columns.shape
            scores = tables.scores[plan.rows]
            columns = used_columns(tables.documents[plan.rows][:, 1:], plan.columns)
            found[:b, 0] = scores[:, 0]
            found[:b, 1 : 1 + n] = np.where(columns >= 0, np.take_along_axis(scores[:, 1:], np.maximum(columns, 0), axis=1), np.nan)
        return found

    def _where(self, plan: StepPlan) -> Int[np.ndarray, " S"]:
        """For each text in `Batch` order the row (a query) or document (otherwise) that it is; -1 if there is none."""
        B, N = self._samples, self.plan.max_negatives
        b, n = plan.columns.shape
        documents = self._tables(plan.source, self._split).documents[plan.rows]
        where = np.full(B * (2 + N), -1, np.int64)
        where[:b], where[B : B + b] = plan.rows, documents[:, 0]
        columns = used_columns(documents[:, 1:], plan.columns)
        drawn = np.take_along_axis(documents[:, 1:], np.maximum(columns, 0), axis=1)
        where[2 * B :].reshape(B, N)[:b, :n] = np.where(columns >= 0, drawn, -1)
        return where

    def _texts(
        self, plan: StepPlan, where: Int[np.ndarray, " S"]
    ) -> tuple[Int[np.ndarray, " S"], Callable[[np.ndarray], list[np.ndarray]]]:
        """Lengths of the batch's texts, and a function that reads the token ids of some of them."""
        B = self._samples
        tables = self._tables(plan.source, self._split)
        lengths = np.zeros(len(where), np.int32)
        for texts, table in ((slice(0, B), tables.query_length), (slice(B, None), tables.document_length)):
            present = where[texts] >= 0
            lengths[texts][present] = table[where[texts][present]]
        lengths = np.minimum(lengths, self._config.max_length)

        def read(texts: np.ndarray) -> list[np.ndarray]:
            query = texts < B
            ids: list[np.ndarray] = [np.empty(0, np.int32)] * len(texts)
            for split, mine in ((self._split, query), ("corpus", ~query)):
                # Labels and popular documents come many times a batch, and are read once.
                distinct, place = np.unique(where[texts[mine]], return_inverse=True)
                found = [
                    truncate(tokens, self._config.max_length, self._eos_id) for tokens in self._reader(plan.source, split).read(distinct)
                ]
                for i, j in zip(np.flatnonzero(mine).tolist(), place.tolist(), strict=True):
                    ids[i] = found[j]
            return ids

        return lengths, read


def read_steps(chosen: Sequence[tuple[Pipeline, int]], threads: int = 2, ahead: int = 4) -> Iterator[StepData]:
    """Single steps of several pipelines, in order, read as `Pipeline.steps` reads."""
    return _arriving(grain.MapDataset.range(len(chosen)).map(lambda i: chosen[i]), threads, ahead)


def _arriving(chosen: grain.MapDataset, threads: int, ahead: int) -> Iterator[StepData]:
    arrays = chosen.map(lambda one: (one[0]._mesh, one[0]._host_arrays(one[1])))
    for mesh, (batch, *about) in arrays.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)):
        yield StepData(sharding.batch_to_devices(batch, mesh), *about)


def used_columns(stored: Int[np.ndarray, "b n"], columns: Int[np.ndarray, "b k"]) -> Int[np.ndarray, "b k"]:
    """Which of their stored negatives samples use.

    Args:
      stored: documents of their rows; -1, in the last columns, for those that a row lacks.
      columns: distinct columns to use, k <= n.

    Returns:
      A column that a row lacks is replaced by one of its own that was not drawn, the first first; -1 once there is none.
    """
    if (np.take_along_axis(stored, columns, axis=1) >= 0).all():
        return columns
    others = np.ones(stored.shape, bool)
    np.put_along_axis(others, columns, False, axis=1)
    every = np.concatenate([columns, np.where(others, np.arange(stored.shape[1]), -1)], axis=1)
    there = (every >= 0) & (np.take_along_axis(stored, np.maximum(every, 0), axis=1) >= 0)
    first = np.argsort(~there, axis=1, kind="stable")[:, : columns.shape[1]]
    return np.take_along_axis(np.where(there, every, -1), first, axis=1)
