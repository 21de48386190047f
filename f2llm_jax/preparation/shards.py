"""What a Beam worker does: parts of a source into record files, and documents into the shards of the corpus.

Beam carries names of files, not records: a record that passes through Beam's shuffle costs more than tokenising it (measured:
docs/log.md), and the in-process runner would hold all of them in memory. So a worker writes the rows of a part as one
shard, in order, and spills the documents it meets, tokenised, into buckets by range of their key. A bucket is then sorted,
freed of repeats and written as one shard of the corpus, which is sorted over all shards because buckets are ranges.

A worker may run twice, or be killed: every file is written under another name first, and its content is the same each time.
"""

import contextlib
import dataclasses
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import IO

import apache_beam as beam
import numpy as np
import xxhash
from array_record.python import array_record_module
from etils import epath

from f2llm_jax.data import records
from f2llm_jax.preparation.cleaning import CleanRows
from f2llm_jax.preparation.encoding import TextEncoding, drop_same_ids, load
from f2llm_jax.preparation.selection import NEED_NEGATIVES, SplitRules, choose_rows, document_key, read_rows
from f2llm_jax.preparation.sources import Part, Source
from f2llm_jax.storage.arrays import read_arrays, write_arrays
from f2llm_jax.storage.files import is_remote, new_file, write_json

BUCKET_TEXTS = 500_000  # of a source, repeats included, that one bucket takes
SPILL_TOKENS = 4_000_000  # held by a worker before it writes them to the buckets
SEEN_KEYS = 500_000  # documents a worker remembers to have spilled; a repeat that it forgot is dropped by the bucket
CUT, SPECIAL = 1, 2  # marks of a document: cut at the limit; spells a special token
SPELLED = "warning: texts that spell a special token of the tokenizer, read as plain text"
MAX_HASH = 2**62 - 1
WRITER_OPTIONS = "group_size:1"  # records are read singly, in random order


