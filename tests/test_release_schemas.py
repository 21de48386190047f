"""The JSON files under the strict schemas of those who read them, for a trained, a merged, a cut and a bfloat16 release.

Each schema is what the reader's own parser requires: text-embeddings-inference's `STConfig` and `PoolConfig`
(router/src/lib.rs: no default for the named fields), vLLM's pooling and matryoshka keys, sentence-transformers' legacy
modules (2.x to 6.x), llama.cpp's converter (conversion/base.py and qwen.py).
"""

import dataclasses
import json
import math
import types
import typing

import gguf
import huggingface_hub
import pytest
import sentence_transformers
import tiny
import yaml
from safetensors import safe_open

from f2llm_jax.release import hf_folder
from f2llm_jax.release.merge import merge
from f2llm_jax.release.verify import compare


@dataclasses.dataclass(frozen=True)
class Module:
    """modules.json of sentence-transformers, before 5.4 and after."""

    idx: int
    name: str
    path: str
    type: str


@dataclasses.dataclass(frozen=True)
class PoolConfig:
    """text-embeddings-inference; the last three are sentence-transformers'."""

    word_embedding_dimension: int
    pooling_mode_cls_token: bool
    pooling_mode_mean_tokens: bool
    pooling_mode_max_tokens: bool
    pooling_mode_mean_sqrt_len_tokens: bool
    pooling_mode_weightedmean_tokens: bool
    pooling_mode_lasttoken: bool
    include_prompt: bool


@dataclasses.dataclass(frozen=True)
class STConfig:
    """sentence_bert_config.json of text-embeddings-inference."""

    max_seq_length: int
    do_lower_case: bool


@dataclasses.dataclass(frozen=True)
class Prompts:
    """config_sentence_transformers.json; TEI reads `prompts` and `default_prompt_name`."""

    __version__: dict
    prompts: dict
    default_prompt_name: str | None
    similarity_fn_name: str


@dataclasses.dataclass(frozen=True)
class Qwen3:
    """config.json: text-embeddings-inference's `Qwen3Config`, vLLM, transformers 4 and 5, llama.cpp's converter."""

    architectures: list
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    max_position_embeddings: int
    initializer_range: float
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: None
    rope_parameters: dict
    attention_bias: bool
    attention_dropout: float
    use_sliding_window: bool
    sliding_window: None
    max_window_layers: int
    layer_types: list
    tie_word_embeddings: bool
    use_cache: bool
    bos_token_id: None
    eos_token_id: int
    pad_token_id: int
    dtype: str
    torch_dtype: str
    transformers_version: str
    is_matryoshka: bool
    matryoshka_dimensions: list


def parsed(schema, content):
    """Every field there and of its type, and no other."""
    hints = typing.get_type_hints(schema)
    assert content.keys() == hints.keys()
    for name, kind in hints.items():
        kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        assert type(content[name]) in kinds, (name, content[name])
    return schema(**content)


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module", params=["trained", "merged", "cut", "bfloat16"])
def folder(request, tmp_path_factory):
    origin = tiny.origin(tmp_path_factory.mktemp("tokenizer"))
    source = merge([origin, origin]) if request.param == "merged" else origin
    form = {"cut": hf_folder.ReleaseForm(truncate_dim=32), "bfloat16": hf_folder.ReleaseForm(dtype="bfloat16")}.get(
        request.param, hf_folder.ReleaseForm()
    )
    out = tmp_path_factory.mktemp("release") / request.param
    hf_folder.export(source, out, form)
    return out


def test_sentence_transformers_modules(folder):
    modules = [parsed(Module, module) for module in read(folder / "modules.json")]
    cut = ["Dense"] if folder.name == "cut" else []
    assert [m.type.removeprefix("sentence_transformers.models.") for m in modules] == ["Transformer", "Pooling", *cut, "Normalize"]
    assert [m.idx for m in modules] == list(range(len(modules))) and all(m.name == str(m.idx) for m in modules)
    assert all((folder / m.path / "config.json").exists() for m in modules if not m.type.endswith("Normalize"))
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    assert model.encode(["a"]).shape == (1, 32 if cut else 64)


def test_text_embeddings_inference_and_vllm(folder):
    config = parsed(Qwen3, read(folder / "config.json"))
    pooling = parsed(PoolConfig, read(folder / "1_Pooling/config.json"))
    limits = parsed(STConfig, read(folder / "sentence_bert_config.json"))
    prompts = parsed(Prompts, read(folder / "config_sentence_transformers.json"))
    assert pooling.word_embedding_dimension == config.hidden_size and pooling.pooling_mode_lasttoken
    assert limits.max_seq_length <= config.max_position_embeddings and prompts.prompts["query"].endswith("Query: ")
    assert len(config.layer_types) == config.num_hidden_layers >= config.max_window_layers
    assert max(config.matryoshka_dimensions) == (32 if folder.name == "cut" else config.hidden_size)
    processor = json.dumps(read(folder / "tokenizer.json")["post_processor"])
    assert tiny.EOS in processor  # TEI and llama.cpp append what stands here and nothing else


def test_tensors_are_the_configs(folder):
    config = parsed(Qwen3, read(folder / "config.json"))
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no __iter__)
        assert file.metadata() == {"format": "pt"}
    assert len(shapes) == 11 * config.num_hidden_layers + 2
    assert shapes["embed_tokens.weight"] == (config.vocab_size, config.hidden_size)
    assert shapes["layers.0.self_attn.q_proj.weight"] == (config.num_attention_heads * config.head_dim, config.hidden_size)
    assert sum(map(math.prod, shapes.values())) * (2 if config.dtype == "bfloat16" else 4) < (folder / "model.safetensors").stat().st_size


def test_llama_cpp_knows_every_tensor(folder):
    """Its converter maps a `Qwen3Model`'s names through gguf's table, with `model.` put before."""
    layers = read(folder / "config.json")["num_hidden_layers"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, layers)
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        assert all(names.get_name(f"model.{name}", try_suffixes=(".weight",)) for name in file.keys())  # noqa: SIM118


def test_the_cards_header_is_yaml_that_the_hub_reads(folder):
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "sentence-transformers"
    assert card.data.pipeline_tag == "feature-extraction" and "text-embeddings-inference" in card.data.tags
    assert yaml.safe_load((folder / "README.md").read_text().split("---")[1])


def test_every_reader_gives_the_golden_vectors(folder):
    results = compare(str(folder))
    assert all(result.holds for result in results) and {"f2llm_jax", "transformers"} < {result.peer for result in results}
