"""Files and folders, on a disk or in an object store (`gs://`): complete or absent, whoever writes them and whenever they are killed.

A file on a disk is written under a name of its own and renamed. An object store has no rename, but there a file exists only once it
has been uploaded whole.

A folder on a disk is written beside its place and renamed. In an object store it is written in place, and three rules make it safe: a
file `INCOMPLETE` comes first and goes last; the one file without which no reader loads anything (`config.json` of a release) is the
last but that to come; and it is the first to go when a folder is replaced.
"""

import contextlib
import io
import json
import uuid
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from etils import epath

from f2llm_jax.errors import UserError

INCOMPLETE = "INCOMPLETE"
_WHY = "f2llm_jax is writing this folder, or was killed while it did. Run the same command again.\n"


class FileError(UserError):
    """A file or folder that cannot be read or written as asked; the message names it and the remedy."""


def is_remote(path: epath.PathLike) -> bool:
    """Whether `path` is in an object store: a URL such as `gs://bucket/folder`."""
    return "://" in str(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """`path` as Orbax wants it: absolute if it is local, unchanged if it is a URL."""
    path = epath.Path(path)
    return path if is_remote(path) else path.absolute()


@contextlib.contextmanager
def new_file(path: epath.PathLike) -> Iterator[IO[bytes]]:
    """A binary file to write to, which has its name once the block has ended; nothing is left of it when the block raises.

    Its folder is made if need be. An older file of that name is replaced.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(path):
        content = io.BytesIO()
        yield content
        path.write_bytes(content.getvalue())
        return
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: epath.PathLike, content: bytes) -> None:
    """Writes a file whole (see `new_file`)."""
    with new_file(path) as file:
        file.write(content)


def write_json(path: epath.PathLike, content: Any) -> None:
    """Two spaces, readable in every script, a newline at the end: equal content gives equal bytes."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: epath.PathLike) -> Any:
    """The content of a JSON file.

    Raises:
      FileError: it is missing, unreadable or not JSON.
    """
    path = epath.Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise FileError(f"{path} is not readable as JSON ({error})") from error


def write_array(path: epath.PathLike, array: np.ndarray) -> None:
    """Writes `array` as `.npy`, whatever the ending of `path`."""
    with new_file(path) as file:
        np.save(file, array)


def read_array(path: epath.PathLike) -> np.ndarray:
    """The array of a `.npy` file; memory-mapped where it is local."""
    path = epath.Path(path)
    return np.load(io.BytesIO(path.read_bytes())) if is_remote(path) else np.load(path, mmap_mode="r")


@contextlib.contextmanager
def new_folder(out: epath.PathLike, marker: str, last: str, overwrite: bool) -> Iterator[epath.Path]:
    """An empty folder to write in; it is `out` when the block ends, and nothing is left of it when the block raises.

    Args:
      out: the folder to make.
      marker: a name inside `out` that tells a folder of this kind from one that must not be deleted.
      last: the file without which no reader loads the folder; the block must write it last.
      overwrite: replace an older folder of this kind.

    Raises:
      FileError: `out` is not empty and `overwrite` is not set, or it is not of this kind.
    """
    out = epath.Path(out)
    check_new_folder(out, marker, overwrite)
    with (_written_in_place if is_remote(out) else _written_beside)(out, last) as folder:
        yield folder


def check_new_folder(out: epath.PathLike, marker: str, overwrite: bool) -> None:
    """Raises what `new_folder` would raise before anything is written."""
    out = epath.Path(out)
    if out.exists() and not out.is_dir():
        raise FileError(f"{out} is a file; choose another folder")
    if not out.exists() or not any(out.iterdir()) or (out / INCOMPLETE).exists():
        return
    if not (out / marker).exists():
        raise FileError(f"{out} is not empty and holds no {marker}, so it is not replaced; choose another folder")
    if not overwrite:
        raise FileError(f"{out} is not empty; choose another folder or pass --overwrite")


@contextlib.contextmanager
def _written_beside(out: epath.Path, last: str) -> Iterator[epath.Path]:
    del last  # the rename comes last
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        partial.rmtree()
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            out.rmtree()
        partial.rename(out)
    finally:
        if partial.exists():
            partial.rmtree()


@contextlib.contextmanager
def _written_in_place(out: epath.Path, last: str) -> Iterator[epath.Path]:
    out.mkdir(parents=True, exist_ok=True)
    (out / INCOMPLETE).write_text(_WHY)
    try:
        _empty(out, last)
        yield out
    except BaseException:
        _empty(out, last)
        (out / INCOMPLETE).unlink()
        raise
    (out / INCOMPLETE).unlink()


def _empty(folder: epath.Path, first: str) -> None:
    """Removes everything but the note that the folder is incomplete, `first` first."""
    (folder / first).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            path.rmtree()
        elif path.name != INCOMPLETE:
            path.unlink()
