"""The weights of a Hugging Face folder as sharded fp32 parameters, tensor by tensor.

Each device's share is cut out of the files on its own, so no host reads more than it keeps and memory is bounded by the
parameters plus one shard. `safetensors` only: no pickle, no torch, no remote code.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors then reads
import numpy as np
from etils import epath
from flax import nnx
from safetensors import safe_open

from f2llm_jax.errors import UserError
from f2llm_jax.model.decoder import abstract_decoder
from f2llm_jax.model.sizes import DecoderConfig
from f2llm_jax.storage.folders import MADE, check_whole
from f2llm_jax.weights.factors import FILE
from f2llm_jax.weights.hf_mapping import EMBEDDING, Entry
from f2llm_jax.weights.parameters import Shape, hf_tensors, parameter_shapes

FLOAT_DTYPES = ("F32", "BF16", "F16")
UNUSED = frozenset({"lm_head.weight"})  # Qwen3ForCausalLM stores a head that an embedding model never reads


class FolderParameters:
    """The parameters of an opened folder, cut out of its files as they are asked for."""

    def __init__(self, tensors: Mapping[str, Any], shapes: Mapping[Entry, Shape]):
        self._tensors, self._shapes = tensors, shapes

    def unit(self, entry: Entry) -> int:
        """One: safetensors are not compressed."""
        del entry
        return 1

    def read(self, entry: Entry, start: int, stop: int) -> np.ndarray:
        """Our parameter's `[start:stop]` along its first axis, float32."""
        whole = (slice(None),) * (len(self._shapes[entry]) - 1)
        return self.read_index(entry, (slice(start, stop), *whole))

    def read_index(self, entry: Entry, index: tuple[slice, ...]) -> np.ndarray:
        """Our parameter's `[index]`, float32; only what it needs is read."""
        shape = self._shapes[entry]
        if not entry.stacked:
            return _read(entry, self._tensors[entry.name], index, shape)
        layers = range(*index[0].indices(shape[0]))
        return np.stack([_read(entry, self._tensors[entry.name.format(i=i)], index[1:], shape[1:]) for i in layers])


@contextlib.contextmanager
def open_params(folder: epath.Path, config: DecoderConfig) -> Iterator[FolderParameters]:
    """Parameters from the folder's safetensors (one file or many, with or without the `model.` prefix).

    Raises:
      UserError: tensors are unknown, missing, misshapen or not floating point; all are listed at once.
    """
    check_whole(folder, f"Write it again, or delete {folder}/{MADE} if you changed it yourself", suffix=".safetensors")
    with contextlib.ExitStack() as stack:
        tensors = _open(folder, stack, factored=bool(config.table_rank))
        _check(folder, tensors, config)
        yield FolderParameters(tensors, parameter_shapes(config))


def load_params(folder: epath.Path, config: DecoderConfig, mesh: jax.sharding.Mesh | None = None) -> nnx.State:
    """The same parameters, fp32, on the mesh or on this machine's first device.

    Raises:
      UserError: as `open_params`.
    """
    _, abstract = abstract_decoder(config, mesh)
    with open_params(folder, config) as parameters:
        loaded = {entry.path: _load(parameters, entry, _leaf(abstract, entry)) for entry in parameter_shapes(config)}
    return nnx.map_state(lambda path, leaf: leaf.replace(loaded[path]), abstract)


def _leaf(state: Any, entry: Entry) -> jax.ShapeDtypeStruct:
    for key in entry.path:
        state = state[key]
    return state.get_value()


def _open(folder: epath.Path, stack: contextlib.ExitStack, factored: bool) -> dict[str, Any]:
    """Lazy slices of every tensor by its `Qwen3Model` name; with `factored` the factors of the embedding table instead of the table."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no *.safetensors; convert other formats with `save_pretrained(safe_serialization=True)`")
    tensors: dict[str, Any] = {}
    places: dict[str, str] = {}
    for file in [*files, folder / FILE] if factored else files:
        try:
            handle = stack.enter_context(safe_open(file, framework="numpy"))
        except Exception as error:  # safetensors raises its own class without a common base
            raise UserError(f"{file} is not a readable safetensors file ({error}); download or export it again") from error
        for stored in handle.keys():  # noqa: SIM118 (no __iter__)
            name, place = stored.removeprefix("model."), f"{file.name}: {stored}"
            if name in tensors:
                raise UserError(f"{folder} holds {name} twice, as {places[name]} and as {place}; remove the one that is not to be read")
            tensors[name], places[name] = handle.get_slice(stored), place
    adapters = [place for name, place in places.items() if ".lora_" in name]
    if adapters:
        raise UserError(f"{folder} holds a LoRA adapter ({adapters[0]}); merge it with peft's `merge_and_unload()` and save that")
    unused = UNUSED | {EMBEDDING.name} if factored else UNUSED
    return {name: tensor for name, tensor in tensors.items() if name not in unused}


def _check(folder: epath.Path, tensors: Mapping[str, Any], config: DecoderConfig) -> None:
    expected = dict(hf_tensors(config))
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in tensors]
    for name, tensor in tensors.items():
        shape = tuple(tensor.get_shape())
        if name not in expected:
            problems.append(f"unknown {name} {list(shape)}")
        elif shape != expected[name]:
            problems.append(f"{name} is {list(shape)}, must be {list(expected[name])}")
        elif tensor.get_dtype() not in FLOAT_DTYPES:
            problems.append(f"{name} is stored as {tensor.get_dtype()}, must be one of {', '.join(FLOAT_DTYPES)}")
    if problems:
        raise UserError(f"{folder}: the weights do not fit config.json:\n  " + "\n  ".join(problems))


def _load(parameters: FolderParameters, entry: Entry, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """One of our parameters, each shard read from the slices it needs."""
    if leaf.sharding is None:
        return jax.numpy.asarray(parameters.read(entry, 0, leaf.shape[0]))
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: parameters.read_index(entry, index or ()))


def _read(entry: Entry, tensor: Any, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
    part = tensor[entry.hf_index(index, shape)].astype(np.float32)
    return entry.from_hf(part, tuple(len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True)))
