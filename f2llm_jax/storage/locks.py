"""One writer at a time: a lock on a file or folder that says who holds it, next to it as `.NAME.lock`.

On a disk the operating system holds the lock (`flock`) and lets go of it when the process ends, however it ends. In an object store the
lock is an object that is created only if there is none (a generation precondition). Its holder renews it, so one that is not
renewed any more belongs to nobody.
"""

import contextlib
import datetime
import fcntl
import getpass
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import fsspec
from etils import epath

from f2llm_jax.cli import command
from f2llm_jax.errors import UserError
from f2llm_jax.storage.files import is_remote, naming

RENEW_SECONDS = 10.0
STALE_SECONDS = 45.0  # without a renewal: several of them failed, so the holder is gone

_held: set[str] = set()  # by this process, which may lock again what it has locked


class LockedError(UserError):
    """Another process is writing there; the message says which."""


@contextlib.contextmanager
def lock(target: epath.PathLike) -> Iterator[None]:
    """Holds the lock on `target`, which need not exist yet. A lock whose holder is gone is taken over, which a line on stderr says.

    Raises:
      LockedError: another process holds it.
    """
    path = _path(epath.Path(target))
    if str(path) in _held:
        yield
        return
    with (_remote if is_remote(path) else _local)(path, target):
        _held.add(str(path))
        try:
            yield
        finally:
            _held.discard(str(path))


def _path(target: epath.Path) -> epath.Path:
    """Next to the target; within it where nothing may be written next to it, as next to a mounted disk."""
    if is_remote(target):
        return target.with_name(f".{target.name}.lock")
    target = epath.Path(os.path.realpath(target))
    if target.is_dir() and not os.access(target.parent, os.W_OK):
        return target / ".lock"
    return target.with_name(f".{target.name}.lock")


@contextlib.contextmanager
def _local(path: epath.Path, target: epath.PathLike) -> Iterator[None]:
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _open_locked(path, target)
    try:
        if (before := _read(os.pread(descriptor, 4096, 0))) is not None:
            _say_taken(target, before)
        os.ftruncate(descriptor, 0)
        with naming(path):
            os.pwrite(descriptor, _who(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _open_locked(path: epath.Path, target: epath.PathLike) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read(os.pread(descriptor, 4096, 0)) or {}
            os.close(descriptor)
            raise _locked(target, holder) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # its holder let go, and removed it, between our two calls


@contextlib.contextmanager
def _remote(path: epath.Path, target: epath.PathLike) -> Iterator[None]:
    store = fsspec.filesystem(str(path).partition("://")[0])
    mine = _who()
    while not _create(store, str(path), mine):
        before = _read(_content(store, str(path)))
        if before is None or _content(store, str(path)) == mine:
            if before is not None:
                break  # an answer was lost: it is ours
            continue
        generation = _generation(store, str(path))
        if not _is_dead(before):
            until = time.monotonic() + STALE_SECONDS
            while time.monotonic() < until:
                time.sleep(min(2.0, STALE_SECONDS / 4))
                if _generation(store, str(path)) != generation:
                    raise _locked(target, before)
        _say_taken(target, before)
        _remove(store, str(path), generation)
    done = threading.Event()
    renewer = threading.Thread(target=_renew, args=(store, str(path), mine, done), daemon=True)
    renewer.start()
    try:
        yield
    finally:
        done.set()
        renewer.join()
        with contextlib.suppress(OSError):
            store.rm_file(str(path))


def _renew(store: fsspec.AbstractFileSystem, path: str, content: bytes, done: threading.Event) -> None:
    while not done.wait(RENEW_SECONDS):
        with contextlib.suppress(Exception):  # of the network: the next one may get through
            store.pipe_file(path, content)


def _create(store: fsspec.AbstractFileSystem, path: str, content: bytes) -> bool:
    """Whether the object was created, by this call alone."""
    try:
        store.pipe_file(path, content, mode="create")
    except FileExistsError:
        return False
    return True


def _content(store: fsspec.AbstractFileSystem, path: str) -> bytes:
    try:
        return store.cat_file(path)
    except FileNotFoundError:
        return b""


def _generation(store: fsspec.AbstractFileSystem, path: str) -> Any:
    """What changes whenever the object is written; None if it is gone."""
    store.invalidate_cache()
    try:
        found = store.info(path)
    except FileNotFoundError:
        return None
    return found.get("generation", found.get("mtime", found.get("created")))


def _remove(store: fsspec.AbstractFileSystem, path: str, generation: Any) -> None:
    """Removes the object if it is still of that generation: of several that take over, one succeeds."""
    bucket, _, key = path.partition("://")[2].partition("/")
    with contextlib.suppress(OSError):
        if hasattr(store, "call"):
            store.call("DELETE", "b/{}/o/{}", bucket, key, ifGenerationMatch=generation)
        elif _generation(store, path) == generation:
            store.rm_file(path)
    store.invalidate_cache()


def describe() -> dict[str, Any]:
    """This process, for a lock or a marker: who runs what, where, since when."""
    with contextlib.suppress(Exception):  # no such user: a container
        user = getpass.getuser()
        return {"command": command.running(), "user": user, **_process()}
    return {"command": command.running(), "user": str(os.getuid()), **_process()}


def _process() -> dict[str, Any]:
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()), "since": since}


def _who() -> bytes:
    return json.dumps({**describe(), "token": uuid.uuid4().hex}).encode()


def _read(content: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(content)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this host that has ended."""
    return holder.get("host") == socket.gethostname() and _started(holder.get("pid")) != holder.get("started")


def _started(pid: Any) -> str | None:
    """When a process of this host started, in ticks since the boot; None if there is none. Tells it from a later one of the same number."""
    try:
        return pathlib.Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, TypeError, ValueError, IndexError):
        return None


def _locked(target: epath.PathLike, holder: dict[str, Any]) -> LockedError:
    return LockedError(f"{target} is being written by {_name(holder)}; wait for it or stop it, then run the same command again")


def _say_taken(target: epath.PathLike, before: dict[str, Any]) -> None:
    print(f"{target}: took over the lock of {_name(before)}, which has ended", file=sys.stderr, flush=True)


def _name(holder: dict[str, Any]) -> str:
    told = "{command} (user {user}, host {host}, pid {pid}, since {since})"
    try:
        return told.format(**holder)
    except KeyError:
        return "another process"
