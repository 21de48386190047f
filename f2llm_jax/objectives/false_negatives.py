"""Candidates that are no negatives: the positive's own text, or nearer to the query than the positive, as the model or a guide sees it."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from f2llm_jax.objectives.config import ContrastiveConfig


def false_negatives(
    cosine: Float[Array, "B G"],
    own: Float[Array, "B 1"],
    same_document: Bool[Array, "B G"],
    config: ContrastiveConfig,
    guided: tuple[Float[Array, "B G"], Float[Array, "B 1"]] | None,
) -> Bool[Array, "B G"]:
    """Which of G candidates of B queries are to be left out.

    * `mask_false_negatives`: those whose document is the positive.
    * `false_negative_margin`: those whose cosine exceeds the positive's by more than that (Qwen3-Embedding, arXiv 2506.05176, takes 0.1).
    * `guide`: those that a guide model finds nearer than a limit below the positive: its cosine less `guide_margin` ("absolute"; GISTEmbed,
      arXiv 2402.16829, takes 0), or less that share of its size ("relative"; NV-Retriever, arXiv 2407.15831, section 3.2, takes 0.05).

    Args:
      cosine: of query and candidate.
      own: of query and positive.
      same_document: whether the candidate's document is the positive.
      config: the options.
      guided: the guide's `cosine` and `own`.
    """
    false = jnp.zeros(cosine.shape, bool) if not config.mask_false_negatives else jnp.broadcast_to(same_document, cosine.shape)
    if not math.isinf(config.false_negative_margin):
        false |= jax.lax.stop_gradient(cosine) > jax.lax.stop_gradient(own) + config.false_negative_margin
    if guided:
        theirs, positive = guided
        margin = config.guide_margin * (jnp.abs(positive) if config.guide == "relative" else 1.0)
        false |= theirs > positive - margin
    return false
