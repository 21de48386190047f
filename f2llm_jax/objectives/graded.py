"""Pairs of texts with a score of their likeness: what is more alike by score is to be more alike by vectors.

Dimensions: B samples, J matryoshka widths, D model, G samples of a block.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from f2llm_jax import sharding
from f2llm_jax.batch import Samples
from f2llm_jax.objectives import candidates
from f2llm_jax.objectives.candidates import Embeddings
from f2llm_jax.objectives.config import ContrastiveConfig, GradedLoss
from f2llm_jax.objectives.matryoshka import prefix_cosines
from f2llm_jax.objectives.mean import Mean

NONE = -1e30  # of a sum of no exponentials: its weight is exactly 0, its gradient is not NaN


def graded_loss(embeddings: Embeddings, samples: Samples, kind: GradedLoss, config: ContrastiveConfig) -> Mean:
    """`log(1 + sum exp((s_j - s_i) / temperature))` over all pairs i, j of samples of which i has the higher score.

    * "cosent": s is the cosine (CoSENT, doi 10.1109/TASLP.2024.3402087).
    * "angle": s is that of AnglE (arXiv 2309.12871): the halves of unit vectors are real and imaginary part of complex numbers, and s is
      the size of the sum of real and imaginary part of their inner product.

    At every width, weighted as the contrastive terms are. The B x B differences are streamed in blocks. One value a batch; its count is
    `samples.graded_weight`.
    """
    assert samples.scores is not None and samples.graded_weight is not None
    dims, weights = config.widths(embeddings.query.shape[-1])
    query, passage = (sharding.shard(x.astype(jnp.float32), sharding.SAMPLES_D) for x in embeddings[:2])
    if kind == "angle":
        likeness = jnp.stack([_angle(query[:, :dim], passage[:, :dim]) for dim in dims])
    else:
        likeness = prefix_cosines("bd,bd->b", query, passage, jnp.multiply, dims)
    score = sharding.shard(samples.scores[:, 0], sharding.P(sharding.BATCH))
    there = (sharding.shard(samples.sample_mask, sharding.P(sharding.BATCH)) > 0) & jnp.isfinite(score)
    logits, score = likeness / config.temperature, jnp.where(there, score, 0.0)

    everywhere = [sharding.shard(x, sharding.P(*[None] * x.ndim)) for x in (logits.T, score, there)]
    size = min(len(score), candidates.BLOCK)
    blocks = [jnp.pad(x, [(0, -len(x) % size)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, size, *x.shape[1:]) for x in everywhere]

    @jax.checkpoint
    def stream(total: Float[Array, "J B"], block: list[Array]) -> tuple[Float[Array, "J B"], None]:
        theirs, lower, exists = block
        compared = there[:, None] & exists[None, :] & (lower[None, :] < score[:, None])
        terms = jnp.where(compared, theirs.T[:, None, :], NONE)
        return jax.nn.logsumexp(jnp.concatenate([total[..., None], terms], axis=-1), axis=-1), None

    total, _ = jax.lax.scan(stream, jnp.full_like(logits, NONE), blocks)
    of_samples = sharding.shard(total - logits, sharding.P(None, None))
    losses = jax.nn.logsumexp(jnp.pad(of_samples, [(0, 0), (1, 0)]), axis=-1)
    return Mean(samples.graded_weight * jnp.asarray(weights) @ losses, samples.graded_weight)


def _angle(a: Float[Array, "B D"], b: Float[Array, "B D"]) -> Float[Array, " B"]:
    half = a.shape[-1] // 2
    turned = jnp.concatenate([-b[:, half:], b[:, :half]], axis=-1)
    cosine, sine = (prefix_cosines("bd,bd->b", a, x, jnp.multiply, (2 * half,))[0] for x in (b, turned))
    return jnp.abs(cosine + sine)
