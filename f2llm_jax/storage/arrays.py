"""Arrays in files: `.npy` with a checksum behind, compared when they are read, and `.npz`.

The checksum takes in a salt that says what the file is, so no file passes for another.
"""

import contextlib
import io
import math
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO

import numpy as np
import xxhash
from etils import epath
from numpy.typing import DTypeLike

from f2llm_jax.storage.files import FileError, is_remote, new_file

_MAGIC = b"xxh3_64:"  # of the 16 bytes at the end of a file; its 8-byte digest follows. numpy ignores both


@contextlib.contextmanager
def new_array(path: epath.PathLike, dtype: DTypeLike, shape: tuple[int, ...], salt: str = "") -> Iterator["ArrayWriter"]:
    """A `.npy` file with a checksum behind, written a block at a time and there once it is whole.

    `salt` says what the file is, such as its name among others: it is part of the checksum, so no file passes for another.
    """
    with new_file(path) as file:
        writer = ArrayWriter(file, np.dtype(dtype), shape, salt)
        yield writer
        writer.close()


class ArrayWriter:
    """Appends blocks to a `.npy` file."""

    def __init__(self, file: IO[bytes], dtype: np.dtype, shape: tuple[int, ...], salt: str):
        header = io.BytesIO()
        fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, fields)
        self._file, self._digest, self._dtype = file, xxhash.xxh3_64(salt.encode()), dtype
        self._left = math.prod(shape) * dtype.itemsize
        self._put(header.getvalue())

    def write(self, block: np.ndarray) -> None:
        """Appends an array of any shape, cast to the file's dtype."""
        data = np.ascontiguousarray(block, self._dtype)
        self._left -= data.nbytes
        self._put(data.reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        """Ends the file with its checksum."""
        if self._left:
            raise ValueError(f"{self._left} bytes of the array were not written")
        self._file.write(_MAGIC + self._digest.digest())

    def _put(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._file.write(data)


def write_array(path: epath.PathLike, array: np.ndarray, *, salt: str = "") -> None:
    """Writes `array` as `.npy` with a checksum behind (see `new_array`), whatever the ending of `path`."""
    with new_array(path, array.dtype, array.shape, salt) as file:
        file.write(array)


def read_array(path: epath.PathLike, *, salt: str = "", verify: bool = True) -> np.ndarray:
    """The array of a file that `write_array` or `new_array` wrote; memory-mapped where it is local.

    Args:
      path: of the file.
      salt: that it was written with.
      verify: compare the checksum, which reads the file once. False for a file that this process has verified before.

    Raises:
      FileError: it is missing, cut short or damaged.
    """
    path = epath.Path(path)
    try:
        content = np.frombuffer(path.read_bytes(), np.uint8) if is_remote(path) else np.memmap(path, np.uint8, "r")
        if bytes(content[-16:-8]) != _MAGIC:
            raise FileError(f"{path} is cut short, or was not written by f2llm_jax; delete it and run the command that wrote it again")
        if verify and _digest(content[:-16], salt) != bytes(content[-8:]):
            raise FileError(f"{path} is damaged, or another file's: its checksum differs; delete it and run its command again")
        if is_remote(path):
            return np.load(io.BytesIO(content[:-16].data), allow_pickle=False)
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise FileError(f"{path} does not exist; run the command that wrote its folder again") from error
    except ValueError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path} is no readable array ({error}); delete it and run the command that wrote it again") from error


def _digest(content: np.ndarray, salt: str) -> bytes:
    digest = xxhash.xxh3_64(salt.encode())
    digest.update(content.data)
    return digest.digest()


def write_arrays(path: epath.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes named arrays as `.npz`, whose members carry a CRC-32 each."""
    with new_file(path) as file:
        np.savez(file, allow_pickle=True, **arrays)


def read_arrays(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a `.npz` file.

    Raises:
      FileError: it is missing or damaged.
    """
    path = epath.Path(path)
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            return dict(arrays)
    except FileNotFoundError as error:
        raise FileError(f"{path} does not exist") from error
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        raise FileError(f"{path} is damaged ({error}); delete it and run the command that wrote it again") from error
