"""Safetensors files written block by block.

By hand because the library's writer wants all of a file's tensors in memory at once.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from f2llm_jax.errors import UserError
from f2llm_jax.model.sizes import DecoderConfig
from f2llm_jax.storage.files import write_json
from f2llm_jax.weights.hf_mapping import LEFT, RIGHT, Entry
from f2llm_jax.weights.parameters import Parameters, Shape, blocks, hf_tensors, parameter_shapes

# What a release may be stored in: numpy's type and safetensors' name of it.
DTYPES = {
    "float32": (np.dtype(np.float32), "F32"),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), "BF16"),
    "float16": (np.dtype(np.float16), "F16"),
}

WriteCallback = Callable[[int], None]  # bytes written since the last call


def stored_bytes(config: DecoderConfig, dtype: str) -> int:
    """Bytes of all tensors of a `Qwen3Model` of this shape."""
    return sum(math.prod(shape) for _, shape in hf_tensors(config)) * DTYPES[dtype][0].itemsize


def write_weights(
    folder: epath.Path, config: DecoderConfig, parameters: Parameters, dtype: str, max_shard_bytes: int, report: WriteCallback
) -> None:
    """One file, or numbered shards and their index.

    Args:
      folder: to write in.
      config: the decoder's shape.
      parameters: of that shape.
      dtype: a key of `DTYPES`.
      max_shard_bytes: most bytes of tensors in one file, unless a single tensor has more.
      report: called with the bytes of each block written.

    Raises:
      UserError: a weight is not finite in `dtype`.
    """
    width = DTYPES[dtype][0].itemsize
    shards = _shards(hf_tensors(config), width, max_shard_bytes)
    pieces = _pieces(parameter_shapes(config), parameters, dtype)
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", shards[0], dtype, pieces, report)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard, dtype, pieces, report)
        weight_map |= dict.fromkeys(shard, name)
    total = stored_bytes(config, dtype)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_factors(path: epath.Path, config: DecoderConfig, parameters: Parameters, dtype: str) -> None:
    """A file of the two factors of the embedding table of a decoder that has them.

    Raises:
      UserError: a weight is not finite in `dtype`.
    """
    shapes = {entry: shape for entry, shape in parameter_shapes(config).items() if entry in (LEFT, RIGHT)}
    path.parent.mkdir(parents=True, exist_ok=True)
    named = {entry.name: shape for entry, shape in shapes.items()}
    _write_file(path, named, dtype, _pieces(shapes, parameters, dtype), lambda size: None)


def header(shapes: Mapping[str, Shape], dtype: str) -> bytes:
    """What a file of these tensors, in this order, begins with: the length of the description, the description."""
    kind, name = DTYPES[dtype]
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    end = 0
    for tensor, shape in shapes.items():
        start, end = end, end + math.prod(shape) * kind.itemsize
        described[tensor] = {"dtype": name, "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(described, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format asks for aligned data
    return len(encoded).to_bytes(8, "little") + encoded


def _shards(tensors: Iterable[tuple[str, Shape]], width: int, max_bytes: int) -> list[dict[str, Shape]]:
    """Tensors in their order, a new shard where the next one would not fit."""
    shards: list[dict[str, Shape]] = [{}]
    filled = 0
    for name, shape in tensors:
        size = math.prod(shape) * width
        if shards[-1] and filled + size > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    return shards


def _pieces(shapes: Mapping[Entry, Shape], parameters: Parameters, dtype: str) -> Iterator[np.ndarray]:
    """The bytes of these parameters, in the Hugging Face layout and the dtype of the release.

    A piece is a tensor, or some rows of one that is not stacked; none reaches into the next tensor.
    """
    kind = DTYPES[dtype][0]
    for entry, shape in shapes.items():
        for start, stop in blocks(parameters, entry, shape):
            block = parameters.read(entry, start, stop)
            for i in range(start, stop) if entry.stacked else (start,):
                ours = block[i - start] if entry.stacked else block
                _check_finite(entry.name.format(i=i), ours, dtype)
                yield entry.to_hf(ours.astype(kind)).reshape(-1).view(np.uint8)


def _check_finite(name: str, ours: np.ndarray, dtype: str) -> None:
    with np.errstate(over="ignore"):  # reported here, by name
        extremes = np.array([ours.min(), ours.max()]).astype(DTYPES[dtype][0])  # rounding keeps order, NaN is contagious
    if not np.isfinite(extremes.astype(np.float32)).all():
        raise UserError(f"{name} holds values that are not finite in {dtype}; export as float32 to look")


def _write_file(path: epath.Path, shapes: Mapping[str, Shape], dtype: str, pieces: Iterator[np.ndarray], report: WriteCallback) -> None:
    """A file of the next pieces, as many as `shapes` has bytes; the iterator continues in the next shard."""
    left = sum(math.prod(shape) for shape in shapes.values()) * DTYPES[dtype][0].itemsize
    with path.open("wb") as file:
        file.write(header(shapes, dtype))
        while left:
            piece = next(pieces)
            file.write(piece.data)
            left -= piece.size
            report(piece.size)
