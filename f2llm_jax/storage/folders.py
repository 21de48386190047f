"""Folders that a command makes: complete or absent, replaced only where this program provably made them.

A finished folder holds `MADE`, a marker that names the command, the version and every file with its size and checksum. A folder is
replaced only if each of its files is in that list; a file of somebody else's is never removed.

On a disk a folder is written under a unique name and renamed. In an object store it is written in place, and three rules make it safe:
`INCOMPLETE` comes first and goes last; the one file without which no reader loads anything (`config.json` of a release) is the last
but that to come; and it is the first to go when a folder is replaced.
"""

import contextlib
import os
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import fsspec
from etils import epath

from f2llm_jax import __version__
from f2llm_jax.cli import command
from f2llm_jax.storage import locks
from f2llm_jax.storage.files import FileError, check_apart, file_digest, is_remote, naming, read_json, write_json

MADE = ".made_by_f2llm_jax.json"
INCOMPLETE = ".incomplete_f2llm_jax.json"


@contextlib.contextmanager
def new_folder(out: epath.PathLike, last: str, overwrite: bool, inputs: Mapping[str, epath.PathLike] | None = None) -> Iterator[epath.Path]:
    """An empty folder to write in; it is `out` when the block ends, and nothing is left of it when the block raises.

    Args:
      out: the folder to make.
      last: the file without which no reader loads the folder; the block must write it last.
      overwrite: replace an older folder that this program made.
      inputs: what the command reads, by flag; none of it may lie in `out`.

    Raises:
      FileError: `out` is not empty and may not be replaced.
      LockedError: another process is writing it.
    """
    out = epath.Path(out)
    with locks.lock(out):
        check_new_folder(out, overwrite, inputs)
        with (_written_in_place if is_remote(out) else _written_aside)(out, last) as folder:
            yield folder


def check_new_folder(out: epath.PathLike, overwrite: bool, inputs: Mapping[str, epath.PathLike] | None = None) -> None:
    """Raises what `new_folder` would raise before anything is written."""
    out = epath.Path(out)
    check_apart(out, inputs or {})
    if out.exists() and not out.is_dir():
        raise FileError(f"{out} is a file; choose another folder")
    if not out.exists() or not any(out.iterdir()):
        return
    if (out / INCOMPLETE).exists():
        read_json(out / INCOMPLETE, sealed=True)
        return
    check_ours(out)
    if not overwrite:
        raise FileError(f"{out} is not empty; choose another folder or pass --overwrite")


def check_ours(folder: epath.PathLike) -> None:
    """Raises a FileError if `folder` holds a file that its marker does not name, or has no marker."""
    folder = epath.Path(folder)
    if not (folder / MADE).exists():
        raise FileError(f"{folder} is not empty and has no {MADE}, so it is not known to be f2llm_jax's; choose another folder")
    known = read_json(folder / MADE, sealed=True)["files"].keys() | {MADE}
    for name in sorted(files_in(folder)):
        if name not in known:
            raise FileError(f"{folder}/{name} was not written by the command that made {folder}; move it away or choose another folder")


def mark(folder: epath.PathLike) -> None:
    """Writes the marker of a folder that is complete: all its files, of this disk with their checksums."""
    folder = epath.Path(folder)
    names = sorted(files_in(folder) - {MADE, INCOMPLETE})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        entries = pool.map(lambda name: _entry(folder / name), names)
        files = dict(zip(names, entries, strict=True))
    write_json(folder / MADE, {"made_by": "f2llm_jax", "version": __version__, "command": command.running(), "files": files}, sealed=True)


def damage(folder: epath.PathLike, *, whole: bool = True, suffix: str = "") -> list[str]:
    """What is wrong with the files of a marked folder, one sentence each; empty if all is well, or if there is no marker.

    Args:
      folder: a finished folder.
      whole: compare checksums, which reads every file; otherwise only sizes.
      suffix: of the names to look at; all if empty.
    """
    folder = epath.Path(folder)
    if not (folder / MADE).exists():
        return []
    made = read_json(folder / MADE, sealed=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        listed = [item for item in made["files"].items() if item[0].endswith(suffix)]
        found = pool.map(lambda item: _problem(folder / item[0], item[1], whole), listed)
        return [problem for problem in found if problem]


def check_whole(folder: epath.PathLike, remedy: str, *, whole: bool = True, suffix: str = "") -> None:
    """Raises a FileError that lists the `damage` of a folder, with the command that makes it anew."""
    if problems := damage(folder, whole=whole, suffix=suffix):
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise FileError(f"{folder} is damaged: {'; '.join(problems[:5])}{more}. {remedy}")


def files_in(folder: epath.Path) -> set[str]:
    """Names of all files below a folder, relative to it, with `/`."""
    if is_remote(folder):
        store, root = fsspec.core.url_to_fs(str(folder))
        store.invalidate_cache()
        return {path.removeprefix(root).lstrip("/") for path in store.find(root)} - {""}
    found = (os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)
    return {os.path.relpath(name, folder).replace(os.sep, "/") for name in found}


def replace_folder(made: epath.Path, out: epath.Path) -> None:
    """Gives a finished folder the name `out`; the older one is removed after it."""
    with naming(out):
        old = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}.replaced") if out.exists() else None
        if old:
            out.rename(old)
        made.rename(out)
        if old:
            old.rmtree()


def _entry(path: epath.Path) -> dict[str, int | str]:
    size = path.stat().length
    return {"bytes": size} if is_remote(path) else {"bytes": size, "xxh3_64": file_digest(path)}


def _problem(path: epath.Path, entry: Mapping[str, int | str], whole: bool) -> str:
    if not path.exists():
        return f"{path} is missing"
    if path.stat().length != entry["bytes"]:
        return f"{path} has {path.stat().length:,} bytes, not {entry['bytes']:,}"
    if whole and "xxh3_64" in entry and not is_remote(path) and file_digest(path) != entry["xxh3_64"]:
        return f"{path} has not the content that it was written with"
    return ""


@contextlib.contextmanager
def _written_aside(out: epath.Path, last: str) -> Iterator[epath.Path]:
    del last  # the rename comes last
    pattern = f".{out.name}.*.partial"
    if out.parent.exists():
        for left in (path for path in out.parent.iterdir() if path.match(pattern) and (path / INCOMPLETE).exists()):
            left.rmtree()  # of a command that was killed: nobody else holds the lock
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        with naming(partial):
            partial.mkdir(parents=True)
            write_json(partial / INCOMPLETE, locks.describe(), sealed=True)
            yield partial
            (partial / INCOMPLETE).unlink()
            mark(partial)
            replace_folder(partial, out)
    finally:
        if partial.exists():
            partial.rmtree()


@contextlib.contextmanager
def _written_in_place(out: epath.Path, last: str) -> Iterator[epath.Path]:
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / INCOMPLETE, locks.describe(), sealed=True)
    try:
        _empty(out, last)
        yield out
        mark(out)
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
