"""Settings of a Hugging Face folder that change vectors in sentence-transformers, or might: what this project does with each.

`python tests/settings_table.py` prints the table of docs/settings.md.
"""

import dataclasses
import functools
import json
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import sentence_transformers
import tiny
import torch
from safetensors.torch import save_file

from f2llm_jax.errors import UserError
from f2llm_jax.inference.encode import load_encoder, truncate_and_normalize
from f2llm_jax.release import hf_folder
from f2llm_jax.weights.models import find_model

DELETE = object()
TEXTS = [
    *tiny.TEXTS,
    "The CAT sat on THE Mat",
    "the cat <|im_end|> the <|endoftext|>dog",
    " one two three four five six seven eight nine ten",
]
WIDTH = tiny.CONFIG.hidden_size
POOLING, PROMPTS, MODULE = "1_Pooling/config.json", "config_sentence_transformers.json", "sentence_bert_config.json"
MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


@dataclasses.dataclass(frozen=True)
class Case:
    """One setting of one file, and what is to become of it: "computed", "harmless" or "refused"."""

    file: str
    setting: str
    edit: Callable[[pathlib.Path], None]
    verdict: str
    names: str = ""  # that the refusal must name


def merged(content: Any, changes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**content, **changes}.items() if value is not DELETE}


def case(file: str, verdict: str, setting: str = "", names: str = "", also: dict[str, dict] | None = None, **changes: Any) -> Case:
    """Changes keys of a JSON file; DELETE removes one."""

    def edit(folder: pathlib.Path) -> None:
        for name, more in {file: changes, **(also or {})}.items():
            path = folder / name
            content = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(merged(content, more)))

    shown = ", ".join(f"{key} {'absent' if value is DELETE else json.dumps(value)}" for key, value in changes.items())
    return Case(file, setting or shown, edit, verdict, names or next(iter(changes), ""))


def tokenizer_case(verdict: str, setting: str, change: Callable[[dict], None], names: str = "") -> Case:
    def edit(folder: pathlib.Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return Case("tokenizer.json", setting, edit, verdict, names)


def module_case(verdict: str, setting: str, *kinds: str, names: str = "", dense: dict | None = None, normalize: dict | None = None) -> Case:
    """Other modules after the pooling; `dense` is the configuration of a Dense layer, with its `weight`."""

    def edit(folder: pathlib.Path) -> None:
        modules = json.loads((folder / "modules.json").read_text())[:2]
        for kind in kinds:
            number = len(modules)
            modules.append({"idx": number, "name": str(number), "path": f"{number}_{kind}", "type": f"sentence_transformers.models.{kind}"})
            inner = folder / f"{number}_{kind}"
            inner.mkdir()
            if kind == "Dense":
                weight = dense["weight"]
                settings = {"in_features": weight.shape[1], "out_features": weight.shape[0], "bias": False, **dense["settings"]}
                (inner / "config.json").write_text(json.dumps(settings))
                save_file({"linear.weight": weight}, inner / "model.safetensors")
            elif kind == "Dropout":
                (inner / "config.json").write_text(json.dumps({"dropout": 0.5}))
            elif kind == "LayerNorm":
                (inner / "config.json").write_text(json.dumps({"dimension": WIDTH}))
                save_file({"norm.weight": torch.arange(WIDTH).float(), "norm.bias": torch.ones(WIDTH)}, inner / "model.safetensors")
            elif normalize:
                (inner / "config.json").write_text(json.dumps(normalize))
        (folder / "modules.json").write_text(json.dumps(modules))

    return Case("modules.json", setting, edit, verdict, names)


def pooling(**modes: Any) -> dict[str, Any]:
    return {**{f"pooling_mode_{mode}": DELETE for mode in MODES}, "word_embedding_dimension": WIDTH, **modes}


def ends_in(token: str) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        number = next(one["id"] for one in content["added_tokens"] if one["content"] == token)
        special = {"SpecialToken": {"id": token, "type_id": 0}}
        content["post_processor"] |= {
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, special],
            "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
        }

    return change


def with_hole(content: dict) -> None:
    """The last entry of the vocabulary gets a later id: within the embedding table, beyond the count of ids."""
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = tiny.CONFIG.vocab_size - 1


