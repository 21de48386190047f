"""The settings of a Hugging Face folder: the decoder's shape, and what its sentence-transformers files say of its vectors.

Each is read where the newest software writes it, then in older places. Whatever would give other vectors elsewhere is refused by name
(`hf_settings`).
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from safetensors import safe_open

from f2llm_jax import hf_settings
from f2llm_jax.errors import UserError
from f2llm_jax.hf_settings import Note
from f2llm_jax.model.sizes import DecoderConfig
from f2llm_jax.storage.files import read_json
from f2llm_jax.weights.embedding_config import EmbeddingConfig

DEFAULT_ROPE_THETA = 10_000.0  # transformers 4 and 5 where no file names one
ADAPTER_FILE = "adapter_config.json"
# Where sentence-transformers 2 to 6 keep the settings of their first module.
TRANSFORMER_FILES = tuple(
    f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
DOCUMENT_PROMPTS = ("document", "passage", "corpus")  # of these the first that a folder has is `encode_document`'s
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")


@dataclasses.dataclass(frozen=True)
class FolderSettings:
    """Everything that a folder says."""

    decoder: DecoderConfig
    embedding: EmbeddingConfig
    notes: tuple[Note, ...]  # what becomes of each setting


def read_settings(folder: epath.Path) -> FolderSettings:
    """The settings of a local folder.

    Raises:
      UserError: a file is missing or unreadable, or describes something that this project would compute differently.
    """
    if (folder / ADAPTER_FILE).exists():
        raise UserError(
            f"{folder} holds a LoRA adapter ({ADAPTER_FILE}) and not a whole model; merge it into its base model with peft's "
            "`merge_and_unload()` and save the result"
        )
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{path} does not exist; point to a folder made by `save_pretrained` or `convert to-hf`")
    raw = read_json(path, kind=dict)
    notes = hf_settings.check(path, "config.json", raw, hf_settings.CONFIG)
    decoder = _decoder(path, raw)
    dims = _dims(path, raw.get("matryoshka_dimensions") or (), decoder.hidden_size)
    embedding, others = _sentence_transformers(folder, decoder, dims) if (folder / "modules.json").exists() else (EmbeddingConfig(), [])
    limit, source = _limit(folder, decoder)
    notes += [*others, source]
    embedding = dataclasses.replace(embedding, matryoshka_dims=dims, max_length=limit)
    return FolderSettings(decoder, embedding, tuple(notes))


def _decoder(path: epath.Path, raw: Mapping[str, Any]) -> DecoderConfig:
    names = [field.name for field in dataclasses.fields(DecoderConfig) if field.name not in ("rope_theta", "table_rank")]
    if missing := [name for name in names if name not in raw]:
        raise UserError(f"{path}: missing {', '.join(missing)}")
    values = {name: raw[name] for name in names}
    if values["num_key_value_heads"] is None:  # as transformers reads it
        values["num_key_value_heads"] = values["num_attention_heads"]
    wrong = [f"{name} is {value!r}" for name, value in values.items() if name != "rms_norm_eps" and (type(value) is not int or value < 1)]
    if type(values["rms_norm_eps"]) not in (int, float) or values["rms_norm_eps"] <= 0:
        wrong.append(f"rms_norm_eps is {values['rms_norm_eps']!r}")
    layer_types = raw.get("layer_types")
    if not wrong and layer_types is not None and list(layer_types) != ["full_attention"] * values["num_hidden_layers"]:
        wrong.append(f"layer_types is {layer_types!r}, must be {values['num_hidden_layers']} times 'full_attention'")
    if wrong:
        raise UserError(f"{path}: not the shape of a Qwen3 decoder: {'; '.join(wrong)}")
    return DecoderConfig(**values, rope_theta=_rope_theta(path, raw))


def _rope_theta(path: epath.Path, raw: Mapping[str, Any]) -> float:
    """transformers 5 writes `rope_parameters`, older ones `rope_theta` and `rope_scaling`."""
    found = {}
    for name in ("rope_parameters", "rope_scaling"):
        group = raw.get(name)
        if not group:
            continue
        neutral = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}
        wrong = {key: value for key, value in group.items() if key != "rope_theta" and (key not in neutral or value != neutral[key])}
        if wrong:
            raise UserError(f"{path}: {name} holds {json.dumps(wrong)}, which this project does not compute; only rope_type 'default' is")
        if group.get("rope_theta") is not None:
            found[f"{name}.rope_theta"] = group["rope_theta"]
    if raw.get("rope_theta") is not None:
        found["rope_theta"] = raw["rope_theta"]
    if wrong := [f"{name} is {value!r}" for name, value in found.items() if type(value) not in (int, float) or value <= 0]:
        raise UserError(f"{path}: {'; '.join(wrong)}, must be a positive number")
    if len(set(found.values())) > 1:
        told = ", ".join(f"{name} {value}" for name, value in found.items())
        raise UserError(f"{path} names several bases of the rotary frequencies ({told}), of which readers take different ones; keep one")
    return float(next(iter(found.values()), DEFAULT_ROPE_THETA))


def _dims(path: epath.Path, dims: Any, width: int) -> tuple[int, ...]:
    if not isinstance(dims, list | tuple) or any(type(dim) is not int or not 1 <= dim <= width for dim in dims):
        raise UserError(f"{path}: matryoshka_dimensions is {dims!r}, must be a list of widths of at most hidden_size {width}")
    return tuple(sorted(dims))


def _limit(folder: epath.Path, decoder: DecoderConfig) -> tuple[int, Note]:
    """Tokens at which sentence-transformers cuts a text, and where it says so."""
    positions = decoder.max_position_embeddings
    for name in TRANSFORMER_FILES:
        path = folder / name
        if path.exists() and (limit := read_json(path, kind=dict).get("max_seq_length")) is not None:
            if type(limit) is not int or not 1 <= limit <= positions:
                raise UserError(f"{path}: max_seq_length is {limit!r}, must be from 1 to config.json's max_position_embeddings {positions}")
            return limit, Note(name, "max_seq_length", limit, "computed", "taken as the longest text")
    path = folder / "tokenizer_config.json"
    limit = read_json(path, kind=dict).get("model_max_length") if path.exists() else None
    if isinstance(limit, int | float) and not isinstance(limit, bool) and 1 <= limit <= positions:
        return int(limit), Note(path.name, "model_max_length", limit, "computed", "taken as the longest text")
    return positions, Note("config.json", "max_position_embeddings", positions, "computed", "taken as the longest text")


def _sentence_transformers(folder: epath.Path, decoder: DecoderConfig, dims: tuple[int, ...]) -> tuple[EmbeddingConfig, list[Note]]:
    path = folder / "modules.json"
    modules = read_json(path)
    if not isinstance(modules, list) or not all(isinstance(one, dict) and {"type", "path"} <= one.keys() for one in modules):
        raise UserError(f"{path} is not a list of modules with a type and a path; save the model again with sentence-transformers")
    kinds = [one["type"].rpartition(".")[2] if one["type"].startswith("sentence_transformers.") else one["type"] for one in modules]
    expected = [kind for kind in kinds if kind != "Dropout"]  # which acts in training only
    if expected[:2] != ["Transformer", "Pooling"] or expected[2:] not in ([], ["Normalize"], ["Dense"], ["Dense", "Normalize"]):
        raise UserError(
            f"{path}: {' -> '.join(kinds)} is not computed here; only Transformer -> Pooling, then a Dense that keeps the first "
            "dimensions and a Normalize if need be"
        )
    notes, truncate_dim = [], None
    for kind, module in zip(kinds, modules, strict=True):
        notes.append(Note("modules.json", kind, module["path"], "computed" if kind != "Dropout" else "harmless", "a module"))
        inner = folder / module["path"]
        if kind == "Transformer":
            if module["path"] not in ("", "."):
                raise UserError(
                    f"{path}: the Transformer lies in {module['path']!r}; move its files next to modules.json and empty the path"
                )
            notes += [one for name in TRANSFORMER_FILES for one in _checked(folder, name, hf_settings.TRANSFORMER)]
        elif kind == "Pooling":
            notes += _pooling(folder, f"{module['path']}/config.json", decoder.hidden_size)
        elif kind == "Normalize":
            notes += _checked(folder, f"{module['path']}/config.json", hf_settings.NORMALIZE)
        elif kind == "Dense":
            truncate_dim = _kept_width(inner, decoder.hidden_size)
    prompts, more = _prompts(folder, normalized="Normalize" in kinds)
    if truncate_dim == decoder.hidden_size:
        truncate_dim = None
    return EmbeddingConfig(matryoshka_dims=dims, prompts=prompts, truncate_dim=truncate_dim), [*notes, *more]


def _checked(folder: epath.Path, name: str, rules: Mapping[str, hf_settings.Rule]) -> list[Note]:
    path = folder / name
    return hf_settings.check(path, name, read_json(path, kind=dict), rules) if path.exists() else []


def _pooling(folder: epath.Path, name: str, width: int) -> list[Note]:
    path = folder / name
    settings = read_json(path, kind=dict)
    notes = hf_settings.check(path, name, settings, hf_settings.POOLING)
    if "pooling_mode" not in settings and not settings.get("pooling_mode_lasttoken"):
        raise UserError(f"{path} pools by the mean (it names no other mode); only the last token is computed, pooling_mode_lasttoken")
    declared = settings.get("embedding_dimension", settings.get("word_embedding_dimension", width))
    if declared != width:
        raise UserError(f"{path} pools vectors of {declared} dimensions, but config.json has hidden_size {width}; write that")
    return notes


def _kept_width(folder: epath.Path, width: int) -> int:
    """How many first dimensions a Dense layer keeps, if that is all it does."""
    path = folder / "config.json"
    settings = read_json(path, kind=dict)
    identity = settings.get("activation_function", "torch.nn.modules.activation.Tanh").rpartition(".")[2]
    problems = [f"activation_function {identity}"] if identity != "Identity" else []
    problems += ["bias"] if settings.get("bias", True) else []
    problems += ["use_residual"] if settings.get("use_residual") else []
    problems += [
        f"{key} {settings[key]!r}"
        for key in ("module_input_name", "module_output_name")
        if settings.get(key) not in (None, "sentence_embedding")
    ]
    if not problems:
        weights = folder / "model.safetensors"
        if not weights.exists():
            raise UserError(f"{folder} has no model.safetensors; save the model again with sentence-transformers")
        with safe_open(weights, framework="numpy") as file:
            weight = file.get_tensor("linear.weight")
        if weight.shape[1] == width and np.array_equal(weight, np.eye(*weight.shape, dtype=weight.dtype)):
            return weight.shape[0]
        problems.append("a weight that is not the identity's first rows")
    raise UserError(f"{folder} is a Dense layer with {', '.join(problems)}, which this project does not compute; train or serve without it")


def _prompts(folder: epath.Path, *, normalized: bool) -> tuple[dict[str, str], list[Note]]:
    name = "config_sentence_transformers.json"
    path = folder / name
    settings = read_json(path, kind=dict) if path.exists() else {}
    notes = hf_settings.check(path, name, settings, hf_settings.SENTENCE_TRANSFORMERS)
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict) or any(not isinstance(value, str | None) for value in prompts.values()):
        raise UserError(f"{path}: prompts is {prompts!r}, must be an object of texts by name")
    prompts = {key: value or "" for key, value in prompts.items()}
    if prompts.get(first := next((name for name in DOCUMENT_PROMPTS if name in prompts), "")):
        raise UserError(
            f"{path}: the prompt {first!r} goes before every document in sentence-transformers, but documents have none here; set it to "
            "an empty text if the model was not trained with it"
        )
    default = settings.get("default_prompt_name")
    if default is not None and prompts.get(default) != "":
        raise UserError(
            f"{path}: default_prompt_name {default!r} goes before every text in sentence-transformers, but not here; "
            "set it to null and name the prompt where it belongs"
        )
    similarity = settings.get("similarity_fn_name") or "cosine"
    if similarity not in SIMILARITIES:
        raise UserError(f"{path}: similarity_fn_name {similarity!r} is none of {', '.join(SIMILARITIES)}")
    if similarity != "cosine" and not normalized:
        raise UserError(
            f"{path}: similarity_fn_name {similarity!r} of vectors that no Normalize module brings to length 1, which "
            "they have here; set it to 'cosine' if that is how the model was trained"
        )
    return {"query": "", "document": "", **prompts}, notes
