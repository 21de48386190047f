"""The exact k nearest documents of each query, in memory of a block of queries and a block of documents.

Documents stream over the devices in blocks, and each query keeps its k best so far there. The scores of a tile of queries
with a block are looked at through the maxima of groups of adjacent documents: what is among the k best lies in one of the k
groups of highest maximum, and only groups whose maximum beats the query's k-th best can change anything, which after the
first blocks are few. So scores are read once and sorted hardly at all, and the result is still exact.

Scores are float32 products at the highest precision. Of equal scores the document of lower index is nearer.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from f2llm_jax import sharding

# The sizes are those that were fastest on two cores (docs/log.md).
BLOCK_DOCUMENTS = 65_536  # what `blocks` should hold; with a tile of queries it bounds the scores in memory, 64 MiB
TILE_QUERIES = 256  # scored at once on a device
GROUP = 64  # adjacent documents seen through their maximum
FEW_GROUPS = (0, 8, 16, 32)  # groups merged where no query of a tile needs more
EACH = P(sharding.AXES)  # a part of the queries on each device
NONE = -1  # index of a neighbour that does not exist; its score is -inf


def nearest(
    queries: Float[np.ndarray, "B D"],
    blocks: Iterable[Float[np.ndarray, "N D"]],
    k: int,
    excluded: Int[np.ndarray, "B X"],
    mesh: jax.sharding.Mesh,
) -> tuple[Float[np.ndarray, "B K"], Int[np.ndarray, "B K"]]:
    """Scores float32 and indices int32 `[B, k]` of the nearest documents, nearest first; -inf and -1 where there are fewer.

    Args:
      queries: float16 or float32, finite.
      blocks: documents in order, float16 or float32, finite; all of one length but the last, which may be shorter.
      k: neighbours a query.
      excluded: int32, documents that are no neighbours of the query, -1 for none.
      mesh: queries are split over all its devices, documents are on each.
    """
    rows = _round_up(len(queries), TILE_QUERIES * mesh.size)
    each, everywhere = NamedSharding(mesh, EACH), NamedSharding(mesh, P())
    best = np.full((rows, k), -np.inf, np.float32), np.full((rows, k), NONE, np.int32)
    best, queries_and_excluded = jax.device_put((best, (_padded(queries, rows, 0), _padded(excluded, rows, NONE))), each)
    start, columns = 0, GROUP
    for block in blocks:
        columns = max(columns, _round_up(len(block), GROUP))
        on_device = jax.device_put(_padded(block, columns, 0), everywhere)
        best = _merge(mesh, best, *queries_and_excluded, on_device, jnp.int32(start), jnp.int32(len(block)))
        start += len(block)
    scores, index = (np.asarray(array)[: len(queries)] for array in best)
    return scores, index


def _round_up(count: int, unit: int) -> int:
    """`unit` times a power of two, at least `count`: few sizes, hence few compiled programs over many sources."""
    return unit << max(0, (-(-count // unit) - 1).bit_length())


def _padded(array: np.ndarray, rows: int, value: int) -> np.ndarray:
    return array if len(array) == rows else np.pad(array, ((0, rows - len(array)), (0, 0)), constant_values=value)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _merge(mesh: jax.sharding.Mesh, best, queries, excluded, block: Float[Array, "N D"], start: Int[Array, ""], count: Int[Array, ""]):
    """The best with a block more, whose first `count` documents are those from number `start` on."""
    specs = (EACH, EACH, EACH, P(), P(), P())
    return jax.shard_map(_merge_part, mesh=mesh, in_specs=specs, out_specs=EACH)(best, queries, excluded, block, start, count)


def _merge_part(best, queries, excluded, block, start, count):
    """The same for the queries of one device, tile by tile."""
    block = block.astype(jnp.float32)
    tiles = jax.tree.map(lambda x: x.reshape(-1, TILE_QUERIES, x.shape[1]), (best, queries, excluded))

    def merge(tile):
        best, queries, excluded = tile
        scores = jnp.einsum("qd,nd->qn", queries.astype(jnp.float32), block, precision="highest")
        scores = jnp.where(jnp.arange(len(block)) < count, scores, -jnp.inf)
        outside = jnp.where((excluded >= start) & (excluded < start + count), excluded - start, len(block))
        scores = scores.at[jnp.arange(TILE_QUERIES)[:, None], outside].set(-jnp.inf, mode="drop")
        return _merge_scores(best, scores, start)

    return jax.tree.map(lambda x: x.reshape(-1, x.shape[2]), jax.lax.map(merge, tiles))


def _merge_scores(best: tuple[Float[Array, "T K"], Int[Array, "T K"]], scores: Float[Array, "T N"], start: Int[Array, ""]):
    """The k best of `best` and `scores`, whose columns are the documents from `start` on, all later than those of `best`."""
    k, groups = best[0].shape[1], scores.shape[1] // GROUP
    grouped = scores.reshape(len(scores), groups, GROUP)
    maxima = grouped.max(axis=2)
    needed = jnp.max(jnp.sum(maxima > best[0][:, -1:], axis=1))
    most = min(k, groups)
    ladder = [*(few for few in FEW_GROUPS if few < most), most]

    def merge_groups(number: int):
        if not number:
            return best
        # In order of document, so that of equal scores `top_k`, which takes the first, takes the lowest index.
        chosen = jnp.sort(jax.lax.top_k(maxima, number)[1], axis=1)
        members = jnp.take_along_axis(grouped, chosen[:, :, None], axis=1).reshape(len(scores), number * GROUP)
        index = (start + chosen[:, :, None] * GROUP + jnp.arange(GROUP, dtype=jnp.int32)).reshape(len(scores), number * GROUP)
        narrow = min(2 * number, k)  # sorting few into the best is much cheaper than sorting all members into them
        few = jnp.max(jnp.sum(members > best[0][:, -1:], axis=1)) <= narrow
        fast = lambda: _best_of(*_together(best, _best_of(members, index, narrow)), k=k)  # noqa: E731
        return fast() if narrow == k else jax.lax.cond(few, fast, lambda: _best_of(*_together(best, (members, index)), k=k))

    rung = jnp.searchsorted(jnp.array(ladder), jnp.minimum(needed, most))
    return jax.lax.switch(rung, [functools.partial(merge_groups, number) for number in ladder])


def _together(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    return jnp.concatenate([first[0], second[0]], axis=1), jnp.concatenate([first[1], second[1]], axis=1)


def _best_of(scores: Float[Array, "T N"], index: Int[Array, "T N"], k: int) -> tuple[Float[Array, "T K"], Int[Array, "T K"]]:
    """The k best scores and their indices; of equal scores those that stand first."""
    scores, at = jax.lax.top_k(scores, k)
    return scores, jnp.where(jnp.isneginf(scores), NONE, jnp.take_along_axis(index, at, axis=1))
