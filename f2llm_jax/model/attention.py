"""Causal grouped-query attention over packed rows, behind one signature."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from f2llm_jax import sharding


def attention(
    q: Float[Array, "R T H E"],
    k: Float[Array, "R T K E"],
    v: Float[Array, "R T K E"],
    segment_ids: Int[Array, "R T"],
) -> Float[Array, "R T H E"]:
    """Softmax attention in which a position sees itself and earlier positions of its own segment.

    Query head h reads key/value head `h // (H / K)`. Scores are scaled by `E ** -0.5` and the softmax is fp32 whatever
    the dtype of the inputs. Segment 0 is padding: it attends within itself and nobody reads it.
    """
    R, T, H, E = q.shape
    K = k.shape[2]
    # Explicit specs: with H split over `tensor`, splitting H into (K, H/K) keeps the split on K.
    grouped = q.reshape(R, T, K, H // K, E, out_sharding=sharding.spec(sharding.P(sharding.BATCH, None, "tensor", None, None)))
    scores = jnp.einsum("rtkge,rske->rkgts", grouped, k, preferred_element_type=jnp.float32) * E**-0.5
    position = jnp.arange(T)
    visible = (position[:, None] >= position[None, :]) & (segment_ids[:, :, None] == segment_ids[:, None, :])
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    mixed = jnp.einsum("rkgts,rske->rtkge", weights, v)
    return mixed.reshape(R, T, H, E, out_sharding=sharding.spec(sharding.ROWS_THE))
