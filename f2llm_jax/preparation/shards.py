"""What a Beam worker does: parts of a source into record files, and documents into the shards of the corpus.

Beam carries names of files, not records: a record that passes through Beam's shuffle costs more than tokenising it (measured:
docs/log.md), and the in-process runner would hold all of them in memory. So a worker writes the rows of a part as one
shard, in order, and spills the documents it meets, tokenised, into buckets by range of their key. A bucket is then sorted,
freed of repeats and written as one shard of the corpus, which is sorted over all shards because buckets are ranges.

A worker may run twice, or be killed: every file is written under another name first, and its content is the same each time.
"""

import contextlib
import dataclasses
import functools
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
from f2llm_jax.files import is_remote, new_file, read_arrays, write_arrays, write_json
from f2llm_jax.preparation.selection import Rows, Rules, choose_rows, document_key, read_rows
from f2llm_jax.preparation.sources import Part, Source
from f2llm_jax.text import Tokenizer, load_tokenizer

BUCKET_TEXTS = 500_000  # of a source, repeats included, that one bucket takes
SPILL_TOKENS = 4_000_000  # held by a worker before it writes them to the buckets
SEEN_KEYS = 500_000  # documents a worker remembers to have spilled; a repeat that it forgot is dropped by the bucket
WRITER_OPTIONS = "group_size:1"  # records are read singly, in random order


class WriteRows(beam.DoFn):
    """From `(index, Part)` to the shards `part-<index>.<split>`, and `(bucket, path)` of the documents that were spilled.

    Beside them, in `work`: `part-<index>.json` with counts, and the tables of each split, `part-<index>.<split>.query_length`
    (int32 [rows]) and `.documents` (int64 [rows, 1 + n], keys).
    """

    def __init__(self, source: Source, rules: Rules, tokenizer: str, shards: str, work: str):
        self.source, self.rules, self.tokenizer = source, rules, tokenizer
        self.shards, self.work = epath.Path(shards), epath.Path(work)

    def process(self, element: tuple[int, Part]) -> Iterator[tuple[int, str]]:
        index, part = element
        tokenizer, recipe = _tokenizer(self.tokenizer), self.rules.recipe
        spill = _Spill(self.work, index, bucket_count(self.source))
        counts, rows_by_split, languages = Counter(), Counter(), Counter()
        with contextlib.ExitStack() as stack:
            sinks = {split: stack.enter_context(_row_sink(self.shards, self.work, index, split)) for split in records.QUERY_SPLITS}
            for rows in read_rows(self.source, part, recipe, choose_rows(self.source, recipe)):
                counts.update(rows.counters)
                languages.update(rows.languages)
                keys = self._documents(rows, tokenizer, spill)
                lengths = self._queries(rows, keys, tokenizer, sinks, rows_by_split)
                counts["query_tokens"] += int(lengths.sum())
                if spill.tokens > SPILL_TOKENS:
                    yield from spill.flush()
            yield from spill.flush()
            # By its presence the part is whole: it is written after the files it speaks of.
            digests = {split: sink.digest.hexdigest() for split, sink in sinks.items()}
        content = {"rows": rows_by_split, "languages": languages, "counters": counts, "digests": digests}
        write_json(self.work / f"part-{index:05d}.json", content, sealed=True)

    def _documents(self, rows: Rows, tokenizer: Tokenizer, spill: "_Spill") -> np.ndarray:
        """Spills the documents not met yet; keys int64 `[rows, 1 + n]` of all, -1 for none."""
        used = np.unique(rows.documents)
        used = used[used >= 0].tolist()
        shown = [self.rules.document(rows.texts[i]) for i in used]
        keys = np.full(len(rows.texts) + 1, -1, np.int64)  # the last for "none", which is numbered -1
        keys[used] = [document_key(text) for text in shown]
        new = spill.unseen(keys[used])
        spill.add(keys[used][new], tokenizer.encode([shown[i] for i in new], self.rules.recipe.max_length))
        return keys[rows.documents]

    def _queries(self, rows: Rows, keys: np.ndarray, tokenizer: Tokenizer, sinks: dict[str, "_RowSink"], counts: Counter) -> np.ndarray:
        """Writes the rows, each to its split; token counts int32 `[rows]`."""
        encoded = tokenizer.encode([self.rules.query(query) for query in rows.queries], self.rules.recipe.max_length)
        lengths = np.array([len(tokens) for tokens in encoded], np.int32)
        splits = np.array(
            [
                self.rules.split(number, query, rows.texts[passage])
                for number, query, passage in zip(rows.numbers.tolist(), rows.queries, rows.documents[:, 0].tolist(), strict=True)
            ]
        )
        for i, split in enumerate(splits.tolist()):
            sinks[split].write(records.encode_record(encoded[i], keys[i], int(rows.numbers[i]), rows.languages[i]))
        for split, sink in sinks.items():
            mine = splits == split
            sink.query_length.write(lengths[mine].tobytes())
            sink.documents.write(keys[mine].tobytes())
            counts[split] += int(mine.sum())
        return lengths


