"""Raw vectors of texts on disk, so that no evaluation encodes a text twice: not after a kill, not for another width or task.

A cache is a folder of folders, one for everything but the text that a vector depends on: model, prompt, compute dtype and text
limit. In it stand segments `ID.npy` (vectors, float32 `[S, D]`) with `ID.keys` (the digests of their texts), each complete before its
keys get their name. Segments have random names and are never changed, so several evaluations may write the same cache.
"""

import hashlib
import json
import uuid
from collections.abc import Sequence

import numpy as np
from etils import epath
from jaxtyping import Float

from f2llm_jax.errors import UserError
from f2llm_jax.files import is_remote
from f2llm_jax.inference.encode import ProgressCallback, TextEncoder

KEY_BYTES = 16


class VectorCacheError(UserError):
    """A cache that cannot be read; the message names the file to delete."""


class VectorCache:
    """The vectors of one model with one prompt, compute dtype and text limit. Every known key is in memory: about 150 bytes a text."""

    def __init__(self, root: epath.PathLike, width: int, *, model: str, prompt: str, dtype: str, max_length: int):
        """Opens the folder, made where there is none.

        Args:
          root: folder of all caches.
          width: D.
          model: digest of the model.
          prompt: before every text.
          dtype: compute dtype.
          max_length: tokens at which texts are cut.

        Raises:
          VectorCacheError: a segment is not what it should be.
        """
        facts = json.dumps({"model": model, "prompt": prompt, "dtype": dtype, "max_length": max_length}, ensure_ascii=False, indent=2)
        self._folder = epath.Path(root) / hashlib.sha256(facts.encode()).hexdigest()[:32]
        self._folder.mkdir(parents=True, exist_ok=True)
        _write(self._folder / "facts.json", (facts + "\n").encode())  # for people
        self._width = width
        self._segments: list[np.ndarray] = []
        self._place: dict[bytes, tuple[int, int]] = {}  # segment and row of each key
        for keys in sorted(self._folder.glob("*.keys")):
            self._open(keys.stem, keys.read_bytes())

    def missing(self, texts: Sequence[str]) -> list[str]:
        """The texts, each once, that have no vector yet."""
        return list({key: text for text in texts if (key := _key(text)) not in self._place}.values())

    def read(self, texts: Sequence[str], dim: int) -> Float[np.ndarray, "S K"]:
        """The first `dim` components of each text's vector, float32."""
        places = np.array([self._place[_key(text)] for text in texts], np.int64).reshape(-1, 2)
        vectors = np.empty((len(texts), dim), np.float32)
        for segment in np.unique(places[:, 0]):
            mine = np.flatnonzero(places[:, 0] == segment)
            vectors[mine] = self._segments[segment][places[mine, 1], :dim]
        return vectors

    def add(self, texts: Sequence[str], vectors: Float[np.ndarray, "S D"]) -> None:
        """Stores the vectors of texts."""
        name, keys = uuid.uuid4().hex, b"".join(map(_key, texts))
        partial = self._folder / f"{name}.npy.partial"
        with partial.open("wb") as file:
            np.save(file, np.asarray(vectors, np.float32))
        partial.replace(self._folder / f"{name}.npy")
        _write(self._folder / f"{name}.keys", keys)
        self._open(name, keys)

    def _open(self, name: str, keys: bytes) -> None:
        path = self._folder / f"{name}.npy"
        rows = len(keys) // KEY_BYTES
        try:
            vectors = np.load(path, mmap_mode="r") if not is_remote(path) else np.load(path.open("rb"))
        except (OSError, ValueError) as error:
            raise VectorCacheError(f"{path} is not readable ({error}); delete it and {name}.keys") from error
        if vectors.shape != (rows, self._width):
            raise VectorCacheError(f"{path} has the shape {vectors.shape}, not {(rows, self._width)}; delete it and {name}.keys")
        self._place |= {keys[KEY_BYTES * i : KEY_BYTES * (i + 1)]: (len(self._segments), i) for i in range(rows)}
        self._segments.append(vectors)


class CachedEncoder:
    """A text encoder that remembers."""

    def __init__(self, encoder: TextEncoder, root: epath.PathLike, *, model: str):
        """Encodes nothing yet.

        Args:
          encoder: of the model.
          root: folder of caches.
          model: digest of the model (`model.digest`).
        """
        self.width, self.encoded = encoder.width, 0  # texts that were really encoded
        self._encoder, self._root, self._model = encoder, root, model
        self._caches: dict[str, VectorCache] = {}

    def encode(self, texts: Sequence[str], prompt: str = "", dim: int | None = None, report: ProgressCallback | None = None) -> np.ndarray:
        """The first `dim` components (all if None) of the raw embeddings of `prompt + text`, float32 `[S, K]`, in the order given.

        What is missing is encoded once, longest texts first, and written block by block; `report` counts only that.
        """
        cache = self._cache(prompt)
        missing, done = sorted(cache.missing(texts), key=len, reverse=True), 0
        for vectors in self._encoder.encode_blocks(missing, prompt):
            cache.add(missing[done : done + len(vectors)], vectors)
            done += len(vectors)
            self.encoded += len(vectors)
            if report:
                report(done, len(missing))
        return cache.read(texts, dim or self.width)

    def _cache(self, prompt: str) -> VectorCache:
        if prompt not in self._caches:
            facts = {"model": self._model, "dtype": self._encoder.dtype.name, "max_length": self._encoder.max_length}
            self._caches[prompt] = VectorCache(self._root, self.width, prompt=prompt, **facts)
        return self._caches[prompt]


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()


def _write(path: epath.Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    partial.write_bytes(data)
    partial.replace(path)
