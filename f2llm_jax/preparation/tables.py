"""The tables of a source, from what its workers left; see `records` for what they hold.

Memory: the documents of one bucket and `STREAMED_ROWS` rows; the keys of a whole source are looked up in a mapped file.
"""

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import IO

import numpy as np
import xxhash
from etils import epath

from f2llm_jax.data import records
from f2llm_jax.preparation.shards import CUT, SPECIAL, SPELLED, shard_name
from f2llm_jax.preparation.sources import Source
from f2llm_jax.storage.arrays import new_array, read_array, read_arrays, write_array
from f2llm_jax.storage.files import read_json, write_json

STREAMED_ROWS = 65_536


def shard_counts(work: epath.Path, parts: int) -> dict[str, dict[int, int]]:
    """Records of each shard by its index, for each split, from what the workers of `parts` parts wrote to `work`."""
    rows = [_part(work, index)["rows"] for index in range(parts)]
    counts = {split: {index: found.get(split, 0) for index, found in enumerate(rows)} for split in records.QUERY_SPLITS}
    return counts | {records.CORPUS: {bucket: len(arrays["keys"]) for bucket, arrays in _buckets(work)}}


def write_tables(folder: epath.PathLike, work: epath.Path, source: Source) -> records.SourceInfo:
    """Writes the tables of a source, then source.json, which declares the source complete.

    Raises:
      DatasetError: a row points at a document that no worker wrote.
    """
    target = records.tables_folder(epath.Path(folder), source.name)
    target.mkdir(parents=True, exist_ok=True)
    counts = shard_counts(work, len(source.parts))
    with tempfile.TemporaryFile() as file:
        document_tokens = _write_corpus(work, target, sum(counts[records.CORPUS].values()), file)
        keys = np.memmap(file, np.int64, "r")
        for split in records.QUERY_SPLITS:
            _stream(work, counts[split], split, "query_length", np.int32, (), target, lambda values: values)
            width = (1 + source.negatives,)
            _stream(work, counts[split], split, "documents", np.int64, width, target, lambda found: _positions(keys, found))
            if source.scored:
                _stream(work, counts[split], split, "scores", np.float32, width, target, lambda values: values, np.float32)
    keys_of_rows = {split: _row_keys(work, counts[split], split) for split in records.QUERY_SPLITS}
    for split, row_keys in keys_of_rows.items():
        name = f"{split}.query_ids"
        _, numbers = np.unique(row_keys[:, 1], return_inverse=True)
        write_array(target / f"{name}.npy", numbers.astype(np.int32), salt=f"{target.name}/{name}")
    counters: Counter[str] = Counter()
    languages: Counter[str] = Counter()
    scored = [records.SCORES[split] for split in records.QUERY_SPLITS if source.scored]
    digests = {split: xxhash.xxh3_128() for split in (*records.SPLITS, *scored)}
    for _, arrays in _buckets(work):
        digests[records.CORPUS].update(str(arrays["digest"]).encode())
    for index in range(len(source.parts)):
        part = _part(work, index)
        for split, digest in part["digests"].items():
            digests[split].update(digest.encode())
        counters.update(part["counters"])
        languages.update(part["languages"])
    counters.update(_warnings(work, target, keys_of_rows))
    del languages[""]
    info = records.SourceInfo(
        name=source.name,
        kind=source.kind,
        unit=source.unit,
        languages=dict(sorted(languages.items())),
        rows={split: sum(counts[split].values()) for split in records.QUERY_SPLITS},
        documents=sum(counts[records.CORPUS].values()),
        negatives=source.negatives,
        tokens={"queries": counters.pop("query_tokens"), "documents": document_tokens},
        counters={reason: count for reason, count in sorted(counters.items()) if count},
        digests={split: digest.hexdigest() for split, digest in digests.items()},
        query_ids=True,
    )
    write_json(target / "source.json", dataclasses.asdict(info), sealed=True)
    return info


