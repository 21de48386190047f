"""A folder that is complete or absent."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from etils import epath


class ReleaseError(ValueError):
    """Something that cannot be written out; the message names the remedy."""


@contextlib.contextmanager
def complete_or_absent(out: epath.PathLike, marker: str, overwrite: bool) -> Iterator[epath.Path]:
    """An empty `OUT.partial` to write in; it becomes `out` when the block ends and vanishes when the block raises.

    Args:
      out: the folder to make.
      marker: a name inside `out` that tells a folder of this kind from one that must not be deleted.
      overwrite: replace an older folder of this kind.

    Raises:
      ReleaseError: `out` is not empty and `overwrite` is not set, or it is not of this kind.
    """
    out = epath.Path(out)
    partial = out.with_name(out.name + ".partial")
    if out.exists() and not out.is_dir():
        raise ReleaseError(f"{out} is a file; choose another folder")
    if out.exists() and any(out.iterdir()):
        if not (out / marker).exists():
            raise ReleaseError(f"{out} is not empty and holds no {marker}, so it is not replaced; choose another folder")
        if not overwrite:
            raise ReleaseError(f"{out} is not empty; choose another folder or pass --overwrite")
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


def write_json(path: epath.Path, content: Any) -> None:
    """Two spaces, readable in every script, a newline at the end: equal content gives equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
