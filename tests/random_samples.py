"""Random embeddings of a batch and the masks of what is absent from it."""

import jax.numpy as jnp
import numpy as np

from f2llm_jax.objectives import Embeddings, Samples

B, N, D = 8, 5, 20
DIMS = (4, 8, 16, 20)
ABSENT_SAMPLES, ABSENT_NEGATIVES = (2, 7), ((0, 4), (3, 0), (3, 1), (3, 2), (3, 3), (3, 4))


def random_embeddings(seed, width=D):
    rng = np.random.default_rng(seed)
    # Columns of unlike scale, so that a wrong truncation or a missing normalisation shows.
    shapes = (B, width), (B, width), (B, N, width)
    return Embeddings(*(jnp.asarray(rng.normal(size=s) * np.linspace(3, 0.3, width), jnp.float32) for s in shapes))


def masks(full=False):
    samples, negatives = np.ones(B, np.float32), np.ones((B, N), np.float32)
    if not full:
        samples[list(ABSENT_SAMPLES)] = 0
        negatives[tuple(zip(*ABSENT_NEGATIVES, strict=True))] = 0
        negatives[list(ABSENT_SAMPLES)] = 0
    return jnp.asarray(samples), jnp.asarray(negatives)


def of(sample_mask, negative_mask, weight=1.0, passage_ids=None, negative_ids=None):
    """The `Samples` of these masks; all documents differ unless ids are given."""
    passage_ids = jnp.arange(B) if passage_ids is None else jnp.asarray(passage_ids)
    negative_ids = jnp.arange(B, B + B * N).reshape(B, N) if negative_ids is None else jnp.asarray(negative_ids)
    return Samples(sample_mask, negative_mask, jnp.float32(weight), passage_ids, negative_ids)
