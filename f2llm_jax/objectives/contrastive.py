"""The two published softmaxes: a query against the positives of the whole batch, and against its own hard negatives.

Memory is flat in the batch: candidates are streamed in blocks with a running log-sum-exp, recomputed in the backward pass, and
queries are split over devices, so no device ever holds more than its queries times one block.

Dimensions: B samples, N negatives a sample, D model, J matryoshka widths, G candidates of a block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from f2llm_jax import sharding
from f2llm_jax.batch import Samples
from f2llm_jax.objectives.candidates import Candidates, Embeddings, candidate_blocks, query_blocks
from f2llm_jax.objectives.config import ContrastiveConfig
from f2llm_jax.objectives.false_negatives import false_negatives
from f2llm_jax.objectives.matryoshka import prefix_cosines
from f2llm_jax.objectives.mean import Mean, mean_of

CERTAIN = 1e-6  # loss below which focal weighting gives 0: where nothing is left to compare with, its slope is not finite


def contrastive(
    embeddings: Embeddings, samples: Samples, config: ContrastiveConfig, guide: Embeddings | None = None
) -> tuple[Float[Array, ""], dict[str, Mean]]:
    """The loss `in_batch + hard` (weighted over widths), its parts and diagnostics.

    `in_batch` exists for retrieval only (`in_batch_weight`), `hard` for every kind. They stay two separate softmaxes. `hard_weight`
    is the weight of the second where both exist; the parts are given without it.
    Diagnostics, at the largest width: `positive_cosine`, `hard_negative_cosine` and `in_batch_negative_cosine` (each query's
    hardest), `in_batch_accuracy`, `masked_negatives` (share of the pool masked as false negatives), `embedding_norm`; with a guide also
    `masked_hard_negatives` (share of the samples' own). In the two of `in_batch` a document with the positive's text is no rival.

    Args:
      embeddings: raw, of the model that is trained.
      samples: which of them exist.
      config: the options.
      guide: of the guide model, of any width; read only if `config.guide` is set, and without it none is left out for its sake.
    """
    guide = jax.tree.map(lambda x: jax.lax.stop_gradient(x.astype(jnp.float32)), guide) if config.guide else None
    query = sharding.shard(embeddings.query.astype(jnp.float32), sharding.SAMPLES_D)
    with jax.named_scope("in_batch"):
        in_batch, in_batch_facts = in_batch_loss(query, embeddings, samples, config, guide)
    with jax.named_scope("hard"):
        hard, hard_facts = hard_loss(query, embeddings, samples, config, guide)
    norm = mean_of(jnp.linalg.norm(query, axis=-1), samples.sample_mask)
    weight = 1.0 + samples.in_batch_weight * (config.hard_weight - 1.0)
    total = in_batch.value + weight * hard.value
    return total, {"in_batch": in_batch, "hard": hard, **in_batch_facts, **hard_facts, "embedding_norm": norm}


class _Running(NamedTuple):
    """What a stream of candidates leaves of each sample."""

    total: Float[Array, "J B"]  # log of the sum of exponentials of the logits
    right: Float[Array, "J B"]  # the same of positives alone
    hardest: Float[Array, " B"]  # cosine of the nearest candidate, at the largest width
    masked: Int[Array, " B"]  # candidates left out as false negatives
    pool: Int[Array, " B"]  # candidates, those included


class _Anchors(NamedTuple):
    """What candidates are compared with, and what they must stay below."""

    vectors: Float[Array, "B D"]
    guide: Float[Array, "B W"] | None
    own: Float[Array, "J B"]  # cosines of queries and positives
    guide_own: Float[Array, " B"] | None
    ids: Int[Array, " B"]  # of positives
    query: Int[Array, " B"]
    sample: Int[Array, " B"]


def in_batch_loss(
    query: Float[Array, "B D"], embeddings: Embeddings, samples: Samples, config: ContrastiveConfig, guide: Embeddings | None = None
) -> tuple[Mean, dict[str, Mean]]:
    """Cross-entropy of each query against the candidates of the whole global batch.

    With `query_negatives` and `document_negatives` the other queries, compared with the query, and the other documents, compared with its
    positive, are further terms of the same sum.
    """
    stop = jax.lax.stop_gradient if config.in_batch_passage_grad == "none" else lambda x: x
    dims, weights = config.widths(query.shape[-1])
    split = functools.partial(sharding.shard, value=sharding.P(sharding.BATCH))
    passage = sharding.shard(stop(embeddings.passage.astype(jnp.float32)), sharding.SAMPLES_D)
    own = prefix_cosines("bd,bd->b", query, passage, jnp.multiply, dims, config.loss_dtype)
    pool = Embeddings(*(stop(e) for e in embeddings))
    ids, rows = split(samples.passage_ids), split(jnp.arange(query.shape[0]))
    guide_query = guide_passage = guide_own = None
    if guide:
        guide_query, guide_passage = (sharding.shard(x, sharding.SAMPLES_D) for x in guide[:2])
        guide_own = _cosines("bd,bd->b", guide_query, guide_passage)
    of_query = rows if samples.query_ids is None else split(samples.query_ids)
    from_query = _Anchors(query, guide_query, own, guide_own, ids, of_query, rows)
    from_passage = from_query._replace(vectors=passage, guide=guide_passage)
    documents = (
        candidate_blocks(pool, samples, config.in_batch_pool),
        candidate_blocks(guide, samples, config.in_batch_pool) if guide else None,
    )

    none = split(jnp.zeros(query.shape[0], jnp.int32))
    state = _Running(_logits(own, config), _logits(own, config), jnp.full_like(own[-1], -jnp.inf), none, none)
    state = _streamed(state, from_query, documents, config, dims, of_queries=True)
    hardest = state.hardest
    if config.query_negatives:
        queries = query_blocks(pool.query, samples), query_blocks(guide.query, samples) if guide else None
        state = _streamed(state, from_query._replace(sample=of_query), queries, config, dims)
    if config.document_negatives:
        state = _streamed(state, from_passage, documents, config, dims)
    losses = jnp.einsum("j,jb->b", jnp.asarray(weights), _focal(state.total - state.right, config))
    counted = samples.in_batch_weight * samples.sample_mask
    compared = counted * (hardest > -jnp.inf)
    return mean_of(losses, counted), {
        "in_batch_accuracy": mean_of(own[-1] > hardest, compared),
        "in_batch_negative_cosine": mean_of(jnp.where(hardest > -jnp.inf, hardest, 0.0), compared),
        "masked_negatives": Mean(jnp.sum(state.masked * counted), jnp.sum(state.pool * counted)),
    }


def _streamed(
    state: _Running,
    anchors: _Anchors,
    blocks: tuple[Candidates, Candidates | None],
    config: ContrastiveConfig,
    dims: tuple[int, ...],
    of_queries: bool = False,
) -> _Running:
    """`state` with the candidates in it that do not belong to the anchor's own sample; documents `of_queries` with its own negatives."""

    @jax.checkpoint
    def stream(state: _Running, blocks: tuple[Candidates, Candidates | None]) -> tuple[_Running, None]:
        block, guide = blocks
        cosines = prefix_cosines("bd,gd->bg", anchors.vectors, block.vectors, _outer, dims, config.loss_dtype)
        mine = block.sample[None, :] == anchors.sample[:, None]
        other = (block.mask > 0)[None, :] & (block.negative[None, :] | ~mine if of_queries else ~mine)
        guided = None
        if guide is not None and anchors.guide is not None and anchors.guide_own is not None:
            guided = _cosines("bd,gd->bg", anchors.guide, guide.vectors, _outer), anchors.guide_own[:, None]
        same = block.ids[None, :] == anchors.ids[:, None]
        false = other & false_negatives(cosines[-1], anchors.own[-1][:, None], same, config, guided)
        logits, right = _logits(cosines, config), state.right
        if of_queries:
            logits = _hardened(logits, cosines, mine, config)
        if config.positives != "own":
            siblings = other & ~block.negative[None, :] & (block.query[None, :] == anchors.query[:, None])
            if joint := config.positives == "joint" and of_queries:
                right = _added(right, jnp.where(siblings, logits, -jnp.inf))
            false = false & ~siblings if joint else false | siblings
        allowed = other & ~false
        logits = jnp.where(allowed, logits, -jnp.inf)
        rivals = (allowed & ~siblings if config.positives == "joint" else allowed) & ~same
        hardest = jnp.maximum(state.hardest, jnp.max(jnp.where(rivals, cosines[-1], -jnp.inf), axis=-1))
        return _Running(_added(state.total, logits), right, hardest, state.masked + false.sum(-1), state.pool + other.sum(-1)), None

    return jax.lax.scan(stream, state, blocks)[0]


def _added(total: Float[Array, "J B"], logits: Float[Array, "J B G"]) -> Float[Array, "J B"]:
    """With the running value among the terms, a block of nothing but masked candidates leaves value and gradient alone."""
    return jax.nn.logsumexp(jnp.concatenate([total[..., None], logits], axis=-1), axis=-1)


def hard_loss(
    query: Float[Array, "B D"], embeddings: Embeddings, samples: Samples, config: ContrastiveConfig, guide: Embeddings | None = None
) -> tuple[Mean, dict[str, Mean]]:
    """Cross-entropy of each query against its own positive and its own negatives."""
    dims, weights = config.widths(query.shape[-1])
    candidates = jnp.concatenate([embeddings.passage[:, None], embeddings.negatives], axis=1)
    candidates = sharding.shard(candidates, sharding.ROWS_TD)
    cosines = prefix_cosines("bd,bnd->bn", query, candidates, _each, dims, config.loss_dtype)
    own, others = cosines[..., :1], cosines[..., 1:]
    guided = None
    if guide:
        theirs = sharding.shard(jnp.concatenate([guide.passage[:, None], guide.negatives], axis=1), sharding.ROWS_TD)
        guides = _cosines("bd,bnd->bn", sharding.shard(guide.query, sharding.SAMPLES_D), theirs, _each)
        guided = guides[:, 1:], guides[:, :1]
    same = samples.negative_ids == samples.passage_ids[:, None]
    false = false_negatives(others[-1], own[-1], same, config, guided)
    there = samples.negative_mask > 0
    allowed = there & ~false
    rivals = _hardened(_logits(others, config), others, True, config)
    logits = jnp.concatenate([_logits(own, config), jnp.where(allowed, rivals, -jnp.inf)], axis=-1)
    losses = jnp.einsum("j,jb->b", jnp.asarray(weights), _focal(jax.nn.logsumexp(logits, axis=-1) - logits[..., 0], config))
    hardest = jnp.max(jnp.where(allowed, others[-1], -jnp.inf), axis=-1, initial=-jnp.inf)
    some = samples.sample_mask * (hardest > -jnp.inf)
    diagnostics = {
        "positive_cosine": mean_of(own[-1, :, 0], samples.sample_mask),
        "hard_negative_cosine": mean_of(jnp.where(hardest > -jnp.inf, hardest, 0.0), some),
    }
    if guide:
        diagnostics["masked_hard_negatives"] = mean_of(jnp.where(there, false, False), samples.negative_mask)
    return mean_of(losses, samples.sample_mask), diagnostics


def _logits(cosines: Float[Array, "..."], config: ContrastiveConfig) -> Float[Array, "..."]:
    """fp32, after a division in the dtype of the cosines."""
    return (cosines / config.temperature).astype(jnp.float32)


def _hardened(
    logits: Float[Array, "..."], cosines: Float[Array, "..."], mine: Bool[Array, "..."] | bool, config: ContrastiveConfig
) -> Float[Array, "..."]:
    """Logits in which a query's own hard negatives weigh `exp(hardness * cosine)` in the sum (EmbeddingGemma, section 2.3)."""
    if not config.hardness:
        return logits
    return logits + jnp.where(mine, config.hardness * jax.lax.stop_gradient(cosines).astype(jnp.float32), 0.0)


def _focal(losses: Float[Array, "J B"], config: ContrastiveConfig) -> Float[Array, "J B"]:
    """Cross-entropies times `(1 - p) ** focal`, p being the probability of the positive."""
    if not config.focal:
        return losses
    uncertain = losses > CERTAIN
    missing = -jnp.expm1(-jnp.where(uncertain, losses, 1.0))
    return jnp.where(uncertain, missing**config.focal * losses, 0.0)


def _cosines(contract: str, a: Float[Array, "... W"], b: Float[Array, "... W"], outer=jnp.multiply) -> Float[Array, "..."]:
    return prefix_cosines(contract, a, b, outer, a.shape[-1:])[0]


def _outer(a: Float[Array, " B"], b: Float[Array, " G"]) -> Float[Array, "B G"]:
    return a[:, None] * b[None, :]


def _each(a: Float[Array, " B"], b: Float[Array, "B N"]) -> Float[Array, "B N"]:
    return a[:, None] * b
