"""Unit vectors of a pool's texts, in shards of consecutive texts (see `f2llm_jax.storage.vectors`).

A shard is named by its texts, so runs over the same texts share it. It is encoded by itself: its vectors do not depend on how shards
are dealt out over processes.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
from etils import epath
from jaxtyping import Float, Int

from f2llm_jax.inference.encode import TextEncoder, truncate_and_normalize
from f2llm_jax.storage.vectors import VectorStore, texts_digest
from f2llm_jax.weights.digest import model_digest
from f2llm_jax.weights.models import LoadableModel

SHARD_TEXTS = 8192


@dataclasses.dataclass(frozen=True)
class VectorShard:
    """Texts `start <= text < stop` of a list."""

    key: str  # of everything that its vectors depend on
    name: str  # in the store
    start: int
    stop: int


class ShardedVectors:
    """Vectors of lists of texts, by one model under one set of options."""

    def __init__(self, folder: epath.PathLike, made_by: dict[str, object], width: int, dtype: str, load: Callable[[], TextEncoder]):
        """Reads and encodes nothing yet.

        Args:
          folder: of the store, made where there is none; may be shared by runs of any kind.
          made_by: what vectors depend on besides their texts, see `made_by`.
          width: D.
          dtype: on disk, see `VectorStore`.
          load: makes the encoder; called when the first shard is missing.
        """
        self._store = VectorStore(folder, made_by, width, dtype)
        self._load = load
        self._encoder: TextEncoder | None = None

    def shards(self, texts: pa.LargeStringArray) -> list[VectorShard]:
        """The shards of a list of texts, in order, whether they exist or not."""
        starts = range(0, len(texts), SHARD_TEXTS)
        names = [texts_digest(texts[a : a + SHARD_TEXTS].to_pylist()) for a in starts]
        return [
            VectorShard(f"{self._store.digest}/{name}", name, a, min(a + SHARD_TEXTS, len(texts)))
            for a, name in zip(starts, names, strict=True)
        ]

    def exists(self, shard: VectorShard) -> bool:
        return self._store.exists(shard.name)

    def encode(self, shard: VectorShard, texts: pa.LargeStringArray) -> None:
        """Encodes and writes a shard of `texts`.

        Raises:
          UserError: a vector is not finite.
        """
        self._encoder = self._encoder or self._load()
        raw = self._encoder.encode(texts[shard.start : shard.stop].to_pylist())
        self._store.write(shard.name, truncate_and_normalize(raw, raw.shape[1]))

    def read(self, shards: Sequence[VectorShard]) -> Float[np.ndarray, "N D"]:
        """The vectors of consecutive shards, as stored."""
        vectors = np.empty((shards[-1].stop - shards[0].start, self._store.width), self._store.dtype)
        for shard in shards:
            vectors[shard.start - shards[0].start : shard.stop - shards[0].start] = self._open(shard)
        return vectors

    def blocks(self, shards: Sequence[VectorShard], texts: int) -> Iterator[Float[np.ndarray, "N D"]]:
        """All vectors in order, about `texts` at a time."""
        step = max(1, texts // SHARD_TEXTS)
        return (self.read(shards[i : i + step]) for i in range(0, len(shards), step))

    def take(self, shards: Sequence[VectorShard], numbers: Int[np.ndarray, " N"]) -> Float[np.ndarray, "N D"]:
        """The vectors of single texts, float32; `shards` are all shards of their list."""
        vectors = np.empty((len(numbers), self._store.width), np.float32)
        owners = numbers // SHARD_TEXTS
        for owner in np.unique(owners):
            mine = owners == owner
            vectors[mine] = self._open(shards[owner])[numbers[mine] - owner * SHARD_TEXTS]
        return vectors

    def _open(self, shard: VectorShard) -> Float[np.ndarray, "N D"]:
        return self._store.read(shard.name, shard.stop - shard.start)


def made_by(origin: LoadableModel, max_length: int, compute: str) -> dict[str, object]:
    """Everything that turns a text into a vector: digest of weights and tokenizer, text limit, dtype of computation.

    Equal for a checkpoint and its float32 release. Reads the weights once, block by block.
    """
    return {"model": model_digest(origin), "max_length": max_length, "compute": compute, "vectors": "unit"}