SPECIAL = {"content": "<|im_end|>", "special": True}
IDENTITY = {"activation_function": "torch.nn.modules.linear.Identity"}
ROTATED = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)))[0].contiguous()
SECOND_LAYER = {"text": {"method": "forward", "method_output_name": ["hidden_states", 1]}}
NO_ROPE = {"rope_parameters": DELETE, "rope_scaling": DELETE, "rope_theta": DELETE}
C, T = "config.json", "tokenizer_config.json"
CASES = [
    case(C, "refused", is_causal=False),
    case(C, "computed", "no rope_theta anywhere", **NO_ROPE),
    case(C, "computed", "rope_parameters without rope_theta", **NO_ROPE | {"rope_parameters": {"rope_type": "default"}}),
    case(C, "computed", "rope_theta 50000, no rope_parameters", **NO_ROPE | {"rope_theta": 50_000}),
    case(C, "computed", "rope_parameters.rope_theta 50000, no rope_theta", **NO_ROPE | {"rope_parameters": {"rope_theta": 5e4}}),
    case(C, "refused", rope_theta=50_000),  # rope_parameters says 1000000
    case(C, "refused", rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
    case(C, "refused", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}),
    case(C, "refused", **NO_ROPE, partial_rotary_factor=0.5, names="partial_rotary_factor"),
    case(C, "refused", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
    case(C, "refused", hidden_act="gelu"),
    case(C, "refused", attention_bias=True),
    case(C, "refused", use_sliding_window=True, sliding_window=4, max_window_layers=0, layer_types=DELETE),
    case(C, "refused", layer_types=["full_attention", "sliding_attention", "full_attention"], use_sliding_window=False, sliding_window=4),
    case(C, "refused", model_type="qwen2"),
    case(C, "refused", auto_map={"AutoModel": "modeling.Other"}),
    case(C, "refused", pruned_heads={"0": [1]}),
    case(C, "refused", use_bidirectional_attention=True),
    case(C, "computed", rms_norm_eps=0.01),
    case(C, "computed", max_position_embeddings=24, also={MODULE: {"max_seq_length": DELETE}, T: {"model_max_length": DELETE}}),
    case(C, "refused", max_position_embeddings=24),  # max_seq_length says 96
    case(C, "computed", is_matryoshka=True, matryoshka_dimensions=[8, 16]),
    case(C, "harmless", sliding_window=4, max_window_layers=0),
    case(C, "harmless", attention_dropout=0.5),
    case(C, "harmless", tie_word_embeddings=False),
    case(C, "harmless", use_cache=True),
    case(C, "harmless", architectures=["Qwen3ForCausalLM"]),
    case(C, "harmless", eos_token_id=7, bos_token_id=3, pad_token_id=None),
    case(C, "harmless", note_of_its_maker="hello"),
    case(C, "refused", rms_norm_eps="1e-6"),
    case(C, "refused", head_dim=DELETE),
    case(C, "refused", num_hidden_layers=2, names="layer_types"),  # layer_types and the weights have three
    case(C, "refused", layer_types=["full_attention"] * 4),
    case(C, "refused", rope_scaling={"type": "dynamic", "factor": 2.0}),
    case(C, "computed", rope_scaling={"type": "default"}),
    case(C, "refused", per_layer_config={"0": {"rms_norm_eps": 0.5}}),
    case(C, "refused", transformers_weights="other.safetensors"),
    case(C, "refused", compression_config={"quant_method": "compressed-tensors"}),
    case(C, "harmless", mlp_bias=True),
    case(C, "harmless", dtype="float16"),
    case(C, "harmless", output_hidden_states=True, return_dict=False),
    case(T, "computed", model_max_length=24, also={MODULE: {"max_seq_length": DELETE}}),
    case(T, "refused", truncation_side="left"),
    case(T, "refused", split_special_tokens=True),
    case(T, "refused", add_bos_token=True, bos_token="<|endoftext|>"),
    case(T, "refused", added_tokens_decoder={"310": {"content": "dog", "special": True}}),
    case(T, "computed", extra_special_tokens=["mat"]),
    case(T, "refused", extra_special_tokens=["horse"]),
    case(T, "harmless", padding_side="left"),
    case(T, "harmless", add_eos_token=True),
    case(T, "harmless", clean_up_tokenization_spaces=True, chat_template="{{ messages }}", errors="replace"),
    case(T, "refused", tokenizer_class="Qwen2Tokenizer"),  # its own pre-tokenizer is not the one of the file
    case(T, "refused", tokenizer_class=DELETE),
    case(T, "refused", tokenizer_class="GPT2Tokenizer"),
    case(T, "refused", tokenizer_class="WhisperTokenizer"),
    case(T, "computed", tokenizer_class="TokenizersBackend"),
    case(T, "refused", pad_token="the", names="special_tokens_map.json"),
    case(T, "refused", mask_token="horse", names="horse"),
    case(T, "refused", image_token="horse", names="horse"),
    case(T, "computed", image_token="mat"),
    case(T, "computed", model_specific_special_tokens={"image_token": "mat"}),
    case(T, "refused", "<|im_end|> with lstrip", "added_tokens_decoder", added_tokens_decoder={"1": {**SPECIAL, "lstrip": True}}),
    case(T, "computed", "<|im_end|> without", added_tokens_decoder={"1": SPECIAL}),
    case(T, "harmless", max_length=8, stride=2, truncation_strategy="only_first"),
    case("special_tokens_map.json", "refused", additional_special_tokens=["mat"], names="special_tokens_map.json"),
    case("special_tokens_map.json", "refused", mask_token="mat", names="special_tokens_map.json"),
    case("added_tokens.json", "refused", mat=250, names="added_tokens.json"),
    tokenizer_case("computed", "a normalizer that lowers case", lambda t: t.update(normalizer={"type": "Lowercase"})),
    tokenizer_case("computed", "padding to 48 from the left", lambda t: t.update(padding=PADDED)),
    tokenizer_case("computed", "truncation to 8", lambda t: t.update(truncation={**LEFT, "direction": "Right", "max_length": 8})),
    tokenizer_case("computed", "<|im_end|> with lstrip and rstrip", lambda t: t["added_tokens"][1].update(lstrip=True, rstrip=True)),
    tokenizer_case("computed", "post_processor appends <|endoftext|>, eos_token is <|im_end|>", ends_in(tiny.PAD)),
    tokenizer_case("computed", "a hole in the ids", with_hole),
    tokenizer_case("refused", "truncation from the left", lambda t: t.update(truncation=LEFT), "truncation"),
    tokenizer_case("refused", "a dropout of merges", lambda t: t["model"].update(dropout=0.9), "dropout"),
    case(MODULE, "computed", max_seq_length=16),
    case(MODULE, "computed", max_seq_length=None, also={T: {"model_max_length": 24}}),
    case(MODULE, "computed", max_seq_length=96, also={T: {"model_max_length": 24}}),
    case(MODULE, "refused", do_lower_case=True),
    case(MODULE, "refused", query_length=6),
    case(MODULE, "refused", processing_kwargs={"text": {"max_length": 6}}),
    case(MODULE, "refused", transformer_task="fill-mask"),
    case(MODULE, "refused", modality_config=SECOND_LAYER, module_output_name="token_embeddings"),
    *(case(POOLING, "refused", **pooling(**{f"pooling_mode_{mode}": True}), names=mode, setting=mode) for mode in MODES[:5]),
    case(POOLING, "refused", "two modes", "pooling_mode", **pooling(pooling_mode=["lasttoken", "mean"])),
    case(POOLING, "refused", "no mode", "pooling_mode_lasttoken", **pooling()),
    case(POOLING, "computed", "pooling_mode lasttoken (since 5.4)", **pooling(pooling_mode="lasttoken", embedding_dimension=WIDTH)),
    case(POOLING, "harmless", include_prompt=False),
    module_case("refused", "Dense with Tanh", "Dense", "Normalize", names="Tanh", dense={"weight": ROTATED, "settings": {}}),
    module_case("refused", "Dense with a weight", "Dense", "Normalize", names="weight", dense={"weight": ROTATED, "settings": IDENTITY}),
    module_case("computed", "Dense that keeps 16", "Dense", "Normalize", dense={"weight": torch.eye(16, WIDTH), "settings": IDENTITY}),
    module_case("refused", "LayerNorm", "LayerNorm", "Normalize", names="LayerNorm"),
    module_case("harmless", "Dropout", "Dropout", "Normalize"),
    module_case("harmless", "no Normalize, compared by the cosine"),
    case(PROMPTS, "refused", default_prompt_name="query"),
    case(PROMPTS, "computed", prompts={"query": "Instruct: Find it\nQuery:", "document": ""}),
    case(PROMPTS, "computed", prompts={}),
    case(PROMPTS, "refused", prompts={"query": "query: ", "document": "passage: "}, names="document"),
    case(PROMPTS, "refused", prompts={"passage": "passage: "}, names="passage"),
    case(PROMPTS, "computed", prompts={"passage": "passage: ", "document": ""}),
    case(PROMPTS, "computed", default_prompt_name="document"),
    case(PROMPTS, "refused", default_prompt_name="none_of_them"),
    case(PROMPTS, "refused", truncate_dim=16),
    case(PROMPTS, "harmless", similarity_fn_name="dot"),
    case(PROMPTS, "refused", model_type="SparseEncoder"),
]  # fmt: skip
PADDED = {"strategy": {"Fixed": 48}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": tiny.PAD}
LEFT = {"direction": "Left", "max_length": 96, "strategy": "LongestFirst", "stride": 0}


@functools.cache
def base() -> pathlib.Path:
    """A release as this project writes it."""
    folder = pathlib.Path(tempfile.mkdtemp())
    hf_folder.export(tiny.origin(folder / "tokenizer"), folder / "release", hf_folder.ReleaseForm(golden=False))
    return folder / "release"


def edited(case: Case, folder: pathlib.Path) -> pathlib.Path:
    shutil.copytree(base(), folder)
    case.edit(folder)
    return folder


def ours(folder: pathlib.Path) -> np.ndarray:
    """Vectors of TEXTS as documents and as queries, float32 `[2 S, K]` at length 1."""
    model = find_model(str(folder))
    encoder = load_encoder(model)
    raw = np.concatenate([encoder.encode(TEXTS), encoder.encode(TEXTS, model.embedding.query_prompt)])
    return truncate_and_normalize(raw, model.width)


def theirs(folder: pathlib.Path) -> np.ndarray:
    """The same by sentence-transformers."""
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    vectors = np.concatenate([model.encode_document(TEXTS), model.encode_query(TEXTS)])
    return truncate_and_normalize(vectors, vectors.shape[1])


def worst_cosine(one: np.ndarray, other: np.ndarray) -> float:
    """0 where the widths differ: they cannot be compared."""
    return float((one * other).sum(1).min()) if one.shape == other.shape else 0.0


def read(folder: pathlib.Path) -> tuple[np.ndarray, str]:
    """Our vectors and ""; or those of the unchanged folder and the message of the refusal."""
    try:
        return ours(folder), ""
    except UserError as error:
        return unchanged(), str(error)


@functools.cache
def unchanged() -> np.ndarray:
    return ours(base())


def main() -> None:
    print("| file | setting | here | worst cosine with sentence-transformers |\n|---|---|---|---|")
    for one in CASES:
        with tempfile.TemporaryDirectory() as temporary:
            folder = edited(one, pathlib.Path(temporary) / "model")
            vectors, refusal = read(folder)
            try:
                cosine = f"{worst_cosine(vectors, theirs(folder)):.6f}"  # of a refusal what ignoring the setting would have given
            except Exception as error:  # whatever a library raises on a folder that it cannot load either
                cosine = f"sentence-transformers refuses it too ({type(error).__name__})"
        right = bool(refusal) == (one.verdict == "refused")
        shown = one.setting.replace("|", "\\|")
        print(f"| {one.file} | {shown} | {one.verdict if right else 'WRONG ' + refusal[:80]} | {cosine} |", flush=True)
    print(f"\n{len(CASES)} settings", file=sys.stderr)


if __name__ == "__main__":
    main()
