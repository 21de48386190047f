"""The files that make a Hugging Face folder a sentence-transformers model, in the legacy form.

sentence-transformers 2 to 6, text-embeddings-inference, vLLM and llama.cpp all read the legacy form. The new module type
strings break sentence-transformers before 5.4, and the new pooling file breaks text-embeddings-inference, which has no
default for `pooling_mode_cls_token` and `pooling_mode_mean_tokens` and requires `max_seq_length`.
"""

from collections.abc import Sequence

import numpy as np
from etils import epath
from jaxtyping import Float

from f2llm_jax import __version__
from f2llm_jax.release.safetensors import header
from f2llm_jax.storage.files import write_bytes, write_json
from f2llm_jax.weights.embedding_config import EmbeddingConfig

MODULES_FILE = "modules.json"
POOLING_MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
FIRST_READER = "3.0.0"  # the first sentence-transformers with `similarity_fn_name`; an older format version never warns


def write_modules(folder: epath.Path, hidden_size: int, text_limit: int, embedding: EmbeddingConfig) -> None:
    """Transformer, last-token pooling over `hidden_size`, normalisation; texts cut at `text_limit` tokens; the prompts.

    No file of sentence-transformers holds a `truncate_dim` (it is an argument of loading, up to 6.2). A release that is truncated
    for good therefore has a linear layer of ones on the diagonal, which every reader of modules.json applies.
    """
    truncate_dim = embedding.truncate_dim
    cut = [("Dense", "2_Dense")] if truncate_dim else []
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), *cut, ("Normalize", f"{2 + len(cut)}_Normalize")]
    write_json(
        folder / MODULES_FILE,
        [
            # The folder of Normalize is not made: it would be empty, git and object stores keep no empty folder, and no
            # reader misses it.
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
            for i, (name, path) in enumerate(modules)
        ],
    )
    modes = {f"pooling_mode_{mode}": mode == "lasttoken" for mode in POOLING_MODES}
    write_json(folder / "1_Pooling/config.json", {"word_embedding_dimension": hidden_size, **modes, "include_prompt": True})
    if truncate_dim:
        # Multiplying by one and adding zeros is exact.
        _write_dense(folder / cut[0][1], np.eye(truncate_dim, hidden_size, dtype=np.float32))
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": text_limit, "do_lower_case": False})
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "__version__": {"sentence_transformers": FIRST_READER, "f2llm_jax": __version__},
            **embedding.to_sentence_transformers(),
        },
    )


def write_projections(folder: epath.Path, projections: Sequence[Float[np.ndarray, "D W"]]) -> None:
    """Each as a `Dense` module, `projections/0` and on: what to append for vectors in a teacher's space.

    No part of modules.json: the release serves its own space, to every client.
    """
    for number, projection in enumerate(projections):
        _write_dense(folder / "projections" / str(number), projection.T)


def _write_dense(folder: epath.Path, weight: Float[np.ndarray, "K D"]) -> None:
    """A linear layer without bias."""
    outputs, inputs = weight.shape
    identity = "torch.nn.modules.linear.Identity"
    write_json(folder / "config.json", {"in_features": inputs, "out_features": outputs, "bias": False, "activation_function": identity})
    content = np.ascontiguousarray(weight, np.float32).tobytes()
    write_bytes(folder / "model.safetensors", header({"linear.weight": weight.shape}, "float32") + content)
