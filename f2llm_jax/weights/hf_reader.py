"""A Hugging Face folder (or Hub id) into sharded fp32 parameters, tensor by tensor.

Each device's share is cut out of the files on its own, so no host reads more than it keeps and memory is bounded by the
parameters plus one shard. `safetensors` only: no pickle, no torch, no remote code.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping

import jax
import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors then reads
import numpy as np
from flax import nnx
from safetensors import safe_open

from f2llm_jax.errors import UserError
from f2llm_jax.model.decoder import abstract_decoder
from f2llm_jax.model.sizes import DecoderConfig
from f2llm_jax.weights.hf_mapping import TABLE, Entry
from f2llm_jax.weights.parameters import Shape, hf_tensors, parameter_shapes

FLOAT_DTYPES = ("F32", "BF16", "F16")
UNUSED = frozenset({"lm_head.weight"})  # Qwen3ForCausalLM stores a head that an embedding model never reads


class ModelFolderError(UserError):
    """A folder that does not hold a Qwen3 model this project can train; the message lists everything that is wrong."""


def resolve(model: str) -> pathlib.Path:
    """The local folder of `model`: itself if it is one, else the Hub repository of that name, downloaded.

    Raises:
      ModelFolderError: neither exists or the Hub cannot be reached.
    """
    folder = pathlib.Path(model)
    if folder.is_dir():
        return folder
    import huggingface_hub  # only here: training from a local folder needs no hub client

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.txt"]))
    except Exception as error:  # offline, unknown name, no permission: the client has a class for each
        raise ModelFolderError(
            f"{model!r} is no local folder and could not be downloaded from the Hub ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error


def read_config(folder: pathlib.Path) -> DecoderConfig:
    """The decoder's shape from `config.json`.

    Raises:
      ModelFolderError: the file is missing, or it describes something this decoder would compute differently.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ModelFolderError(f"{path} does not exist; point to a folder made by `save_pretrained` or `convert to-hf`")
    raw = _read_json(path)
    rope = raw.get("rope_parameters") or {"rope_type": "default", "rope_theta": raw.get("rope_theta", 1e6)}
    must_be = {
        "model_type": (raw.get("model_type"), "qwen3"),
        "attention_bias": (raw.get("attention_bias", False), False),
        "hidden_act": (raw.get("hidden_act", "silu"), "silu"),
        "rope_scaling": (raw.get("rope_scaling"), None),
        "rope_parameters.rope_type": (rope.get("rope_type", "default"), "default"),
        "use_sliding_window": (raw.get("use_sliding_window", False), False),
    }
    if wrong := [f"{key} is {got!r}, must be {want!r}" for key, (got, want) in must_be.items() if got != want]:
        raise ModelFolderError(f"{path}: not a plain Qwen3 decoder: {'; '.join(wrong)}")
    names = [
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "rms_norm_eps", "max_position_embeddings",
    ]  # fmt: skip
    if missing := [name for name in names if name not in raw]:
        raise ModelFolderError(f"{path}: missing {', '.join(missing)}")
    return DecoderConfig(**{name: raw[name] for name in names}, rope_theta=float(rope["rope_theta"]))


def read_training_facts(folder: pathlib.Path) -> tuple[tuple[int, ...], int | None]:
    """Matryoshka widths, ascending (empty if unknown), and the longest text in tokens (None if unknown), as a release declares them."""
    dims = _read_json(folder / "config.json").get("matryoshka_dimensions") or ()
    sentences = folder / "sentence_bert_config.json"
    return tuple(sorted(dims)), _read_json(sentences).get("max_seq_length") if sentences.exists() else None


def _read_json(path: pathlib.Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ModelFolderError(f"{path} is not readable JSON ({error}); download or export it again") from error


class FolderParameters:
    """The parameters of an opened folder, cut out of its files as they are asked for."""

    def __init__(self, tensors: Mapping[str, object], shapes: Mapping[Entry, Shape]):
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
def open_params(folder: pathlib.Path, config: DecoderConfig) -> Iterator[FolderParameters]:
    """Parameters from the folder's safetensors (one file or many, with or without the `model.` prefix).

    Raises:
      ModelFolderError: tensors are unknown, missing, misshapen or not floating point; all are listed at once.
    """
    with contextlib.ExitStack() as stack:
        tensors = _open(folder, stack)
        _check(folder, tensors, config)
        yield FolderParameters(tensors, parameter_shapes(config))


def load_params(folder: pathlib.Path, config: DecoderConfig, mesh: jax.sharding.Mesh | None = None) -> nnx.State:
    """The same parameters, fp32, on the mesh or on this machine's first device.

    Raises:
      ModelFolderError: as `open_params`.
    """
    _, abstract = abstract_decoder(config, mesh)
    with open_params(folder, config) as parameters:
        loaded = {entry.path: _load(parameters, entry, _leaf(abstract, entry)) for entry in TABLE}
    return nnx.map_state(lambda path, leaf: leaf.replace(loaded[path]), abstract)


def _leaf(state: nnx.State, entry: Entry) -> jax.ShapeDtypeStruct:
    for key in entry.path:
        state = state[key]
    return state.get_value()


def _open(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, object]:
    """Lazy slices of every tensor by its `Qwen3Model` name."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelFolderError(f"{folder} holds no *.safetensors; convert other formats with `save_pretrained(safe_serialization=True)`")
    tensors = {}
    for file in files:
        try:
            handle = stack.enter_context(safe_open(file, framework="numpy"))
        except Exception as error:  # safetensors raises its own class without a common base
            raise ModelFolderError(f"{file} is not a readable safetensors file ({error}); download or export it again") from error
        tensors |= {name.removeprefix("model."): handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (no __iter__)
    return {name: tensor for name, tensor in tensors.items() if name not in UNUSED}


def _check(folder: pathlib.Path, tensors: Mapping[str, object], config: DecoderConfig) -> None:
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
        raise ModelFolderError(f"{folder}: the weights do not fit config.json:\n  " + "\n  ".join(problems))


def _load(parameters: FolderParameters, entry: Entry, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """One of our parameters, each shard read from the slices it needs."""
    if leaf.sharding is None:
        return jax.numpy.asarray(parameters.read(entry, 0, leaf.shape[0]))
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: parameters.read_index(entry, index))


def _read(entry: Entry, tensor: object, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
    part = tensor[entry.hf_index(index, shape)].astype(np.float32)
    return entry.from_hf(part, tuple(len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True)))
