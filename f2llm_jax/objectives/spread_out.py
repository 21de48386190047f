"""The spread-out regulariser of EmbeddingGemma (arXiv 2509.20354; "global orthogonal regularisation", arXiv 1708.06320)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from f2llm_jax import sharding
from f2llm_jax.objectives.candidates import Embeddings
from f2llm_jax.objectives.matryoshka import TINY
from f2llm_jax.objectives.mean import Mean


def spread_out(embeddings: Embeddings, sample_mask: Float[Array, " B"]) -> Mean:
    """Mean squared cosine of two different queries plus that of two different positives, `sum_{i != j} cos^2 / (B (B - 1))`.

    Through the D x D second moment, `sum_ij cos_ij^2 = |X^T X|^2`, so memory does not grow with B squared.
    """
    count = sample_mask.sum()
    pairs = jnp.maximum(count * (count - 1), 1.0)
    total = sum(_off_diagonal(x.astype(jnp.float32), sample_mask) / pairs for x in (embeddings.query, embeddings.passage))
    return Mean(jnp.asarray(total), jnp.float32(1))


def _off_diagonal(x: Float[Array, "B D"], mask: Float[Array, " B"]) -> Float[Array, ""]:
    x = sharding.shard(x, sharding.SAMPLES_D)
    squares = jnp.sum(x * x, axis=-1, keepdims=True)
    unit = x * jax.lax.rsqrt(jnp.maximum(squares, TINY)) * mask[:, None]
    whole = sharding.spec(sharding.P(None, None))
    moment = jnp.einsum("bd,be->de", unit, unit, precision=jax.lax.Precision.HIGHEST, out_sharding=whole)
    own = jnp.sum(jnp.square(jnp.sum(unit * unit, axis=-1)))
    return jnp.sum(moment * moment) - own