class WriteRows(beam.DoFn):
    """From `(index, Part)` to the shards `part-<index>.<split>`, and `(bucket, path)` of the documents that were spilled.

    Next to them, in `work`: `part-<index>.json` with counts, and the tables of each split, `part-<index>.<split>.query_length`
    (int32 [rows]), `.documents` (int64 [rows, 1 + n], keys), `.row_keys` (uint64 [rows, 2], hashes of row and query) and, of a source with
    scores, `.scores` (float32 [rows, 1 + n]).
    """

    def __init__(self, source: Source, rules: SplitRules, tokenizer: str, shards: str, work: str):
        self.source, self.rules, self.tokenizer = source, rules, tokenizer
        self.shards, self.work = epath.Path(shards), epath.Path(work)

    def process(self, element: tuple[int, Part]) -> Iterator[tuple[int, str]]:
        index, part = element
        encoder, recipe = load(self.tokenizer), self.rules.recipe
        spill = _Spill(self.work, index, bucket_count(self.source))
        counts: Counter[str] = Counter()
        rows_by_split: Counter[str] = Counter()
        languages: Counter[str] = Counter()
        with contextlib.ExitStack() as stack:
            sinks = {
                split: stack.enter_context(_row_sink(self.shards, self.work, index, split, self.source.scored))
                for split in records.QUERY_SPLITS
            }
            for numbers, rows in read_rows(self.source, part, recipe, choose_rows(self.source, recipe)):
                rows, numbers, keys = self._documents(rows, numbers, encoder, spill)
                counts.update(rows.counters)
                languages.update(rows.languages)
                self._queries(rows, numbers, keys, part.split, encoder, sinks, rows_by_split, counts)
                if spill.tokens > SPILL_TOKENS:
                    yield from spill.flush()
            yield from spill.flush()
            # By its presence the part is whole: it is written after the files it speaks of.
            digests = {split: sink.digest.hexdigest() for split, sink in sinks.items()}
            digests |= {records.SCORES[split]: sink.scored.hexdigest() for split, sink in sinks.items() if sink.scores}
        content = {"rows": rows_by_split, "languages": languages, "counters": counts, "digests": digests}
        write_json(self.work / f"part-{index:05d}.json", content, sealed=True)

    def _documents(
        self, rows: CleanRows, numbers: np.ndarray, encoder: TextEncoding, spill: "_Spill"
    ) -> tuple[CleanRows, np.ndarray, np.ndarray]:
        """Spills the documents not met yet; the rows that remain, their numbers, and keys int64 `[B, 1 + N]` of all, -1 for none."""
        used = np.unique(rows.documents)
        used = used[used >= 0].tolist()
        shown = [self.rules.document(rows.texts[i]) for i in used]
        keys = np.full(len(rows.texts) + 1, -1, np.int64)  # the last for "none", which is numbered -1
        keys[used] = [document_key(text) for text in shown]
        new = spill.unseen(keys[used])
        found = encoder.encode([shown[i] for i in new], self.rules.recipe.max_length)
        spill.add(keys[used][new], found.ids, found.cut.astype(np.uint8) * CUT + found.spelled * SPECIAL)
        if self.rules.recipe.repeated_negatives:
            return rows, numbers, keys[rows.documents]
        same = np.full(len(rows.texts) + 1, -1, np.int64)
        same[used] = spill.ids_hashes(keys[used])
        rows, kept = drop_same_ids(rows, same[rows.documents], self.source.kind in NEED_NEGATIVES, self.rules.recipe.policy == "strict")
        return rows, numbers[kept], keys[rows.documents]

    def _queries(
        self,
        rows: CleanRows,
        numbers: np.ndarray,
        keys: np.ndarray,
        split: str,
        encoder: TextEncoding,
        sinks: dict[str, "_RowSink"],
        rows_by_split: Counter[str],
        counts: Counter[str],
    ) -> None:
        """Writes the rows, each to its split or all to `split`, and counts them."""
        found = encoder.encode([self.rules.query(query) for query in rows.queries], self.rules.recipe.max_length)
        lengths = np.array([len(ids) for ids in found.ids], np.int32)
        by_query = np.array([self.rules.query_value(query) for query in rows.queries], np.uint64)
        passages = [rows.texts[passage] for passage in rows.documents[:, 0].tolist()]
        by_row = np.array(list(map(self.rules.row_value, rows.queries, passages)), np.uint64)
        values = by_query if self.rules.recipe.split_by == "query" else by_row
        splits = np.array([split or self.rules.split(value) for value in values.tolist()])
        for i, of_row in enumerate(splits.tolist()):
            sinks[of_row].write(records.encode_record(found.ids[i], keys[i], int(numbers[i]), rows.languages[i]))
        for of_rows, sink in sinks.items():
            mine = splits == of_rows
            sink.query_length.write(lengths[mine].tobytes())
            sink.documents.write(keys[mine].tobytes())
            sink.row_keys.write(np.stack([by_row[mine], by_query[mine]], axis=1).tobytes())
            if sink.scores:
                none = np.full(rows.documents.shape, np.nan, np.float32)
                sink.write_scores((none if rows.scores is None else rows.scores.astype(np.float32))[mine])
            rows_by_split[of_rows] += int(mine.sum())
        counts["query_tokens"] += int(lengths.sum())
        counts["warning: queries cut at --max-length"] += int(found.cut.sum())
        counts[SPELLED] += int(found.spelled.sum())


class WriteDocuments(beam.DoFn):
    """From `(bucket, paths)` to the shard `part-<bucket>.corpus`, and in `work` `corpus-<bucket>.npz` with keys,
    lengths and marks (`CUT`, `SPECIAL`)."""

    def __init__(self, shards: str, work: str):
        self.shards, self.work = epath.Path(shards), epath.Path(work)

    def process(self, element: tuple[int, Iterable[str]]) -> Iterator[None]:
        bucket, paths = element
        spilled = [read_arrays(path) for path in sorted(paths)]
        lengths = np.concatenate([arrays["lengths"] for arrays in spilled])
        tokens = np.concatenate([arrays["tokens"] for arrays in spilled])
        marks = np.concatenate([arrays["marks"] for arrays in spilled])
        keys, first = np.unique(np.concatenate([arrays["keys"] for arrays in spilled]), return_index=True)
        del spilled
        ends = np.cumsum(lengths)
        digest = xxhash.xxh3_128()
        with record_file(self.shards / shard_name(bucket, records.CORPUS)) as writer:
            for key, end, length in zip(keys.tolist(), ends[first].tolist(), lengths[first].tolist(), strict=True):
                record = records.encode_record(tokens[end - length : end], np.array([key], np.int64), -1, "")
                digest.update(record)
                writer.write(record)
        arrays = {"keys": keys, "lengths": lengths[first].astype(np.int32), "marks": marks[first], "digest": np.array(digest.hexdigest())}
        write_arrays(self.work / f"corpus-{bucket:05d}.npz", arrays)
        yield from ()