def _warnings(work: epath.Path, target: epath.Path, keys: Mapping[str, np.ndarray]) -> Counter[str]:
    """What is remarkable in the rows of a source together, from their keys by split and its tables, and in its documents."""
    rows = np.concatenate([of_split[:, 0] for of_split in keys.values()])
    train, held_out = (keys[split][:, 1] for split in records.QUERY_SPLITS)
    found = Counter({"warning: rows that repeat an earlier one": len(rows) - len(np.unique(rows))})
    found["warning: rows with a negative that is a positive of their query in another row"] = _contradictions(target, keys)
    found["warning: held-out rows whose query is also trained on"] = int(np.isin(held_out, train).sum())
    for _, arrays in _buckets(work):
        found["warning: documents cut at --max-length"] += int((arrays["marks"] & CUT > 0).sum())
        found[SPELLED] += int((arrays["marks"] & SPECIAL > 0).sum())
    return +found


def _contradictions(target: epath.Path, keys: Mapping[str, np.ndarray]) -> int:
    """Rows with a negative that another row of the same query has as its positive."""
    splits = [split for split, of_split in keys.items() if len(of_split)]
    documents = {split: read_array(target / f"{split}.documents.npy", salt=f"{target.name}/{split}.documents") for split in splits}
    _, number, count = np.unique(np.concatenate([keys[split][:, 1] for split in splits]), return_inverse=True, return_counts=True)
    first, width, found = 0, 1 + max(int(table.max()) for table in documents.values()), 0
    positives = np.concatenate([table[:, 0] for table in documents.values()]).astype(np.int64)
    known = np.unique((number * width + positives)[count[number] > 1])
    for table in documents.values():
        again = np.flatnonzero(count[number[first : first + len(table)]] > 1)
        for rows in np.array_split(again, -(-len(again) // STREAMED_ROWS) or 1):
            negatives = table[rows, 1:].astype(np.int64)
            of_query = number[first + rows][:, None] * width + negatives
            found += int(((negatives >= 0) & np.isin(of_query, known)).any(axis=1).sum())
        first += len(table)
    return found


def _row_keys(work: epath.Path, counts: Mapping[int, int], split: str) -> np.ndarray:
    """uint64 `[rows, 2]`, hashes of row and query."""
    parts = [np.frombuffer((work / f"{shard_name(index, split)}.row_keys").read_bytes(), np.uint64) for index in sorted(counts)]
    return np.concatenate(parts).reshape(-1, 2)


def _part(work: epath.Path, index: int) -> dict:
    return read_json(work / f"part-{index:05d}.json", sealed=True)


def _buckets(work: epath.Path) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Index of each bucket, and keys, lengths, marks and digest of its documents, in order."""
    for path in sorted(work.glob("corpus-*.npz")):
        yield int(path.stem.removeprefix("corpus-")), read_arrays(path)


def _write_corpus(work: epath.Path, target: epath.Path, documents: int, keys_file: IO[bytes]) -> int:
    """Writes the lengths table of the corpus, and its ascending keys to `keys_file`; returns the tokens of all documents."""
    tokens = 0
    name = f"{records.CORPUS}.length"
    with new_array(target / f"{name}.npy", np.int32, (documents,), salt=f"{target.name}/{name}") as file:
        for _, arrays in _buckets(work):
            file.write(arrays["lengths"])
            keys_file.write(arrays["keys"].astype(np.int64).tobytes())
            tokens += int(arrays["lengths"].sum(dtype=np.int64))
    keys_file.flush()
    return tokens


def _stream(work, counts, split, table, dtype, width, target, convert, stored=np.int32) -> None:
    """Joins one table of all parts to a `.npy` file of `stored`, `STREAMED_ROWS` rows at a time."""
    size = int(np.prod(width, dtype=int)) * np.dtype(dtype).itemsize
    name = f"{split}.{table}"
    with new_array(target / f"{name}.npy", stored, (sum(counts.values()), *width), salt=f"{target.name}/{name}") as joined:
        for index in sorted(counts):
            with (work / f"{shard_name(index, split)}.{table}").open("rb") as file:
                while block := file.read(STREAMED_ROWS * size):
                    joined.write(convert(np.frombuffer(block, dtype).reshape(-1, *width)))


def _positions(corpus: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Ranks of `keys` among the sorted keys of the corpus; -1 stays."""
    positions = np.minimum(np.searchsorted(corpus, keys), len(corpus) - 1)
    if not np.array_equal(corpus[positions][keys >= 0], keys[keys >= 0]):
        raise records.DatasetError("a row points at a document that is not in the corpus; delete the folder and prepare again")
    return np.where(keys < 0, -1, positions)
