"""Every setting of a Hugging Face folder that some reader honours: computed here, refused unless neutral, or harmless.

The rules were checked against transformers 4.57 and 5.24 and sentence-transformers 2.7 to 6.2, setting by setting, by the cosine of the
vectors (`tests/test_settings.py`). A key that is in no table is read by none of them for a Qwen3 model; it is accepted and named.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from etils import epath

from f2llm_jax.errors import UserError

Verdict = Literal["computed", "harmless", "unknown"]


@dataclasses.dataclass(frozen=True)
class Note:
    """One setting of a folder and what becomes of it."""

    file: str
    key: str
    value: Any
    verdict: Verdict
    reason: str


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a key means. With `only` any other value is refused, because a reader would compute other vectors from it."""

    verdict: Verdict
    reason: str
    only: tuple[Any, ...] | None = None


def _computed(reason: str) -> Rule:
    return Rule("computed", reason)


def _only(*values: Any, why: str) -> Rule:
    return Rule("computed", why, values)


def _harmless(keys: str, reason: str) -> dict[str, Rule]:
    return {key: Rule("harmless", reason) for key in keys.split()}


_SHAPE = "shape of the decoder"
_PLAIN_TEXT = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
_BY_MODES = "what an embedding is; only the last token is computed"

CONFIG = {
    **{
        key: _computed(_SHAPE)
        for key in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "rms_norm_eps",
        )
    },
    "max_position_embeddings": _computed("longest text"),
    "rope_theta": _computed("base of the rotary frequencies"),
    "rope_parameters": _computed("base of the rotary frequencies"),
    "rope_scaling": _computed("must be none; older name of rope_parameters"),
    "is_matryoshka": _computed("trained for several widths"),
    "matryoshka_dimensions": _computed("widths it was trained for"),
    "layer_types": _computed("must be full attention in every layer"),
    "model_type": _only("qwen3", why="the one decoder that this project computes"),
    "hidden_act": _only("silu", "swish", why="the activation that this project computes"),
    "attention_bias": _only(False, None, why="there is no bias"),
    "is_causal": _only(True, None, why="a token attends to those before it"),
    "use_bidirectional_attention": _only(False, None, why="a token attends to those before it"),
    "use_sliding_window": _only(False, None, why="a token attends to all before it"),
    "partial_rotary_factor": _only(1, None, why="every component is rotated"),
    "quantization_config": _only(None, why="weights are floating-point numbers; dequantise them first"),
    "pruned_heads": _only(None, {}, why="all heads are computed"),
    "auto_map": _only(None, why="the folder's own Python code is never run"),
    "text_config": _only(None, why="the decoder is not nested in another model"),
    "compression_config": _only(None, why="weights are floating-point numbers; decompress them first"),
    "per_layer_config": _only(None, {}, why="all layers have one shape"),
    "transformers_weights": _only(None, "model.safetensors", why="the weights are in files of the usual names"),
    **_harmless("sliding_window max_window_layers", "read only with use_sliding_window"),
    **_harmless("attention_dropout", "acts in training with transformers only"),
    **_harmless("initializer_range", "random weights only"),
    **_harmless("use_cache return_dict output_attentions output_hidden_states", "what transformers returns, not what it computes"),
    **_harmless("chunk_size_feed_forward _attn_implementation attn_implementation", "another order of the same sums"),
    **_harmless("dtype torch_dtype", "precision of the stored weights, which the files tell; computed in the dtype that is asked for"),
    **_harmless("tie_word_embeddings architectures num_labels id2label label2id problem_type", "a head, which an embedding does not pass"),
    **_harmless("bos_token_id eos_token_id pad_token_id sep_token_id", "generation and padding; the ids of a text come from the tokenizer"),
    **_harmless("transformers_version _name_or_path name_or_path", "where the file comes from"),
}  # fmt: skip

