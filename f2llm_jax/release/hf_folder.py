"""A model as a Hugging Face folder: weights, config.json, tokenizer; with the files of the neighbouring modules it is a release.

Everything is derived from the model at hand and nothing copied from a base model: releases of this very family went out with
the `layer_types` and the pooling width of another size (codefuse-ai/F2LLM-v2-80M and -160M, discussions on the Hub).
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from f2llm_jax.cli.progress import Progress
from f2llm_jax.model.decoder import INITIALIZER_RANGE
from f2llm_jax.model.sizes import DecoderConfig
from f2llm_jax.release import card, sentence_transformers
from f2llm_jax.release.golden import GOLDEN_FILE, golden_vectors
from f2llm_jax.release.safetensors import DTYPES, stored_bytes, write_factors, write_weights
from f2llm_jax.storage.files import write_json, write_text
from f2llm_jax.storage.folders import check_new_folder, new_folder
from f2llm_jax.text import Tokenizer, query_prompt
from f2llm_jax.weights.embedding_config import EmbeddingConfig
from f2llm_jax.weights.factors import FILE
from f2llm_jax.weights.models import ModelSource

CONFIG_FILE = "config.json"  # every reader opens it first, so it is written last
# The transformers that this form of config.json is of. Without it transformers 4.57 takes the tokenizer for a broken one of Mistral's
# ("incorrect regex pattern"); a version after 4.57.2 says that it is none.
FORMAT_VERSION = "4.57.3"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReleaseForm:
    """How a release is written.

    With `truncate_dim` sentence-transformers, text-embeddings-inference and vLLM give that width. The decoder itself keeps its own, so
    transformers alone and llama.cpp give all dimensions, to be truncated by the user.
    """

    dtype: str = "float32"  # a key of `safetensors.DTYPES`; float32 and, of weights imported from it, bfloat16 lose nothing
    max_shard_bytes: int = 5 * 10**9  # of tensors in one file, unless a single tensor has more
    truncate_dim: int | None = None  # None for the model's own
    query_instruction: str | None = None  # of the prompt "query"; None for the model's own prompt
    golden: bool = True  # whether to write golden vectors, which reads the weights twice
    labels: card.Labels = dataclasses.field(default_factory=card.Labels)

    def embedding(self, source: ModelSource) -> EmbeddingConfig:
        """What the release declares.

        Raises:
          UserError: the model was not trained for `truncate_dim`.
        """
        declared = source.embedding
        if self.truncate_dim is not None:
            declared = declared.truncated(source.name, source.config.hidden_size, self.truncate_dim)
        if self.query_instruction is not None:
            query = query_prompt(self.query_instruction, declared.instruction_template)
            declared = dataclasses.replace(declared, prompts={**declared.prompts, "query": query})
        return declared


def export(
    source: ModelSource,
    out: epath.PathLike,
    form: ReleaseForm,
    *,
    overwrite: bool = False,
    factored: ModelSource | None = None,
    projections: Sequence[Float[np.ndarray, "D W"]] = (),
) -> None:
    """Writes the release of a model: every file that sentence-transformers, transformers, TEI, vLLM and llama.cpp read.

    Args:
      source: the model.
      out: folder to make, local or `gs://`; complete or absent.
      form: how.
      overwrite: replace an older release at `out`.
      factored: the same model with its table in two factors, which are then released too (see `weights.factors`).
      projections: into the spaces of its teachers, released too (see `sentence_transformers.write_projections`).

    Raises:
      UserError: `out` may not be written, the weights are not those of the model's shape, one is not finite in the dtype, the model
        was not trained for the width, or it has no tokenizer or one that does not fit it.
    """
    tokenizer, embedding, limit = source.matching_tokenizer(), form.embedding(source), source.text_limit
    with new_folder(out, CONFIG_FILE, overwrite) as folder:
        with source.open_params() as parameters:
            with Progress() as progress:
                report = progress.counter("releasing", "B", stored_bytes(source.config, form.dtype))
                write_weights(folder, source.config, parameters, form.dtype, form.max_shard_bytes, report)
            if form.golden:
                golden = golden_vectors(source.config, parameters, DTYPES[form.dtype][0], tokenizer, limit, embedding.query_prompt)
                write_json(folder / GOLDEN_FILE, golden)
        if factored:
            with factored.open_params() as parameters:
                write_factors(folder / FILE, factored.config, parameters, form.dtype)
        write_tokenizer(folder, tokenizer, limit)
        sentence_transformers.write_modules(folder, source.config.hidden_size, limit, embedding)
        sentence_transformers.write_projections(folder, projections)
        card.write_card(folder, source, embedding, form.dtype, form.labels)
        write_json(folder / CONFIG_FILE, model_config(source.config, tokenizer, form.dtype, embedding))


def check_out(out: epath.PathLike, overwrite: bool) -> None:
    """Raises UserError if `export` would refuse to write to `out`."""
    check_new_folder(out, overwrite)


def model_config(config: DecoderConfig, tokenizer: Tokenizer, dtype: str, embedding: EmbeddingConfig) -> dict[str, Any]:
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
        "eos_token_id": tokenizer.end_id,
        "pad_token_id": tokenizer.pad_id,
        "dtype": dtype,
        "torch_dtype": dtype,
        "transformers_version": FORMAT_VERSION,
        **embedding.to_config_json(),
    }


def write_tokenizer(folder: epath.Path, tokenizer: Tokenizer, text_limit: int) -> None:
    """The tokenizer's files; ids come from tokenizer.json alone, the others repeat it for readers that look there.

    Padding goes to the right. Pooling that reads the attention mask (sentence-transformers, the card's snippet) gives the same vectors
    either way; but the snippet on the cards of this family takes position `attention_mask.sum(1) - 1`, which is the end token only
    then, and transformers counts positions from the row's start, padding included, so only then are they those of training.
    """
    tokenizer.save(folder)
    written = {**tokenizer.config, "padding_side": "right", "model_max_length": text_limit}
    # The class that takes tokenizer.json as it is, in transformers 4 and 5; others build a post-processor of their own from these flags.
    written["tokenizer_class"] = "PreTrainedTokenizerFast"
    for flag in ("add_bos_token", "add_eos_token"):
        written.pop(flag, None)
    write_json(folder / "tokenizer_config.json", written)
    roles = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token", "additional_special_tokens")
    write_json(folder / "special_tokens_map.json", {role: written[role] for role in roles if written.get(role)})
    parts = json.loads(tokenizer.backend.to_str())
    write_json(folder / "added_tokens.json", {token["content"]: token["id"] for token in parts["added_tokens"]})
    if parts["model"]["type"] == "BPE":
        write_json(folder / "vocab.json", parts["model"]["vocab"])
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in parts["model"]["merges"]]
        write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")
