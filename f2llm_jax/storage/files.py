"""Files, on a disk or in an object store (`gs://`): complete or absent, and never read after they were damaged.

A file on a disk is written under a unique name and renamed. An object store has no rename, but there a file exists only once it has
been uploaded whole. Arrays and sealed JSON carry a checksum (XXH3), which is compared whenever they are read.
"""

import contextlib
import errno
import io
import json
import math
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from typing import IO, Any, cast

import xxhash
from etils import epath

from f2llm_jax.errors import UserError

CHECKSUM = "checksum"  # the key of a sealed JSON file, over all others
_NAME = re.compile(r"\w[\w.,+@=~() -]{0,127}")


class FileError(UserError):
    """A file or folder that cannot be read or written as asked; the message names it and the remedy."""


def is_remote(path: epath.PathLike) -> bool:
    """Whether `path` is in an object store: a URL such as `gs://bucket/folder`."""
    return "://" in str(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """`path` as Orbax wants it: absolute if it is local, unchanged if it is a URL."""
    path = epath.Path(path)
    return path if is_remote(path) else path.absolute()


def workdir_path(path: epath.PathLike) -> epath.Path:
    """The absolute path of a folder for checkpoints.

    Raises:
      FileError: Orbax could not write there: it takes `* ? [ ] \\` in a path for a pattern, and would save checkpoints without weights.
    """
    path = absolute(path)
    if found := sorted(set("*?[]\\") & set(str(path))):
        raise FileError(f"{path}: checkpoints cannot be written to a path with {' '.join(found)} in it; choose another folder")
    return path


def check_name(name: str, what: str) -> str:
    """`name` itself, if it can name a file or folder on every disk and object store; the rule for sources, units, runs and arms.

    1 to 128 letters, digits and `_ . , + @ = ~ ( ) -` and spaces, the first a letter, a digit or `_`, the last no space or dot.

    Raises:
      FileError: it cannot.
    """
    if not _NAME.fullmatch(name) or name[-1] in " .":
        raise FileError(
            f"{what} {name!r}: a name has 1 to 128 letters, digits, spaces and _.,+@=~()-, begins with a letter, a digit or _ and ends "
            "with no space or dot; rename it"
        )
    return name


@contextlib.contextmanager
def new_file(path: epath.PathLike) -> Iterator[IO[bytes]]:
    """A binary file to write to, which has its name once the block has ended; nothing is left of it when the block raises.

    Its folder is made if need be. An older file of that name is replaced.
    """
    path = epath.Path(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(path):
        content = io.BytesIO()
        yield content
        path.write_bytes(content.getvalue())
        return
    partial = path.with_name(f".{path.name[:200]}.{uuid.uuid4().hex[:12]}.partial")
    try:
        with naming(path):
            with partial.open("wb") as file:
                yield file
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: epath.PathLike) -> Iterator[None]:
    """Adds the file's name to an OSError of the block that names none, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def check_new_file(path: epath.PathLike) -> None:
    """Raises a FileError if no file can be written at `path`; to be asked before the work that fills it. Its folder need not exist."""
    path = epath.Path(path)
    if is_remote(path):
        return
    if path.is_dir():
        raise FileError(f"{path} is a folder; name a file in it")
    folder = next(parent for parent in absolute(path).parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        read_only = f" ({os.strerror(errno.EROFS)})" if os.statvfs(folder).f_flag & os.ST_RDONLY else ""
        raise FileError(f"{path} cannot be written: {folder} is not a folder that this user may write to{read_only}")


def write_bytes(path: epath.PathLike, content: bytes) -> None:
    """Writes a file whole (see `new_file`)."""
    with new_file(path) as file:
        file.write(content)


def write_text(path: epath.PathLike, content: str) -> None:
    """Writes a UTF-8 file whole (see `new_file`)."""
    write_bytes(path, content.encode())


def write_json(path: epath.PathLike, content: Any, *, sealed: bool = False) -> None:
    """Two spaces, readable in every script, a newline at the end: equal content gives equal bytes.

    JSON has no infinity and no NaN: they are written as the strings "inf", "-inf" and "nan".

    Args:
      path: of the file.
      content: a mapping if it is sealed.
      sealed: add the key `CHECKSUM`, which `read_json` compares and removes.
    """
    content = seal(content) if sealed else plain(content)
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: epath.PathLike, *, sealed: bool = False, kind: type = object) -> Any:
    """The content of a JSON file, without its checksum if it is sealed.

    Raises:
      FileError: it is missing, unreadable, not JSON, not of `kind`, or was changed after it was sealed.
    """
    path = epath.Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileError(f"{path} does not exist") from error
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path} is not readable as JSON ({error})") from error
    if not isinstance(content, dict if sealed else kind):
        raise FileError(f"{path} holds a JSON {type(content).__name__}, not what this command writes there")
    return unseal(cast(dict[str, Any], content), path) if sealed else content


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` as JSON can hold it, with a checksum over all of it."""
    held = plain(content)
    return {**held, CHECKSUM: _checksum(held)}


def unseal(content: Mapping[str, Any], path: epath.PathLike) -> dict[str, Any]:
    """What was sealed, without its checksum; `path` is where it was read.

    Raises:
      FileError: it was changed since, or an earlier version wrote it without a checksum.
    """
    if CHECKSUM not in content:
        raise FileError(f"{path} is damaged or of an earlier version: it has no checksum; make it anew with the command that wrote it")
    held = {key: value for key, value in content.items() if key != CHECKSUM}
    if content.get(CHECKSUM) != _checksum(held):
        raise FileError(f"{path} is damaged: it was changed after it was written, or by hand; restore it or make it anew")
    return held


def plain(content: Any) -> Any:
    """`content` as JSON can hold it: lists for tuples, strings for keys and for numbers that are not finite."""
    if isinstance(content, Mapping):
        return {str(key): plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [plain(value) for value in content]
    return str(content) if isinstance(content, float) and not math.isfinite(content) else content


def _checksum(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())


def file_digest(path: epath.PathLike) -> str:
    """XXH3 of a local file's content, 16 hex digits; reads it once, a few megabytes at a time."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def holds(folder: epath.PathLike, path: epath.PathLike) -> bool:
    """Whether `path` is `folder` or lies in it, links followed."""
    return _real(path) == _real(folder) or _real(path).startswith(_real(folder).rstrip("/") + "/")


def check_apart(out: epath.PathLike, inputs: Mapping[str, epath.PathLike]) -> None:
    """Raises a FileError if writing `out` would replace one of the inputs, given by the words that name them."""
    for words, path in inputs.items():
        if holds(out, path):
            raise FileError(f"{out} would be written, and {words} is read from there; choose another output")


def _real(path: epath.PathLike) -> str:
    return str(path).rstrip("/") if is_remote(path) else os.path.realpath(os.fspath(path))