class WriteDocuments(beam.DoFn):
    """From `(bucket, paths)` to the shard `part-<bucket>.corpus`, and in `work` `corpus-<bucket>.npz` with keys and lengths."""

    def __init__(self, shards: str, work: str):
        self.shards, self.work = epath.Path(shards), epath.Path(work)

    def process(self, element: tuple[int, Iterable[str]]) -> Iterator[None]:
        bucket, paths = element
        spilled = [read_arrays(path) for path in sorted(paths)]
        lengths = np.concatenate([arrays["lengths"] for arrays in spilled])
        tokens = np.concatenate([arrays["tokens"] for arrays in spilled])
        keys, first = np.unique(np.concatenate([arrays["keys"] for arrays in spilled]), return_index=True)
        del spilled
        ends = np.cumsum(lengths)
        digest = xxhash.xxh3_128()
        with record_file(self.shards / shard_name(bucket, records.CORPUS)) as writer:
            for key, end, length in zip(keys.tolist(), ends[first].tolist(), lengths[first].tolist(), strict=True):
                record = records.encode_record(tokens[end - length : end], np.array([key], np.int64), -1, "")
                digest.update(record)
                writer.write(record)
        arrays = {"keys": keys, "lengths": lengths[first].astype(np.int32), "digest": np.array(digest.hexdigest())}
        write_arrays(self.work / f"corpus-{bucket:05d}.npz", arrays)
        yield from ()


def bucket_count(source: Source) -> int:
    """Shards of the corpus: a function of the source alone, so that every worker knows it."""
    return -(-source.rows * (1 + source.negatives) // BUCKET_TEXTS)


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
        self._seen: set[int] = set()
        self._keys: list[np.ndarray] = []
        self._encoded: list[np.ndarray] = []
        self._flushes = 0
        self.tokens = 0

    def unseen(self, keys: np.ndarray) -> list[int]:
        """Which of `keys` are new; they count as seen from now on."""
        if len(self._seen) > SEEN_KEYS:
            self._seen.clear()
        new = [i for i, key in enumerate(keys.tolist()) if key not in self._seen]
        self._seen.update(keys[new].tolist())
        return new

    def add(self, keys: np.ndarray, encoded: list[np.ndarray]) -> None:
        self._keys.append(keys)
        self._encoded += encoded
        self.tokens += sum(map(len, encoded))

    def flush(self) -> Iterator[tuple[int, str]]:
        """Writes what is held, one file a bucket; yields bucket and path."""
        if not self._encoded:
            return
        keys = np.concatenate(self._keys)
        owners = ((keys >> 32) * self._buckets) >> 31  # keys have 63 bits: bucket b holds the b-th of equal ranges
        for bucket in np.unique(owners).tolist():
            mine = np.flatnonzero(owners == bucket).tolist()
            encoded = [self._encoded[i] for i in mine]
            path = self._work / f"spill-{bucket:05d}-{self._part:05d}-{self._flushes:05d}.npz"
            lengths = np.array([len(ids) for ids in encoded])
            write_arrays(path, {"keys": keys[mine], "lengths": lengths, "tokens": np.concatenate(encoded)})
            yield bucket, str(path)
        self._keys, self._encoded, self.tokens, self._flushes = [], [], 0, self._flushes + 1


@dataclasses.dataclass(frozen=True)
class _RowSink:
    """Where the rows of one split of a part go: records, query lengths (int32), document keys (int64)."""

    records: array_record_module.ArrayRecordWriter
    query_length: IO[bytes]
    documents: IO[bytes]
    digest: xxhash.xxh3_128 = dataclasses.field(default_factory=xxhash.xxh3_128)  # of all records

    def write(self, record: bytes) -> None:
        self.digest.update(record)
        self.records.write(record)


@contextlib.contextmanager
def _row_sink(shards: epath.Path, work: epath.Path, index: int, split: str) -> Iterator["_RowSink"]:
    name = shard_name(index, split)
    with (
        record_file(shards / name) as writer,
        new_file(work / f"{name}.query_length") as query_length,
        new_file(work / f"{name}.documents") as documents,
    ):
        yield _RowSink(writer, query_length, documents)


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: str) -> Tokenizer:
    """One tokenizer a process: a vocabulary of 150,000 takes longer to load than a small source to encode."""
    return load_tokenizer(folder)