TOKENIZER = {
    "eos_token": _computed("ends a text if the post-processor of tokenizer.json ends it in nothing"),
    "pad_token": _computed("pads batches in other software"),
    "model_max_length": _computed("longest text"),
    "add_bos_token": _computed("must agree with the post-processor"),
    "add_eos_token": _computed("must agree with the post-processor"),
    "add_prefix_space": _computed("must agree with the pre-tokenizer"),
    "added_tokens_decoder": _computed("must be in tokenizer.json"),
    "additional_special_tokens": _computed("must be in tokenizer.json"),
    "extra_special_tokens": _computed("must be in tokenizer.json"),
    "model_specific_special_tokens": _computed("must be in tokenizer.json"),
    "tokenizer_class": _computed("must be one that opens tokenizer.json as it is, or Qwen2's where that is the same"),
    "truncation_side": _only("right", None, why="long texts lose their end"),
    "split_special_tokens": _only(False, None, why="special tokens in a text are one id"),
    "do_lower_case": _only(False, None, why="texts keep their case"),
    "auto_map": _only(None, why="the folder's own Python code is never run"),
    **_harmless("padding_side pad_token_type_id pad_to_multiple_of", "padding is masked"),
    **{role: _computed("must be in tokenizer.json") for role in ("bos_token", "unk_token", "sep_token", "cls_token", "mask_token")},
    **_harmless("clean_up_tokenization_spaces errors", "ids to text only"),
    **_harmless("chat_template processor_class", "conversations only"),
    **_harmless("backend is_local local_files_only use_fast legacy name_or_path", "how transformers opens tokenizer.json"),
    **_harmless("stride truncation_strategy max_length return_token_type_ids model_input_names", "sentence-transformers sets its own"),
}

TRANSFORMER = {
    "max_seq_length": _computed("longest text"),
    "do_lower_case": _only(False, None, why="texts keep their case"),
    "transformer_task": _only("feature-extraction", None, why="the hidden states are pooled"),
    "module_output_name": _only("token_embeddings", None, why="the hidden states are pooled"),
    "modality_config": _only(_PLAIN_TEXT, None, why="the last layer's hidden states of plain text"),
    **{
        key: _only({}, None, why="arguments of other software are not computed")
        for key in (
            "processing_kwargs", "processor_kwargs", "model_kwargs", "config_kwargs", "model_args", "tokenizer_args", "config_args",
            "query_expansion",
        )
    },
    "query_length": _only(None, why="queries and documents have one limit"),
    "document_length": _only(None, why="queries and documents have one limit"),
    "tokenizer_name_or_path": _only(None, "", why="the tokenizer lies in the folder"),
    **_harmless("unpad_inputs", "another order of the same sums"),
}  # fmt: skip

POOLING = {
    "embedding_dimension": _computed("width of the embedding"),
    "word_embedding_dimension": _computed("width of the embedding"),
    "pooling_mode": _only("lasttoken", ["lasttoken"], why=_BY_MODES),
    "pooling_mode_lasttoken": _computed(_BY_MODES),
    **{
        f"pooling_mode_{mode}": _only(False, None, why=_BY_MODES)
        for mode in ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")
    },
    **_harmless("include_prompt", "the last token is never one of the prompt"),
}

NORMALIZE = {
    "module_input_name": _only("sentence_embedding", None, why="the embedding itself has length 1"),
    "module_output_name": _only("sentence_embedding", None, why="the embedding itself has length 1"),
}

SENTENCE_TRANSFORMERS = {
    "prompts": _computed("what goes before a text, by name"),
    "default_prompt_name": _computed("must be none, or name an empty prompt"),
    "similarity_fn_name": _computed("how vectors are compared"),
    "layer_types": _computed("must be full attention in every layer"),
    "model_type": _only("SentenceTransformer", None, why="one dense vector a text"),
    "truncate_dim": _only(None, why="pass --truncate-dim to `convert to-hf` instead"),
    **_harmless("__version__ requirements", "where the file comes from"),
}


def check(path: epath.PathLike, name: str, content: Mapping[str, Any], rules: Mapping[str, Rule]) -> list[Note]:
    """What becomes of each setting of one file.

    Args:
      path: the file, for the error.
      name: its path within the folder, for the notes.
      content: its settings.
      rules: one of the tables above.

    Raises:
      UserError: settings that would give other vectors elsewhere; all of the file at once.
    """
    notes, wrong = [], []
    for key, value in content.items():
        rule = rules.get(key) or Rule("unknown", "no supported reader of a Qwen3 model uses it")
        if rule.only is not None and not _among(value, rule.only):
            wrong.append(
                f"{key} is {value!r}, must be {' or '.join(repr(one) for one in rule.only if one is not None) or 'absent'} ({rule.reason})"
            )
        notes.append(Note(name, key, value, rule.verdict, rule.reason))
    if wrong:
        raise UserError(f"{path} changes vectors in a way that this project does not compute:\n  " + "\n  ".join(wrong))
    return notes


def _among(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Equality that tells False from 0 and True from 1, but not 1 from 1.0."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)
