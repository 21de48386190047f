"""A local copy of a folder that lies in an object store: a prepared dataset, or a cache of teacher vectors.

Training reads a few thousand texts a step from random places. In an object store each of them is a request of its own, 60 ms long, so a
step of 4,608 texts takes seconds; a copy takes a few hundred large requests once and serves every epoch. It is kept for the next run:
what has not changed in the store is not copied again, and an interrupted copy is resumed.
"""

import base64
import concurrent.futures
import contextlib
import fcntl
import hashlib
import os
import pathlib
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import fsspec
from etils import epath
from tqdm import tqdm

from f2llm_jax.data.records import COMPLETE, Dataset, load_dataset
from f2llm_jax.errors import UserError
from f2llm_jax.storage.files import is_remote, read_json, write_json

PART_BYTES = 2**24  # of a request: long against its latency, small against a host's memory
THREADS = 32  # requests at once, each with its part in memory
LISTED = "copied.json"  # what the store said of each file that is here
NOTED_EVERY = 5.0  # seconds between two writes of that list


class CopyError(UserError):
    """A folder that cannot be copied; the message names the remedy."""


def local_dataset(folder: epath.PathLike, copy_to: epath.PathLike = "") -> Dataset:
    """The prepared dataset in `folder`, opened where it is fast to read: in a local copy (see `local_copy`) if it is in an object store.

    Raises:
      DatasetError, CopyError: there is none, or no place for it.
    """
    return load_dataset(local_copy(folder, copy_to, last=COMPLETE, progress=True))


def local_copy(folder: epath.PathLike, copy_to: epath.PathLike = "", *, last: str, progress: bool = False) -> epath.Path:
    """`folder` itself if it is local, else a complete copy of it. The processes of a host share one: the first makes it, the others wait.

    Args:
      folder: local, or in an object store.
      copy_to: folder for copies, each in a folder of its own; empty for the user's cache folder.
      last: the file without which nobody takes `folder` for complete.
      progress: show bytes copied and bytes to copy.

    Raises:
      CopyError: `folder` lacks `last`, its copy does not fit the disk, or a file arrived damaged.
    """
    if not is_remote(folder):
        return epath.Path(folder)
    target = _place(str(folder), str(copy_to))
    target.parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(target):
        store, root = fsspec.core.url_to_fs(str(folder))
        store.invalidate_cache()
        wanted = {path.removeprefix(root).lstrip("/"): _Remote(path, info) for path, info in store.find(root, detail=True).items()}
        if last not in wanted:
            raise CopyError(f"{folder} holds no {last}: it is incomplete, or not the folder that you mean")
        with tqdm(desc=f"copying {folder}", unit="B", unit_scale=True, file=sys.stderr, disable=not progress, delay=1) as bar:
            bar.mininterval = 1 if sys.stderr.isatty() else 30
            _Copy(store, target, wanted, bar).update(last)
    return epath.Path(target)


class _Remote:
    """A file in the store.

    `state` changes when its content does; `md5` is None where the store has none (objects composed of parts).
    """

    def __init__(self, path: str, info: Mapping[str, Any]):
        self.path, self.size, self.md5 = path, int(info["size"]), info.get("md5Hash")
        self.state = [self.size, self.md5 or info.get("crc32c") or str(info.get("generation") or info.get("created"))]


class _Copy:
    """A folder on disk that is being made equal to one in the store."""

    def __init__(self, store: fsspec.AbstractFileSystem, target: pathlib.Path, wanted: Mapping[str, _Remote], bar: tqdm):
        self._store, self._target, self._wanted, self._bar = store, target, wanted, bar
        listed = read_json(target / LISTED) if (target / LISTED).exists() else {}
        self._here = {name: state for name, state in listed.items() if _size(target / name) == state[0]}
        self._lock = threading.Lock()

    def update(self, last: str) -> None:
        """Removes what the store does not have, copies what is new or changed, `last` at the end."""
        gone = self._here.keys() - self._wanted.keys()
        missing = [name for name, remote in self._wanted.items() if self._here.get(name) != remote.state]
        if not gone and not missing:
            return
        (self._target / last).unlink(missing_ok=True)
        for name in gone:
            (self._target / name).unlink()
            del self._here[name]
        missing = sorted({*missing, last} - {last})
        self._bar.reset(sum(self._wanted[name].size for name in [*missing, last]))
        self._check_space(self._bar.total)
        self._copy(missing)
        self._copy([last])

    def _check_space(self, needed: int) -> None:
        self._target.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(self._target).free) < needed:
            raise CopyError(
                f"{self._target} has {free / 1e9:,.1f} GB free, and {needed / 1e9:,.1f} GB are to be copied there; point "
                "config.data.copy_to (for other commands the environment variable XDG_CACHE_HOME) to a larger disk"
            )

    def _copy(self, names: list[str]) -> None:
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            try:
                waiting = [future for name in names for future in self._parts(pool, name)]
                noted = time.monotonic()
                for future in concurrent.futures.as_completed(waiting):
                    future.result()
                    if time.monotonic() - noted > NOTED_EVERY:
                        self._note()
                        noted = time.monotonic()
            finally:
                pool.shutdown(cancel_futures=True)
                self._note()

    def _parts(self, pool: concurrent.futures.Executor, name: str) -> list[concurrent.futures.Future[None]]:
        """Starts the requests for a file. The one that is done last gives it its name."""
        remote, partial = self._wanted[name], self._target / f"{name}.partial"
        partial.parent.mkdir(parents=True, exist_ok=True)
        starts = list(range(0, remote.size, PART_BYTES)) or [0]
        left = set(starts)
        partial.write_bytes(b"")

        def fetch(start: int) -> None:
            stop = min(start + PART_BYTES, remote.size)
            content = self._store.cat_file(remote.path, start=start, end=stop) if stop > start else b""
            with partial.open("r+b") as file:
                file.seek(start)
                file.write(content)
            with self._lock:
                left.discard(start)
                self._bar.update(len(content))
                if left:
                    return
            self._finish(name, partial)

        return [pool.submit(fetch, start) for start in starts]

    def _finish(self, name: str, partial: pathlib.Path) -> None:
        remote = self._wanted[name]
        if _size(partial) != remote.size or (remote.md5 and _md5(partial) != remote.md5):
            raise CopyError(f"{remote.path} changed or was damaged while it was copied; run the same command again")
        partial.replace(self._target / name)
        with self._lock:
            self._here[name] = remote.state

    def _note(self) -> None:
        with self._lock:
            write_json(self._target / LISTED, dict(self._here))


def _place(folder: str, copy_to: str) -> pathlib.Path:
    """Where the copy of `folder` is: under its name, and what tells it from other folders of that name."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "f2llm_jax"
    folder = folder.rstrip("/")
    return pathlib.Path(copy_to or cache).absolute() / f"{folder.rpartition('/')[2]}-{hashlib.sha256(folder.encode()).hexdigest()[:12]}"


@contextlib.contextmanager
def _one_at_a_time(target: pathlib.Path) -> Iterator[None]:
    with target.with_name(target.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _size(path: pathlib.Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _md5(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode()
