"""The vectors and the nearest documents of a pool, on disk.

Both are in files that are whole or absent and named by what they depend on, so a killed run resumes where it stopped, and the
processes of several hosts take the files in turn.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from etils import epath

from f2llm_jax.errors import UserError
from f2llm_jax.inference.devices import all_here
from f2llm_jax.mining.nearest import BLOCK_DOCUMENTS, NONE, nearest
from f2llm_jax.mining.pool import Pool
from f2llm_jax.mining.vectors import SHARD_TEXTS, ShardedVectors, VectorShard
from f2llm_jax.storage.arrays import read_arrays, write_arrays

QUERY_SHARDS = 2  # of vectors, searched with at once: what a killed search loses, and how seldom the documents are read again

StageCallback = Callable[[str, int, int], None]  # (what is done, how much of it, of how much in all)


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """The nearest documents of every query, which are none of its positives, in files of consecutive queries.

    Attributes:
      folder: of the files.
      keys: their names.
      step: queries a file.
    """

    folder: epath.Path
    keys: list[str]
    step: int

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores float32 and documents int32 `[queries, k]` of a file, nearest first; -inf and -1 where there are fewer."""
        path = self.folder / f"{self.keys[number]}.npz"
        arrays = read_arrays(path)
        if str(arrays.get("key")) != self.keys[number]:
            raise UserError(f"{path} holds the neighbours of other queries; delete it and run the same command again")
        return arrays["scores"], arrays["index"]


@dataclasses.dataclass(frozen=True)
class Searched:
    """A pool whose vectors and neighbours are on disk."""

    pool: Pool
    store: ShardedVectors
    documents: list[VectorShard]
    queries: list[VectorShard]
    neighbours: Neighbours


def search(pool: Pool, store: ShardedVectors, folder: epath.Path, k: int, mesh: jax.sharding.Mesh, report: StageCallback) -> Searched:
    """Fills the store with a pool's vectors and `folder` with the neighbours of its queries, as far as they are missing.

    Args:
      pool: queries and documents.
      store: of the model's vectors.
      folder: of the neighbours; may be shared by runs of any kind.
      k: neighbours a query.
      mesh: of this process's devices.
      report: called with what is done.

    Raises:
      UserError: a vector is not finite.
    """
    documents, queries = store.shards(pool.documents), store.shards(pool.queries)
    for name, texts, shards in (("encode documents", pool.documents, documents), ("encode queries", pool.queries, queries)):
        mine = shards[jax.process_index() :: jax.process_count()]
        done = 0
        for shard in mine:
            if not store.exists(shard):
                store.encode(shard, texts)
            done += shard.stop - shard.start
            report(name, done, sum(shard.stop - shard.start for shard in mine))
    all_here("vectors")
    k = min(k, len(pool.documents))
    found = Searched(pool, store, documents, queries, _names(pool, folder, documents, queries, k))
    _search(found, k, mesh, report)
    all_here("neighbours")
    return found


def _names(pool: Pool, folder: epath.Path, documents: Sequence[VectorShard], queries: Sequence[VectorShard], k: int) -> Neighbours:
    keys = []
    for start in range(0, len(queries), QUERY_SHARDS):
        mine = queries[start : start + QUERY_SHARDS]
        made_of = [[shard.key for shard in documents], [shard.key for shard in mine], k]
        digest = hashlib.sha256(json.dumps(made_of).encode())
        digest.update(_rectangle(pool.excluded[mine[0].start : mine[-1].stop]).tobytes())
        keys.append(digest.hexdigest()[:32])
    return Neighbours(folder, keys, QUERY_SHARDS * SHARD_TEXTS)


def _search(found: Searched, k: int, mesh: jax.sharding.Mesh, report: StageCallback) -> None:
    """This process's files of neighbours."""
    mine = range(jax.process_index(), len(found.neighbours.keys), jax.process_count())
    total = len(mine) * len(found.pool.documents)
    for turn, number in enumerate(mine):
        path = found.neighbours.folder / f"{found.neighbours.keys[number]}.npz"
        if not path.exists():
            shards = found.queries[number * QUERY_SHARDS : (number + 1) * QUERY_SHARDS]
            excluded = _rectangle(found.pool.excluded[shards[0].start : shards[-1].stop])
            blocks = found.store.blocks(found.documents, BLOCK_DOCUMENTS)
            done = turn * len(found.pool.documents)
            scores, index = nearest(found.store.read(shards), _counted(blocks, done, total, report), k, excluded, mesh)
            write_arrays(path, {"key": np.array(found.neighbours.keys[number]), "scores": scores, "index": index})
        report("search", (turn + 1) * len(found.pool.documents), total)


def _counted(blocks: Iterator[np.ndarray], done: int, total: int, report: StageCallback) -> Iterator[np.ndarray]:
    for block in blocks:
        yield block
        done += len(block)
        report("search", done, total)


def _rectangle(lists: Sequence[np.ndarray]) -> np.ndarray:
    """int32 `[lists, longest]`, -1 behind the shorter ones; the width is a power of two, so that few programs serve all."""
    longest = max(map(len, lists))
    rows = np.full((len(lists), 1 << max(0, (longest - 1).bit_length())), NONE, np.int32)
    for row, values in zip(rows, lists, strict=True):
        row[: len(values)] = values
    return rows
