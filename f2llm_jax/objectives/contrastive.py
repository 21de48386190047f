"""The two published softmaxes: a query against the positives of the whole batch, and against its own hard negatives.

Memory is flat in the batch: candidates are streamed in blocks with a running log-sum-exp, recomputed in the backward pass, and
queries are split over devices, so no device ever holds more than its queries times one block.

Dimensions: B samples, N negatives a sample, D model, J matryoshka widths, G candidates of a block.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from f2llm_jax import sharding
from f2llm_jax.batch import Samples
from f2llm_jax.objectives.candidates import Candidates, Embeddings, candidate_blocks
from f2llm_jax.objectives.config import ContrastiveConfig
from f2llm_jax.objectives.matryoshka import prefix_cosines
from f2llm_jax.objectives.mean import Mean, mean_of


def contrastive(embeddings: Embeddings, samples: Samples, config: ContrastiveConfig) -> tuple[Float[Array, ""], dict[str, Mean]]:
    """The loss `in_batch + hard` (weighted over widths), its parts and diagnostics.

    `in_batch` exists for retrieval only (`in_batch_weight`), `hard` for every kind. They stay two separate softmaxes.
    Diagnostics, at the largest width: `positive_cosine`, `hard_negative_cosine` and `in_batch_negative_cosine` (each query's
    hardest), `in_batch_accuracy`, `masked_negatives` (share of the pool masked as false negatives), `embedding_norm`.
    """
    query = sharding.shard(embeddings.query.astype(jnp.float32), sharding.SAMPLES_D)
    with jax.named_scope("in_batch"):
        in_batch, in_batch_facts = in_batch_loss(query, embeddings, samples, config)
    with jax.named_scope("hard"):
        hard, hard_facts = hard_loss(query, embeddings, samples, config)
    norm = mean_of(jnp.linalg.norm(query, axis=-1), samples.sample_mask)
    total = in_batch.value + hard.value
    return total, {"in_batch": in_batch, "hard": hard, **in_batch_facts, **hard_facts, "embedding_norm": norm}


def in_batch_loss(
    query: Float[Array, "B D"], embeddings: Embeddings, samples: Samples, config: ContrastiveConfig
) -> tuple[Mean, dict[str, Mean]]:
    """Cross-entropy of each query against the candidates of the whole global batch."""
    stop = jax.lax.stop_gradient if config.in_batch_passage_grad == "none" else lambda x: x
    dims, weights = config.widths(query.shape[-1])
    passage = sharding.shard(stop(embeddings.passage.astype(jnp.float32)), sharding.SAMPLES_D)
    own = prefix_cosines("bd,bd->b", query, passage, jnp.multiply, dims, config.loss_dtype)
    pool = Embeddings(query, *(stop(e) for e in embeddings[1:]))
    blocks = candidate_blocks(pool, samples, config.in_batch_pool)
    ids = sharding.shard(samples.passage_ids, sharding.P(sharding.BATCH))
    rows = sharding.shard(jnp.arange(query.shape[0]), sharding.P(sharding.BATCH))

    @jax.checkpoint
    def stream(carry, block: Candidates):
        running, hardest, masked, pool = carry
        cosines = prefix_cosines("bd,gd->bg", query, block.vectors, lambda q, p: q[:, None] * p[None, :], dims, config.loss_dtype)
        other = (block.mask > 0)[None, :] & (block.negative[None, :] | (block.sample[None, :] != rows[:, None]))
        false = other & _false_negatives(cosines[-1], own[-1][:, None], block.ids[None, :], ids[:, None], config)
        allowed = other & ~false
        logits = jnp.where(allowed, _logits(cosines, config), -jnp.inf)
        # With the running value among the terms, a block of nothing but masked candidates leaves value and gradient alone.
        running = jax.nn.logsumexp(jnp.concatenate([running[..., None], logits], axis=-1), axis=-1)
        hardest = jnp.maximum(hardest, jnp.max(jnp.where(allowed, cosines[-1], -jnp.inf), axis=-1))
        return (running, hardest, masked + false.sum(-1), pool + other.sum(-1)), None

    none = sharding.shard(jnp.zeros(query.shape[0], jnp.int32), sharding.P(sharding.BATCH))
    start = (_logits(own, config), jnp.full_like(own[-1], -jnp.inf), none, none)
    (running, hardest, masked, pool), _ = jax.lax.scan(stream, start, blocks)
    losses = jnp.einsum("j,jb->b", jnp.asarray(weights), running - _logits(own, config))
    counted = samples.in_batch_weight * samples.sample_mask
    compared = counted * (hardest > -jnp.inf)
    return mean_of(losses, counted), {
        "in_batch_accuracy": mean_of(own[-1] > hardest, compared),
        "in_batch_negative_cosine": mean_of(jnp.where(hardest > -jnp.inf, hardest, 0.0), compared),
        "masked_negatives": Mean(jnp.sum(masked * counted), jnp.sum(pool * counted)),
    }


def hard_loss(
    query: Float[Array, "B D"], embeddings: Embeddings, samples: Samples, config: ContrastiveConfig
) -> tuple[Mean, dict[str, Mean]]:
    """Cross-entropy of each query against its own positive and its own negatives."""
    dims, weights = config.widths(query.shape[-1])
    candidates = jnp.concatenate([embeddings.passage[:, None], embeddings.negatives], axis=1)
    candidates = sharding.shard(candidates, sharding.P(sharding.BATCH, None, None))
    cosines = prefix_cosines("bd,bnd->bn", query, candidates, lambda q, c: q[:, None] * c, dims, config.loss_dtype)
    own, others = cosines[..., :1], cosines[..., 1:]
    false = _false_negatives(others[-1], own[-1], samples.negative_ids, samples.passage_ids[:, None], config)
    allowed = (samples.negative_mask > 0) & ~false
    logits = _logits(jnp.concatenate([own, jnp.where(allowed, others, -jnp.inf)], axis=-1), config)
    losses = jnp.einsum("j,jb->b", jnp.asarray(weights), jax.nn.logsumexp(logits, axis=-1) - logits[..., 0])
    hardest = jnp.max(jnp.where(allowed, others[-1], -jnp.inf), axis=-1, initial=-jnp.inf)
    some = samples.sample_mask * (hardest > -jnp.inf)
    return mean_of(losses, samples.sample_mask), {
        "positive_cosine": mean_of(own[-1, :, 0], samples.sample_mask),
        "hard_negative_cosine": mean_of(jnp.where(hardest > -jnp.inf, hardest, 0.0), some),
    }


def _logits(cosines: Float[Array, "..."], config: ContrastiveConfig) -> Float[Array, "..."]:
    """fp32, after a division in the dtype of the cosines."""
    return (cosines / config.temperature).astype(jnp.float32)


def _false_negatives(
    cosine: Float[Array, "B G"], own: Float[Array, "B 1"], ids: Int[Array, "... G"], own_ids: Int[Array, "B 1"], config: ContrastiveConfig
) -> Bool[Array, "B G"]:
    """Candidates that are the positive's own document, or nearer to the query than the positive by more than the margin."""
    false = jnp.zeros(cosine.shape, bool) if not config.mask_false_negatives else ids == own_ids
    if math.isinf(config.false_negative_margin):
        return jnp.broadcast_to(false, cosine.shape)
    return false | (jax.lax.stop_gradient(cosine) > jax.lax.stop_gradient(own) + config.false_negative_margin)