def bucket_count(source: Source) -> int:
    """Shards of the corpus: a function of the source alone, so that every worker knows it."""
    return -(-(source.rows + source.held_out) * (1 + source.negatives) // BUCKET_TEXTS)


def shard_name(index: int, split: str) -> str:
    """Name of a shard before all shards of its split are known."""
    return f"part-{index:05d}.{split}"


@contextlib.contextmanager
def record_file(path: epath.Path) -> Iterator[array_record_module.ArrayRecordWriter]:
    """A writer of an ArrayRecord file. It writes local files only, so one for an object store is copied there afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        remote = is_remote(path)
        local = epath.Path(folder) / path.name if remote else path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        writer = array_record_module.ArrayRecordWriter(str(local), WRITER_OPTIONS)
        try:
            yield writer
        finally:
            writer.close()
        if not remote:
            local.replace(path)
            return
        with local.open("rb") as source, new_file(path) as target:
            shutil.copyfileobj(source, target)


class _Spill:
    """Documents of one part on their way to the buckets."""

    def __init__(self, work: epath.Path, part: int, buckets: int):
        self._work, self._part, self._buckets = work, part, buckets
        self._seen: dict[int, int] = {}  # from key to a hash of the token ids
        self._keys: list[np.ndarray] = []
        self._marks: list[np.ndarray] = []
        self._encoded: list[np.ndarray] = []
        self._flushes = 0
        self.tokens = 0

    def unseen(self, keys: np.ndarray) -> list[int]:
        """Which of `keys` are new, and have to be added."""
        if len(self._seen) > SEEN_KEYS:
            self._seen.clear()
        return [i for i, key in enumerate(keys.tolist()) if key not in self._seen]

    def add(self, keys: np.ndarray, encoded: list[np.ndarray], marks: np.ndarray) -> None:
        self._seen.update(zip(keys.tolist(), (hash(ids.tobytes()) for ids in encoded), strict=True))
        self._keys.append(keys)
        self._marks.append(marks)
        self._encoded += encoded
        self.tokens += sum(map(len, encoded))

    def ids_hashes(self, keys: np.ndarray) -> list[int]:
        """For each document that has been added a number, equal where token ids are; good within this process only."""
        return [self._seen[key] >> 1 & MAX_HASH for key in keys.tolist()]

    def flush(self) -> Iterator[tuple[int, str]]:
        """Writes what is held, one file a bucket; yields bucket and path."""
        if not self._encoded:
            return
        keys, marks = np.concatenate(self._keys), np.concatenate(self._marks)
        owners = ((keys >> 32) * self._buckets) >> 31  # keys have 63 bits: bucket b holds the b-th of equal ranges
        for bucket in np.unique(owners).tolist():
            mine = np.flatnonzero(owners == bucket).tolist()
            encoded = [self._encoded[i] for i in mine]
            path = self._work / f"spill-{bucket:05d}-{self._part:05d}-{self._flushes:05d}.npz"
            lengths = np.array([len(ids) for ids in encoded])
            write_arrays(path, {"keys": keys[mine], "lengths": lengths, "tokens": np.concatenate(encoded), "marks": marks[mine]})
            yield bucket, str(path)
        self._keys, self._marks, self._encoded, self.tokens, self._flushes = [], [], [], 0, self._flushes + 1


@dataclasses.dataclass(frozen=True)
class _RowSink:
    """Where the rows of one split of a part go: records, query lengths (int32), document keys (int64), hashes of row and query (uint64),
    scores (float32), where the source has any."""

    records: array_record_module.ArrayRecordWriter
    query_length: IO[bytes]
    documents: IO[bytes]
    row_keys: IO[bytes]
    scores: IO[bytes] | None
    digest: xxhash.xxh3_128 = dataclasses.field(default_factory=xxhash.xxh3_128)  # of all records
    scored: xxhash.xxh3_128 = dataclasses.field(default_factory=xxhash.xxh3_128)  # of all scores

    def write(self, record: bytes) -> None:
        self.digest.update(record)
        self.records.write(record)

    def write_scores(self, scores: np.ndarray) -> None:
        assert self.scores
        self.scored.update(scores.tobytes())
        self.scores.write(scores.tobytes())


@contextlib.contextmanager
def _row_sink(shards: epath.Path, work: epath.Path, index: int, split: str, scored: bool) -> Iterator["_RowSink"]:
    name = shard_name(index, split)
    with (
        record_file(shards / name) as writer,
        new_file(work / f"{name}.query_length") as query_length,
        new_file(work / f"{name}.documents") as documents,
        new_file(work / f"{name}.row_keys") as row_keys,
        new_file(work / f"{name}.scores") if scored else contextlib.nullcontext() as scores,
    ):
        yield _RowSink(writer, query_length, documents, row_keys, scores)
