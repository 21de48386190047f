"""Vectors of texts on disk, in shards that are whole or absent and are named by everything they depend on.

A store is a folder of files `KEY.npy`, each the unit vectors `[texts, D]` of up to `SHARD_TEXTS` consecutive texts. The key is
a digest of the model (weights, shape, tokenizer), the text limit, the dtypes and the texts themselves. So a shard is found
again as long as nothing that it says has changed, whichever run or host has written it, and an interrupted run loses
the shard it was at. A shard is encoded by itself: its vectors do not depend on how shards are dealt out.
"""

import dataclasses
import hashlib
import io
import json
import uuid
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
from etils import epath
from jaxtyping import Float, Int

from f2llm_jax.files import is_remote
from f2llm_jax.inference.encode import TextEncoder, truncate_and_normalize
from f2llm_jax.mining.errors import MiningError
from f2llm_jax.weights.digest import model_digest
from f2llm_jax.weights.models import LoadableModel

SHARD_TEXTS = 8192
DTYPES = ("float32", "float16")


@dataclasses.dataclass(frozen=True)
class Shard:
    """Texts `start <= text < stop` of a list, whose vectors are `KEY.npy`."""

    key: str
    start: int
    stop: int


class VectorStore:
    """Vectors of one model under one set of options."""

    def __init__(self, folder: epath.PathLike, made_by: Sequence[object], width: int, dtype: str, load: Callable[[], TextEncoder]):
        """Reads and encodes nothing yet.

        Args:
          folder: of the store, made where there is none; may be shared by runs of any kind.
          made_by: what vectors depend on besides their texts, see `made_by`.
          width: D.
          dtype: on disk, one of `DTYPES`. float16 halves the disk and rounds each component to 3 digits.
          load: makes the encoder; called when the first shard is missing.
        """
        self._folder, self._load, self._encoder = epath.Path(folder), load, None
        self._width, self._dtype = width, dtype
        self._salt = json.dumps([*made_by, dtype])

    def shards(self, texts: pa.LargeStringArray) -> list[Shard]:
        """The shards of a list of texts, in order, whether they exist or not."""
        starts = range(0, len(texts), SHARD_TEXTS)
        return [Shard(self._key(texts[a : a + SHARD_TEXTS]), a, min(a + SHARD_TEXTS, len(texts))) for a in starts]

    def exists(self, shard: Shard) -> bool:
        return self._path(shard).exists()

    def encode(self, shard: Shard, texts: pa.LargeStringArray) -> None:
        """Encodes and writes a shard of `texts`.

        Raises:
          MiningError: a vector is not finite.
        """
        self._encoder = self._encoder or self._load()
        raw = self._encoder.encode(texts[shard.start : shard.stop].to_pylist())
        if len(wrong := np.flatnonzero(~np.isfinite(raw).all(axis=1))):
            text = texts[shard.start + int(wrong[0])].as_py()
            raise MiningError(f"the model's vector of {text[:80]!r} is not finite; use --dtype float32, or check the model's weights")
        buffer = io.BytesIO()
        np.save(buffer, truncate_and_normalize(raw, raw.shape[1]).astype(self._dtype))
        write_whole(self._path(shard), buffer.getvalue())

    def read(self, shards: Sequence[Shard]) -> Float[np.ndarray, "N D"]:
        """The vectors of consecutive shards, as stored."""
        vectors = np.empty((shards[-1].stop - shards[0].start, self._width), self._dtype)
        for shard in shards:
            with self._path(shard).open("rb") as file:
                _skip_header(file)
                into = vectors[shard.start - shards[0].start : shard.stop - shards[0].start]
                into[:] = np.frombuffer(file.read(), self._dtype).reshape(into.shape)
        return vectors

    def blocks(self, shards: Sequence[Shard], texts: int) -> Iterator[Float[np.ndarray, "N D"]]:
        """All vectors in order, about `texts` at a time."""
        step = max(1, texts // SHARD_TEXTS)
        return (self.read(shards[i : i + step]) for i in range(0, len(shards), step))

    def take(self, shards: Sequence[Shard], numbers: Int[np.ndarray, "N"]) -> Float[np.ndarray, "N D"]:
        """The vectors of single texts, float32; `shards` are all shards of their list. Reads no other text of a local shard."""
        vectors = np.empty((len(numbers), self._width), np.float32)
        owners = numbers // SHARD_TEXTS
        for owner in np.unique(owners):
            path, mine = self._path(shards[owner]), owners == owner
            stored = np.load(path, mmap_mode="r") if not is_remote(path) else np.load(io.BytesIO(path.read_bytes()))
            vectors[mine] = stored[numbers[mine] - owner * SHARD_TEXTS]
        return vectors

    def _path(self, shard: Shard) -> epath.Path:
        return self._folder / f"{shard.key}.npy"

    def _key(self, texts: pa.LargeStringArray) -> str:
        digest = hashlib.sha256(self._salt.encode())
        for text in texts.to_pylist():
            encoded = text.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return digest.hexdigest()[:32]


def made_by(origin: LoadableModel, max_length: int, compute: str) -> list[object]:
    """Everything that turns a text into a vector: digest of weights and tokenizer, text limit, dtype of computation.

    Equal for a checkpoint and its float32 release. Reads the weights once, block by block.
    """
    return [model_digest(origin), max_length, compute]


def write_whole(path: epath.Path, data: bytes) -> None:
    """Writes beside, then renames; several hosts may write the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    partial.write_bytes(data)
    partial.replace(path)


def _skip_header(file) -> None:
    version = np.lib.format.read_magic(file)
    (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)
