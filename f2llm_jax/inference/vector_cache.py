"""Raw vectors of single texts on disk, so that no evaluation encodes a text twice: not after a kill, not for another width or task.

Next to each file of vectors in the store (see `storage.vectors`) lie the digests of their texts, `NAME.keys`, written after it. Files
have random names and never change, so several evaluations may fill the same cache.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from etils import epath
from jaxtyping import Float

from f2llm_jax.cli.progress import ProgressCallback
from f2llm_jax.inference.devices import all_here, is_mine
from f2llm_jax.inference.encode import TextEncoder
from f2llm_jax.storage.arrays import read_array, write_array
from f2llm_jax.storage.vectors import VectorStore, unique_name

KEY_BYTES = 16


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
          max_length: tokens at which texts are truncated.

        Raises:
          FileError, VectorStoreError: a file is damaged or not what it should be.
        """
        made_by = {"model": model, "prompt": prompt, "compute": dtype, "max_length": max_length, "vectors": "raw"}
        self._store = VectorStore(root, made_by, width, "float32")
        self._files: list[np.ndarray] = []
        self._place: dict[bytes, tuple[int, int]] = {}  # file and row of each key
        self._opened: set[str] = set()
        self.refresh()

    def refresh(self) -> None:
        """Opens what other processes have added."""
        for keys in sorted(self._store.folder.glob("*.keys")) if self._store.folder.exists() else ():
            if (name := keys.name.removesuffix(".keys")) not in self._opened:
                self._open(name)

    def missing(self, texts: Sequence[str]) -> list[str]:
        """The texts, each once, that have no vector yet and are this process's share."""
        return list({key: text for text in texts if (key := _key(text)) not in self._place and is_mine(key)}.values())

    def read(self, texts: Sequence[str], dim: int) -> Float[np.ndarray, "S K"]:
        """The first `dim` components of each text's vector, float32."""
        places = np.array([self._place[_key(text)] for text in texts], np.int64).reshape(-1, 2)
        vectors = np.empty((len(texts), dim), np.float32)
        for number in np.unique(places[:, 0]):
            mine = np.flatnonzero(places[:, 0] == number)
            vectors[mine] = self._files[number][places[mine, 1], :dim]
        return vectors

    def add(self, texts: Sequence[str], vectors: Float[np.ndarray, "S D"]) -> None:
        """Stores the vectors of texts.

        Raises:
          VectorStoreError: one is not finite.
        """
        name = unique_name()
        self._store.write(name, vectors)
        keys = np.frombuffer(b"".join(map(_key, texts)), np.uint8).reshape(-1, KEY_BYTES)
        write_array(self._keys(name), keys, salt=self._store.path(name).name)
        self._open(name)

    def _keys(self, name: str) -> epath.Path:
        return self._store.folder / f"{name}.keys"

    def _open(self, name: str) -> None:
        keys = read_array(self._keys(name), salt=self._store.path(name).name)
        self._place |= {key.tobytes(): (len(self._files), i) for i, key in enumerate(keys)}
        self._files.append(self._store.read(name, len(keys)))
        self._opened.add(name)


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

        What is missing is encoded once, longest texts first, and written block by block; `report` counts only that. Several processes
        call this alike, each encodes its share, and all wait for all.
        """
        cache = self._cache(prompt)
        missing, done = sorted(cache.missing(texts), key=len, reverse=True), 0
        for vectors in self._encoder.encode_blocks(missing, prompt):
            cache.add(missing[done : done + len(vectors)], vectors)
            done += len(vectors)
            self.encoded += len(vectors)
            if report:
                report(done, len(missing))
        all_here("texts encoded")
        cache.refresh()
        return cache.read(texts, dim or self.width)

    def _cache(self, prompt: str) -> VectorCache:
        if prompt not in self._caches:
            self._caches[prompt] = VectorCache(
                self._root,
                self.width,
                model=self._model,
                prompt=prompt,
                dtype=self._encoder.dtype.name,
                max_length=self._encoder.max_length,
            )
        return self._caches[prompt]


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()
