"""How often the positive comes first, and how alike pairs are: what a loss cannot be read as.

Dimensions as in contrastive.py.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from f2llm_jax import sharding
from f2llm_jax.batch import Samples
from f2llm_jax.objectives.candidates import Candidates, Embeddings, candidate_blocks
from f2llm_jax.objectives.matryoshka import prefix_cosines


def ranked_first(embeddings: Embeddings, samples: Samples, dims: Sequence[int]) -> Bool[Array, "J B"]:
    """Whether the positive is nearer to its query than every rival, at each of the J ascending widths.

    Rivals are the sample's own hard negatives, and where positives of the batch are negatives of each other
    (`in_batch_weight`) all documents of the batch. A document with the positive's text is no rival; a tie is lost.
    """
    query = sharding.shard(embeddings.query.astype(jnp.float32), sharding.SAMPLES_D)
    passage = sharding.shard(embeddings.passage.astype(jnp.float32), sharding.SAMPLES_D)
    negatives = sharding.shard(embeddings.negatives.astype(jnp.float32), sharding.P(sharding.BATCH, None, None))
    ids = sharding.shard(samples.passage_ids, sharding.P(sharding.BATCH))
    own = prefix_cosines("bd,bd->b", query, passage, jnp.multiply, dims)
    hard = prefix_cosines("bd,bnd->bn", query, negatives, lambda q, n: q[:, None] * n, dims)
    rivals = (samples.negative_mask > 0) & (samples.negative_ids != ids[:, None])
    hardest = jnp.max(jnp.where(rivals, hard, -jnp.inf), axis=-1, initial=-jnp.inf)

    def stream(hardest, block: Candidates):
        cosines = prefix_cosines("bd,gd->bg", query, block.vectors, lambda q, c: q[:, None] * c[None, :], dims)
        rivals = (block.mask > 0)[None, :] & (block.ids[None, :] != ids[:, None]) & (samples.in_batch_weight > 0)
        return jnp.maximum(hardest, jnp.max(jnp.where(rivals, cosines, -jnp.inf), axis=-1)), None

    hardest, _ = jax.lax.scan(stream, hardest, candidate_blocks(embeddings, samples, "positives_and_negatives"))
    return own > hardest


def pair_cosines(embeddings: Embeddings, dims: Sequence[int]) -> Float[Array, "J B"]:
    """Cosine of each query and its positive, at each of the J ascending widths."""
    query, passage = (sharding.shard(x.astype(jnp.float32), sharding.SAMPLES_D) for x in embeddings[:2])
    return prefix_cosines("bd,bd->b", query, passage, jnp.multiply, dims)
