"""The tables of a source, from what its workers left; see `records` for what they hold.

Memory: keys and lengths of the distinct documents (12 bytes each); everything a row has is streamed.
"""

import dataclasses
import json
from collections import Counter

import numpy as np
from etils import epath

from f2llm_jax.data import records
from f2llm_jax.data.shards import shard_name
from f2llm_jax.data.sources import Source

STREAMED_ROWS = 65_536


def shard_counts(work: epath.Path, parts: int) -> dict[str, dict[int, int]]:
    """Records of each shard by its index, for each split, from what the workers of `parts` parts wrote to `work`."""
    rows = [_part(work, index)["rows"] for index in range(parts)]
    counts = {split: {index: found.get(split, 0) for index, found in enumerate(rows)} for split in records.QUERY_SPLITS}
    return counts | {records.CORPUS: {bucket: len(keys) for bucket, (keys, _) in _buckets(work).items()}}


def write_tables(folder: epath.PathLike, work: epath.Path, source: Source) -> records.SourceInfo:
    """Writes the tables of a source, then source.json, which declares the source complete.

    Raises:
      DatasetError: a row points at a document that no worker wrote.
    """
    target = records.tables_folder(epath.Path(folder), source.name)
    target.mkdir(parents=True, exist_ok=True)
    buckets = _buckets(work)
    keys = np.concatenate([found for found, _ in buckets.values()])
    lengths = np.concatenate([found for _, found in buckets.values()])
    with (target / f"{records.CORPUS}.length.npy").open("wb") as file:
        np.save(file, lengths)
    counts = shard_counts(work, len(source.parts))
    for split in records.QUERY_SPLITS:
        _stream(work, counts[split], split, "query_length", np.int32, (), target, lambda values: values)
        _stream(work, counts[split], split, "documents", np.int64, (1 + source.negatives,), target, lambda found: _positions(keys, found))
    counters, languages = Counter(), Counter()
    for index in range(len(source.parts)):
        part = _part(work, index)
        counters.update(part["counters"])
        languages.update(part["languages"])
    del languages[""]
    info = records.SourceInfo(
        name=source.name,
        kind=source.kind,
        languages=dict(sorted(languages.items())),
        rows={split: sum(counts[split].values()) for split in records.QUERY_SPLITS},
        documents=len(keys),
        negatives=source.negatives,
        tokens={"queries": counters.pop("query_tokens"), "documents": int(lengths.sum(dtype=np.int64))},
        counters=dict(sorted(counters.items())),
    )
    records.write_json(target / "source.json", dataclasses.asdict(info))
    return info


def _part(work: epath.Path, index: int) -> dict:
    return json.loads((work / f"part-{index:05d}.json").read_text())


def _buckets(work: epath.Path) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Keys and lengths of the documents of each bucket, in order."""
    found = {}
    for path in sorted(work.glob("corpus-*.npz")):
        with path.open("rb") as file, np.load(file) as arrays:
            found[int(path.stem.removeprefix("corpus-"))] = arrays["keys"], arrays["lengths"]
    return found


def _stream(work, counts, split, table, dtype, width, target, convert) -> None:
    """Joins one table of all parts to a `.npy` file of int32, `STREAMED_ROWS` rows at a time."""
    size = int(np.prod(width, dtype=int)) * np.dtype(dtype).itemsize
    with (target / f"{split}.{table}.npy").open("wb") as joined:
        header = {"descr": "<i4", "fortran_order": False, "shape": (sum(counts.values()), *width)}
        np.lib.format.write_array_header_1_0(joined, header)
        for index in sorted(counts):
            with (work / f"{shard_name(index, split)}.{table}").open("rb") as file:
                while block := file.read(STREAMED_ROWS * size):
                    joined.write(convert(np.frombuffer(block, dtype).reshape(-1, *width)).astype(np.int32).tobytes())


def _positions(corpus: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Ranks of `keys` among the sorted keys of the corpus; -1 stays."""
    positions = np.minimum(np.searchsorted(corpus, keys), len(corpus) - 1)
    if not np.array_equal(corpus[positions][keys >= 0], keys[keys >= 0]):
        raise records.DatasetError("a row points at a document that is not in the corpus; delete the folder and prepare again")
    return np.where(keys < 0, -1, positions)
