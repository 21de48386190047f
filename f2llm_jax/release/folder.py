"""A folder that is complete or does not look it.

On a disk a folder is written beside its place and then renamed. An object store has no rename, so there it is written in
place, and three rules make it safe: a file `INCOMPLETE` comes first and goes last; the one file without which no reader loads
anything (`config.json` of a release) is the last but that to come; and it is the first to go when a folder is replaced.
"""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from etils import epath

INCOMPLETE = "INCOMPLETE"
_WHY = "f2llm_jax is writing this folder, or was killed while it did. Run the same command again.\n"


class ReleaseError(ValueError):
    """Something that cannot be written out; the message names the remedy."""


@contextlib.contextmanager
def complete_or_absent(out: epath.PathLike, marker: str, last: str, overwrite: bool) -> Iterator[epath.Path]:
    """An empty folder to write in; it is `out` when the block ends, and nothing is left of it when the block raises.

    Args:
      out: the folder to make.
      marker: a name inside `out` that tells a folder of this kind from one that must not be deleted.
      last: the file without which no reader loads the folder; the block must write it last.
      overwrite: replace an older folder of this kind.

    Raises:
      ReleaseError: `out` is not empty and `overwrite` is not set, or it is not of this kind.
    """
    out = epath.Path(out)
    check_free(out, marker, overwrite)
    with (_written_in_place if "://" in str(out) else _written_beside)(out, last) as folder:
        yield folder


def check_free(out: epath.PathLike, marker: str, overwrite: bool) -> None:
    """Raises what `complete_or_absent` would raise before anything is written."""
    out = epath.Path(out)
    if out.exists() and not out.is_dir():
        raise ReleaseError(f"{out} is a file; choose another folder")
    if not out.exists() or not any(out.iterdir()) or (out / INCOMPLETE).exists():
        return
    if not (out / marker).exists():
        raise ReleaseError(f"{out} is not empty and holds no {marker}, so it is not replaced; choose another folder")
    if not overwrite:
        raise ReleaseError(f"{out} is not empty; choose another folder or pass --overwrite")


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


def write_json(path: epath.Path, content: Any) -> None:
    """Two spaces, readable in every script, a newline at the end: equal content gives equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
