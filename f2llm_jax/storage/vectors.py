"""Vectors of texts on disk: files that are whole or absent, below a folder that is named by everything that made them.

So vectors are found again as long as nothing that they depend on has changed, whichever run or host wrote them, and an interrupted run
loses the file it was at. A file's checksum covers what made it and its name: one that was cut, damaged, made by another model or
put in the place of another is refused.
"""

import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from f2llm_jax.errors import UserError
from f2llm_jax.storage.arrays import read_array, write_array
from f2llm_jax.storage.files import plain, write_json

DTYPES = ("float32", "float16")


class VectorStoreError(UserError):
    """Vectors that are not finite or do not fit their store; the message names the file and the remedy."""


class VectorStore:
    """Arrays `[texts, D]` by name, all made by the same model under the same options."""

    def __init__(self, root: epath.PathLike, made_by: Mapping[str, Any], width: int, dtype: str):
        """Reads and writes nothing yet.

        Args:
          root: folder of stores of any kind, made where there is none.
          made_by: what the vectors depend on besides their texts, JSON values by name.
          width: D.
          dtype: on disk, one of `DTYPES`. float16 halves the disk and rounds each component to 3 digits.
        """
        self.made_by = {**plain(made_by), "width": width, "dtype": dtype}
        self.digest = hashlib.sha256(json.dumps(self.made_by, sort_keys=True).encode()).hexdigest()[:32]
        self.width, self.dtype = width, np.dtype(dtype)
        self.folder = epath.Path(root) / self.digest
        self._verified: set[str] = set()

    def path(self, name: str) -> epath.Path:
        return self.folder / f"{name}.npy"

    def exists(self, name: str) -> bool:
        return self.path(name).exists()

    def names(self) -> list[str]:
        """The names of all files directly in the store, sorted."""
        return sorted(path.name.removesuffix(".npy") for path in self.folder.glob("*.npy")) if self.folder.exists() else []

    def write(self, name: str, vectors: Float[np.ndarray, "N D"]) -> None:
        """Stores vectors, rounded to the store's dtype.

        Raises:
          VectorStoreError: one is not finite in that dtype, or zero, which has no direction.
        """
        with np.errstate(over="ignore"):
            stored = np.asarray(vectors, self.dtype)
        finite = np.isfinite(stored).all(axis=1)
        if len(wrong := np.flatnonzero(~(finite & stored.any(axis=1)))):
            why = "zero" if finite[wrong[0]] else "not finite"
            raise VectorStoreError(
                f"{self.path(name)}: vector {wrong[0]} is {why} in {self.dtype}; store float32, compute in float32, or check the model"
            )
        if not (self.folder / "made_by.json").exists():
            write_json(self.folder / "made_by.json", self.made_by, sealed=True)  # for people
        write_array(self.path(name), stored, salt=self._salt(name))

    def read(self, name: str, rows: int | None = None) -> Float[np.ndarray, "N D"]:
        """The vectors of a file as stored, memory-mapped where it is local; its checksum is compared at this process's first read.

        Raises:
          FileError: it is missing, cut short, damaged or another file's.
          VectorStoreError: it does not hold `rows` vectors of the store's width and dtype.
        """
        vectors = read_array(self.path(name), salt=self._salt(name), verify=name not in self._verified)
        if vectors.shape != (len(vectors) if rows is None else rows, self.width) or vectors.dtype != self.dtype:
            expected = f"{'any number of' if rows is None else rows} vectors of {self.width} {self.dtype}"
            found = f"{vectors.dtype} {list(vectors.shape)}"
            raise VectorStoreError(f"{self.path(name)} holds {found}, not {expected}; delete it and run the command that wrote it again")
        self._verified.add(name)
        return vectors

    def _salt(self, name: str) -> str:
        return f"{self.digest}/{name}"


def texts_digest(texts: Iterable[str]) -> str:
    """32 hex digits that stand for a list of texts, in order."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()[:32]


def unique_name() -> str:
    """A name that no other process gives."""
    return uuid.uuid4().hex
