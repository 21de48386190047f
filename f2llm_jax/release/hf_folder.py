"""A model as a Hugging Face folder: weights, config.json, tokenizer; with the files of the neighbouring modules it is a release.

Everything is derived from the model at hand and nothing copied from a base model: releases of this very family went out with
the `layer_types` and the pooling width of another size (codefuse-ai/F2LLM-v2-80M and -160M, discussions on the Hub).
"""

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from flax import nnx

from f2llm_jax.model.decoder import INITIALIZER_RANGE, abstract_decoder
from f2llm_jax.model.hf_import import expected_tensors
from f2llm_jax.model.origin import ModelOrigin
from f2llm_jax.model.sizes import DecoderConfig
from f2llm_jax.model.stored import flatten
from f2llm_jax.model.weights import TABLE
from f2llm_jax.release import card, sentence_transformers
from f2llm_jax.release.folder import ReleaseError, complete_or_absent, write_json
from f2llm_jax.text import Tokenizer

# What a release may be stored in: numpy's type and safetensors' name of it.
DTYPES = {
    "float32": (np.dtype(np.float32), "F32"),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), "BF16"),
    "float16": (np.dtype(np.float16), "F16"),
}

Shape = tuple[int, ...]


def export(origin: ModelOrigin, out: epath.PathLike, *, dtype: str, max_shard_bytes: int, overwrite: bool) -> None:
    """Writes the release of a model: every file that sentence-transformers, transformers, TEI, vLLM and llama.cpp read.

    Args:
      origin: the model.
      out: folder to make; complete or absent.
      dtype: a key of `DTYPES`. float32 and, for weights that were imported from it, bfloat16 lose nothing.
      max_shard_bytes: most bytes of tensors in one file, unless a single tensor has more.
      overwrite: replace an older release at `out`.

    Raises:
      ReleaseError: `out` may not be written, or a weight is not finite in `dtype`.
      TokenizerError: the model has no tokenizer or one that does not fit it.
    """
    tokenizer = origin.matching_tokenizer()
    with complete_or_absent(out, sentence_transformers.MODULES_FILE, overwrite) as folder:
        write_json(folder / "config.json", model_config(origin.config, tokenizer, dtype, origin.matryoshka_dims))
        write_tokenizer(folder, tokenizer, origin.text_limit)
        sentence_transformers.write_modules(folder, origin.config.hidden_size, origin.text_limit)
        card.write_card(folder, origin)
        write_weights(folder, origin.config, origin.load(None), dtype, max_shard_bytes)


def model_config(config: DecoderConfig, tokenizer: Tokenizer, dtype: str, matryoshka_dims: tuple[int, ...]) -> dict[str, Any]:
    """The contents of `config.json`, for transformers 4 (`torch_dtype`, `rope_theta`) and 5 (`dtype`, `rope_parameters`)."""
    layers = config.num_hidden_layers
    return {
        "architectures": ["Qwen3Model"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": INITIALIZER_RANGE,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": layers,
        "layer_types": ["full_attention"] * layers,
        "tie_word_embeddings": True,
        "use_cache": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "dtype": dtype,
        "torch_dtype": dtype,
        # vLLM and SGLang shorten embeddings only for a model that says it was trained for it.
        **({"is_matryoshka": True, "matryoshka_dimensions": list(matryoshka_dims)} if matryoshka_dims else {}),
    }


def write_tokenizer(folder: epath.Path, tokenizer: Tokenizer, text_limit: int) -> None:
    """The tokenizer's files; ids come from tokenizer.json alone, the others repeat it for readers that look there.

    Padding stands on the right. Pooling that reads the attention mask (sentence-transformers, the card's snippet) gives the
    same vectors either way; but the snippet on the cards of this family takes position `attention_mask.sum(1) - 1`, which
    is the EOS only so, and transformers counts positions from the row's start, padding included, so only so are they those
    of training.
    """
    tokenizer.save(folder)
    written = {**tokenizer.config, "padding_side": "right", "model_max_length": text_limit}
    if written.get("tokenizer_class") in (None, "TokenizersBackend"):
        written["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 knows too
    write_json(folder / "tokenizer_config.json", written)
    roles = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token", "additional_special_tokens")
    write_json(folder / "special_tokens_map.json", {role: written[role] for role in roles if written.get(role)})
    parts = json.loads(tokenizer.backend.to_str())
    write_json(folder / "added_tokens.json", {token["content"]: token["id"] for token in parts["added_tokens"]})
    if parts["model"]["type"] == "BPE":
        write_json(folder / "vocab.json", parts["model"]["vocab"])
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in parts["model"]["merges"]]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


def write_weights(folder: epath.Path, config: DecoderConfig, params: nnx.State, dtype: str, max_shard_bytes: int) -> None:
    """One safetensors file, or numbered shards and their index, written tensor by tensor.

    Raises:
      ReleaseError: a weight is not finite in `dtype`.
    """
    width = DTYPES[dtype][0].itemsize
    shards = _shards(expected_tensors(abstract_decoder(config)[1], config), width, max_shard_bytes)
    arrays = _tensors(params, dtype)
    if len(shards) == 1:
        _write_safetensors(folder / "model.safetensors", shards[0], dtype, arrays)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(folder / name, shard, dtype, arrays)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(math.prod(shape) for shard in shards for shape in shard.values()) * width
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


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


def _tensors(params: nnx.State, dtype: str) -> Iterator[np.ndarray]:
    """Every tensor in the order of `expected_tensors`, in the Hugging Face layout and the dtype of the release."""
    flat = flatten(params)
    for entry in TABLE:
        ours = np.asarray(flat["/".join(entry.path)])
        for layer, one in enumerate(ours if entry.stacked else [ours]):
            with np.errstate(over="ignore"):  # reported below, by name
                theirs = entry.to_hf(one).astype(DTYPES[dtype][0])
            if not np.isfinite(theirs).all():
                raise ReleaseError(f"{entry.name.format(i=layer)} holds values that are not finite in {dtype}; export as float32 to look")
            yield theirs


def _write_safetensors(path: epath.Path, shapes: dict[str, Shape], dtype: str, arrays: Iterator[np.ndarray]) -> None:
    """A safetensors file of the next `len(shapes)` arrays: length of the header, header, then the bytes, one tensor at a time.

    By hand because the library's writer wants all of a file's tensors in memory at once.
    """
    kind, name = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    end = 0
    for tensor, shape in shapes.items():
        start, end = end, end + math.prod(shape) * kind.itemsize
        header[tensor] = {"dtype": name, "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format asks for aligned data
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, array in zip(shapes, arrays, strict=False):  # the same iterator goes on in the next shard
            file.write(array.tobytes())
