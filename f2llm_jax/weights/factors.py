"""The two factors of an embedding table as they are stored, read and made smaller (ML-Embed's "efficiency mode").

A release may hold, next to the plain table that every reader knows, `factors/embedding.safetensors` with the tensors `U` `[V, Z]` and `V`
`[Z, D]`, by ML-Embed's names. It lies in a folder of its own because vLLM loads every safetensors file next to config.json.
"""

import numpy as np
from etils import epath
from jaxtyping import Float

from f2llm_jax.weights.hf_mapping import EMBEDDING, LEFT, RIGHT, Entry
from f2llm_jax.weights.parameters import Parameters, Shape, blocks

FILE = "factors/embedding.safetensors"


def stored_rank(folder: epath.Path) -> int:
    """Z of the factors that a Hugging Face folder holds; 0 where it holds none."""
    from safetensors import safe_open

    path = folder / FILE
    if not path.exists():
        return 0
    with safe_open(path, framework="numpy") as file:
        return file.get_slice(LEFT.name).get_shape()[1]


class Prefix:
    """Parameters whose table has the first `rank` columns and rows of the factors."""

    def __init__(self, stored: Parameters, rank: int):
        self._stored, self._rank = stored, rank

    def unit(self, entry: Entry) -> int:
        return self._stored.unit(entry)

    def read(self, entry: Entry, start: int, stop: int) -> Float[np.ndarray, "..."]:
        if entry == LEFT:
            return self._stored.read(LEFT, start, stop)[:, : self._rank]
        return self._stored.read(entry, start, stop)


class Refactorised:
    """Parameters whose table is the nearest one of rank `rank` to the product of the factors, as factors."""

    def __init__(self, stored: Parameters, rank: int, left: Shape):
        """`left` is the shape of the stored left factor.

        With `U` the left factor and `V` the right one, the leading eigenvectors W of `(U V)^T U V` give the factors `U (V W)` and `W^T`.
        """
        self._stored = stored
        right = stored.read(RIGHT, 0, left[1]).astype(np.float64)
        gram = np.zeros((left[1], left[1]))
        for start, stop in blocks(stored, LEFT, left):
            block = stored.read(LEFT, start, stop).astype(np.float64)
            gram += block.T @ block
        _, vectors = np.linalg.eigh(right.T @ gram @ right)
        leading = vectors[:, : -rank - 1 : -1]  # eigenvalues come ascending
        self._project, self._right = (right @ leading).astype(np.float32), np.ascontiguousarray(leading.T, np.float32)

    def unit(self, entry: Entry) -> int:
        return self._stored.unit(entry)

    def read(self, entry: Entry, start: int, stop: int) -> Float[np.ndarray, "..."]:
        if entry == LEFT:
            return self._stored.read(LEFT, start, stop) @ self._project
        return self._right[start:stop] if entry == RIGHT else self._stored.read(entry, start, stop)


class Multiplied:
    """Parameters whose embedding table is multiplied out as it is read."""

    def __init__(self, factored: Parameters, rank: int):
        self._factored = factored
        self._right = factored.read(RIGHT, 0, rank)

    def unit(self, entry: Entry) -> int:
        return self._factored.unit(LEFT if entry == EMBEDDING else entry)

    def read(self, entry: Entry, start: int, stop: int) -> Float[np.ndarray, "..."]:
        if entry != EMBEDDING:
            return self._factored.read(entry, start, stop)
        return self._factored.read(LEFT, start, stop) @ self._right
