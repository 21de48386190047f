"""A Hugging Face folder from wherever it lies: this disk, an object store, or the Hub, from which a cluster downloads it once."""

import contextlib
import hashlib
import os
import pathlib
import re
import shutil
import time

import jax
from etils import epath
from jax.experimental import multihost_utils

from f2llm_jax.errors import UserError
from f2llm_jax.files import is_remote, new_file
from f2llm_jax.folders import INCOMPLETE, new_folder

FILES = ("*.json", "*.safetensors", "*.txt", "*/config.json", "*/model.safetensors")  # of a model and its modules
CACHE = pathlib.Path("~/.cache/f2llm_jax")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
COPY_BYTES = 2**26  # in memory at a time


def local_folder(model: str, shared: epath.PathLike | None = None) -> epath.Path:
    """The folder of `model` on this machine's disk.

    A folder of an object store is copied to the user's cache first, file by file. A Hub id is downloaded to the cache of
    huggingface_hub; where several processes form one run, by the first of them, which hands it on through `shared`.

    Args:
      model: a local folder, a URL such as `gs://bucket/folder`, or a Hub id.
      shared: a folder that all processes of the run see; without it each downloads for itself.

    Raises:
      UserError: there is no such folder, or the Hub has no such model or cannot be reached.
    """
    if is_remote(model):
        return _copied(epath.Path(model))
    folder = epath.Path(model)
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(model):
        raise UserError(f"{model} is no local folder and no Hub id (owner/name)")
    if jax.process_count() == 1 or shared is None:
        return _downloaded(model)
    return _downloaded_once(model, epath.Path(shared) / "downloads" / model.replace("/", "--"))


def _downloaded(model: str) -> epath.Path:
    import huggingface_hub  # only here: training from a folder needs no hub client

    try:
        return epath.Path(huggingface_hub.snapshot_download(model, allow_patterns=list(FILES)))
    except Exception as error:  # offline, unknown name, no permission: the client has a class for each
        raise UserError(
            f"{model!r} is no local folder and could not be downloaded from the Hub ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error


def _downloaded_once(model: str, shared: epath.Path) -> epath.Path:
    """Every process must call this. The others learn from the first whether it has failed, instead of waiting for it."""
    error = None
    if jax.process_index() == 0 and not (shared / "config.json").exists():
        try:
            source = _downloaded(model)
            with new_folder(shared, "config.json", overwrite=True) as folder:
                for file in sorted(_files(source), key=lambda file: file.name == "config.json"):
                    _copy(file, folder / str(file.relative_to(source)))
        except Exception as raised:
            error = raised
    failed = multihost_utils.broadcast_one_to_all(error is not None)
    if error is not None:
        raise error
    if failed:
        raise UserError(f"the first process could not download {model!r}; its log says why")
    return _copied(shared) if is_remote(shared) else shared


def _copied(folder: epath.Path) -> epath.Path:
    """A copy of a remote folder, in a cache that knows it by its files, their sizes and when they were written."""
    files = _files(folder)
    if (folder / INCOMPLETE).exists() or not files:
        raise UserError(f"{folder} holds no model, or one that is still being written; copy a Hugging Face folder there")
    stats = [(str(file.relative_to(folder)), file.stat()) for file in files]
    described = repr([str(folder), *((name, stat.length, stat.mtime) for name, stat in stats)])
    copy = epath.Path(CACHE.expanduser()) / hashlib.sha256(described.encode()).hexdigest()[:32]
    needed = sum(stat.length for name, stat in stats if not (copy / name).exists())
    copy.mkdir(parents=True, exist_ok=True)
    if needed > (free := shutil.disk_usage(copy).free):
        raise UserError(f"{folder} needs {needed / 1e9:.1f} GB in {CACHE}, where {free / 1e9:.1f} GB are free; make room")
    for file, (name, stat) in zip(files, stats, strict=True):
        if not (copy / name).exists():
            _copy(file, copy / name)
            if (copy / name).stat().length != stat.length:
                (copy / name).unlink()
                raise UserError(f"{file} changed while it was read; run the same command again")
    os.utime(copy, (time.time(), time.time()))  # for whoever cleans the cache by age
    return copy


def _files(folder: epath.Path) -> list[epath.Path]:
    found = {file for pattern in FILES for file in folder.glob(pattern)}
    return sorted(found)


def _copy(source: epath.Path, target: epath.Path) -> None:
    with contextlib.ExitStack() as stack:
        read, write = stack.enter_context(source.open("rb")), stack.enter_context(new_file(target))
        while block := read.read(COPY_BYTES):
            write.write(block)
