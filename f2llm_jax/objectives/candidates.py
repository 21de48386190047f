"""What queries are compared with across a batch, in blocks, so that memory is flat in the batch.

Dimensions: B samples, N negatives a sample, D model, G candidates of a block.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from f2llm_jax import sharding
from f2llm_jax.batch import Samples
from f2llm_jax.objectives.config import NegativePool

BLOCK = 1024  # candidates whose similarities with all queries exist at once


class Embeddings(NamedTuple):
    """Raw embeddings of a batch."""

    query: Float[Array, "B D"]
    passage: Float[Array, "B D"]
    negatives: Float[Array, "B N D"]


def split(embeddings: Embeddings, widths: Sequence[int]) -> list[Embeddings]:
    """Those of several models from their vectors one after another; of one model if no widths are given."""
    ends = list(itertools.accumulate(widths)) or [embeddings.query.shape[-1]]
    return [Embeddings(*(x[..., start:end] for x in embeddings)) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


class Candidates(NamedTuple):
    """Vectors that every query is compared with, on every device."""

    vectors: Float[Array, "G D"]
    mask: Float[Array, " G"]
    ids: Int[Array, " G"]  # of documents; of queries that of their positive
    sample: Int[Array, " G"]  # that it belongs to
    negative: Bool[Array, " G"]  # whether it is one of its sample's negatives
    query: Int[Array, " G"]  # id of its sample's query; of the sample where the data does not tell


def candidate_blocks(embeddings: Embeddings, samples: Samples, pool: NegativePool) -> Candidates:
    """The documents of the whole batch, gathered on every device, in equal blocks on a new leading axis."""
    candidates = _of_samples(embeddings.passage, samples)
    if pool == "positives_and_negatives":
        negatives = _everywhere(embeddings.negatives.astype(jnp.float32)).reshape(-1, embeddings.negatives.shape[-1])
        mask = _everywhere(samples.negative_mask).reshape(-1)
        sample = jnp.repeat(candidates.sample, samples.negative_mask.shape[1])
        ids, query = _everywhere(samples.negative_ids).reshape(-1), jnp.repeat(candidates.query, samples.negative_mask.shape[1])
        more = Candidates(negatives, mask, ids, sample, jnp.ones(mask.shape, bool), query)
        candidates = Candidates(*(jnp.concatenate(pair) for pair in zip(candidates, more, strict=True)))
    return _blocks(candidates)


def query_blocks(query: Float[Array, "B D"], samples: Samples) -> Candidates:
    """The queries of the whole batch, as `candidate_blocks` gives the documents; equal queries belong to one sample."""
    candidates = _of_samples(query, samples)
    return _blocks(candidates._replace(sample=candidates.query))


def _of_samples(vectors: Float[Array, "B D"], samples: Samples) -> Candidates:
    vectors = _everywhere(vectors.astype(jnp.float32))
    sample = jnp.arange(vectors.shape[0])
    query = sample if samples.query_ids is None else _everywhere(samples.query_ids)
    ids = _everywhere(samples.passage_ids)
    return Candidates(vectors, _everywhere(samples.sample_mask), ids, sample, jnp.zeros(sample.shape, bool), query)


def _blocks(candidates: Candidates) -> Candidates:
    count = candidates.mask.shape[0]
    size = min(count, BLOCK)

    def cut(x: Array) -> Array:  # the last block is filled up with masked candidates
        return jnp.pad(x, [(0, -count % size)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, size, *x.shape[1:])

    return Candidates(*(cut(x) for x in candidates))


def _everywhere(x: Array) -> Array:
    return sharding.shard(x, sharding.P(*[None] * x.ndim))
