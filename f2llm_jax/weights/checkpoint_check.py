"""Is a checkpoint as it was written? Reads every chunk of its arrays, each of which carries a CRC-32C."""

import tensorstore as ts
from etils import epath

from f2llm_jax.errors import UserError
from f2llm_jax.storage.files import read_json, unseal
from f2llm_jax.weights.checkpoint_reader import file_store

BLOCK_BYTES = 2**28  # of an array in memory at once
ITEMS = ("params", "optimizer")


def checkpoint_damage(checkpoint: epath.Path) -> str:
    """What is wrong with `WORKDIR/checkpoints/STEP`, "" if nothing is; reads all of it."""
    for item in ITEMS:
        folder = checkpoint / item
        if not folder.exists():
            continue
        try:
            _read_arrays(folder)
        except (ValueError, KeyError, OSError) as error:
            return f"{folder} cannot be read: {str(error).splitlines()[0]}"
    if not (checkpoint / "params").exists():
        return f"{checkpoint / 'params'} is missing"
    file = checkpoint / "_CHECKPOINT_METADATA"
    try:
        unseal(read_json(file, kind=dict)["custom_metadata"], file)
    except (UserError, KeyError, TypeError, AttributeError) as error:
        return f"{file} cannot be read: {error}"
    return ""


def good_steps(workdir: epath.Path, below: int) -> list[int]:
    """Steps below `below` whose checkpoints are undamaged, newest first."""
    folder = workdir / "checkpoints"
    steps = sorted((int(path.name) for path in folder.iterdir() if path.name.isdigit() and int(path.name) < below), reverse=True)
    return [step for step in steps if not checkpoint_damage(folder / str(step))]


def _read_arrays(folder: epath.Path) -> None:
    base = {"driver": "ocdbt", "base": file_store(folder)}
    names = [
        key.decode().removesuffix("/zarr.json") for key in ts.KvStore.open(base).result().list().result() if key.endswith(b"zarr.json")
    ]
    if not names:
        raise ValueError("it holds no array")
    for name in names:
        array = ts.open({"driver": "zarr3", "kvstore": {**base, "path": f"{name}/"}}, read=True).result()
        if not array.rank:
            array.read().result()
            continue
        size = array.dtype.numpy_dtype.itemsize * max(1, array.size // max(1, array.shape[0]))
        chunk = int((array.chunk_layout.read_chunk.shape or (1,))[0] or 1)
        rows = max(chunk, BLOCK_BYTES // size // chunk * chunk)
        for start in range(0, array.shape[0], rows):
            array[start : min(start + rows, array.shape[0])].read().result()
