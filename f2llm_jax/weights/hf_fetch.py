"""A Hugging Face folder from wherever it lies: this disk, an object store, or the Hub, from which a cluster downloads it once."""

import contextlib
import hashlib
import os
import pathlib
import re
import shutil
import time

from etils import epath

from f2llm_jax.errors import UserError
from f2llm_jax.storage.files import absolute, is_remote, new_file
from f2llm_jax.storage.folders import INCOMPLETE, new_folder

FILES = ("*.json", "*.safetensors", "*.txt", "*/config.json", "*/model.safetensors")  # of a model and its modules
CACHE = pathlib.Path("~/.cache/f2llm_jax")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
COPY_BYTES = 2**26  # in memory at a time


def local_folder(model: str, shared: epath.PathLike | None = None) -> epath.Path:
    """The folder of `model` on this machine's disk.

    A folder of an object store is copied to the user's cache first, file by file. A Hub id is what `share` has put into `shared`, else it
    is downloaded to the cache of huggingface_hub.

    Args:
      model: a local folder, a URL such as `gs://bucket/folder`, or a Hub id.
      shared: a folder that all processes of a run see.

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
    if shared is None or not (_shared(model, shared) / "config.json").exists():
        return _downloaded(model)
    return _copied(_shared(model, shared)) if is_remote(shared) else _shared(model, shared)


def share(model: str, shared: epath.PathLike) -> None:
    """Downloads a Hub model into `shared`, once for all processes of a run; a folder, a checkpoint and a model that is there stay

    One process calls this while the others wait.

    Raises:
      UserError: as `local_folder`.
    """
    target = _shared(model, shared)
    if is_remote(model) or absolute(model).exists() or (target / "config.json").exists():
        return
    source = local_folder(model)
    with new_folder(target, "config.json", overwrite=True) as folder:
        for file in sorted(_files(source), key=lambda file: file.name == "config.json" and file.parent == source):
            _copy(file, folder / str(file.relative_to(source)))


def _shared(model: str, shared: epath.PathLike) -> epath.Path:
    return epath.Path(shared) / "downloads" / model.replace("/", "--")


def _downloaded(model: str) -> epath.Path:
    import huggingface_hub  # only here: training from a folder needs no hub client

    try:
        return epath.Path(huggingface_hub.snapshot_download(model, allow_patterns=list(FILES)))
    except Exception as error:  # offline, unknown name, no permission: the client has a class for each
        raise UserError(
            f"{model!r} is no local folder and could not be downloaded from the Hub ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error


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
