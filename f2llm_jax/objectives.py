"""What is learned, as pure functions of embeddings.

Every function takes raw embeddings and returns a `Mean`: a weighted sum and a count, divided once at the very end, so that
masks, chunks and hosts cannot change an average.

Dimensions: B samples, N negatives a sample, D model.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from f2llm_jax import sharding

PassageGrad = Literal["full", "none"]
TINY = 1e-24  # floor of a squared norm; torch's normalize floors the norm at 1e-12


class Mean(NamedTuple):
    """A mean that has not been taken yet."""

    sum: Float[Array, ""]
    count: Float[Array, ""]

    @property
    def value(self) -> Float[Array, ""]:
        """sum / count, and 0 where nothing was counted."""
        return self.sum / jnp.maximum(self.count, 1.0)


class Embeddings(NamedTuple):
    """Raw embeddings of a batch."""

    query: Float[Array, "B D"]
    passage: Float[Array, "B D"]
    negatives: Float[Array, "B N D"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """Which terms are summed and how. The defaults are the published recipe.

    Attributes:
      temperature: cosines are divided by it.
      dims: matryoshka widths, each at most D; empty means D alone. See `matryoshka_dims`.
      in_batch_passage_grad: "full" sends the in-batch loss's gradient to queries and passages; "none" to queries only, as
        the published multi-GPU trainer does (its gather carries no gradient).
      distillation_weight: weight of the distillation term; 0 without a teacher.
    """

    temperature: float = 0.05
    dims: tuple[int, ...] = ()
    in_batch_passage_grad: PassageGrad = "full"
    distillation_weight: float = 0.0

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive; the published value is 0.05")
        if self.in_batch_passage_grad not in ("full", "none"):
            raise ValueError(f"in_batch_passage_grad={self.in_batch_passage_grad!r} must be 'full' or 'none'")
        if self.distillation_weight < 0:
            raise ValueError(f"distillation_weight={self.distillation_weight} must not be negative")


def matryoshka_dims(width: int, minimum: int = 8) -> tuple[int, ...]:
    """The published widths, ascending: every power of two from `minimum` up to below `width`, then `width`."""
    powers = (2**k for k in range(1, width.bit_length()))
    return (*(d for d in powers if minimum <= d < width), width)


def matryoshka_weights(dims: Sequence[int]) -> tuple[float, ...]:
    """`1 / (n * sqrt(largest / d))` for the n-th largest d, in the order of `dims`; not normalised (F2LLM `utils.py`)."""
    largest_first = sorted(dims, reverse=True)
    return tuple(1.0 / ((largest_first.index(d) + 1) * math.sqrt(largest_first[0] / d)) for d in dims)


def contrastive(
    embeddings: Embeddings,
    sample_mask: Float[Array, "B"],
    negative_mask: Float[Array, "B N"],
    in_batch_weight: Float[Array, ""],
    objective: Objective,
) -> tuple[Float[Array, ""], dict[str, Mean]]:
    """The sum of the two published softmaxes and its parts: `in_batch` (retrieval only) and `hard`.

    Each part is summed over matryoshka widths with the published weights. They stay two separate softmaxes: hard negatives
    of other samples never enter the in-batch one.
    """
    dims = objective.dims or (embeddings.query.shape[-1],)
    weights = matryoshka_weights(dims)
    scale = 1.0 / objective.temperature
    query = sharding.shard(embeddings.query.astype(jnp.float32), sharding.SAMPLES_D)
    with jax.named_scope("in_batch"):
        losses = (
            in_batch(c * scale, sample_mask) for c in in_batch_cosines(query, embeddings.passage, dims, objective.in_batch_passage_grad)
        )
        in_batch_losses = sum(w * loss for w, loss in zip(weights, losses, strict=True))
    with jax.named_scope("hard"):
        cosines = hard_cosines(query, embeddings.passage, embeddings.negatives, dims)
        hard_losses = sum(w * hard(c * scale, negative_mask) for w, c in zip(weights, cosines, strict=True))
    count = sample_mask.sum()
    parts = {
        "in_batch": Mean(in_batch_weight * jnp.sum(in_batch_losses * sample_mask), in_batch_weight * count),
        "hard": Mean(jnp.sum(hard_losses * sample_mask), count),
    }
    return parts["in_batch"].value + parts["hard"].value, parts


def in_batch(logits: Float[Array, "B B"], sample_mask: Float[Array, "B"]) -> Float[Array, "B"]:
    """Cross-entropy of each query against the positives of the whole global batch; its own is on the diagonal."""
    columns = sharding.shard(sample_mask, sharding.P(None))
    logits = jnp.where(columns > 0, logits, -jnp.inf)
    own = jnp.sum(jnp.where(jnp.eye(logits.shape[0], dtype=bool), logits, 0.0), axis=-1)
    # A sample that does not exist has no own column: keep its (unused) loss finite.
    return jnp.where(sample_mask > 0, jax.nn.logsumexp(logits, axis=-1) - own, 0.0)


def hard(logits: Float[Array, "B 1+N"], negative_mask: Float[Array, "B N"]) -> Float[Array, "B"]:
    """Cross-entropy of each query against its own positive (column 0) and its own negatives."""
    negatives = jnp.where(negative_mask > 0, logits[:, 1:], -jnp.inf)
    return jax.nn.logsumexp(jnp.concatenate([logits[:, :1], negatives], axis=-1), axis=-1) - logits[:, 0]


def in_batch_cosines(
    query: Float[Array, "B D"], passage: Float[Array, "B D"], dims: Sequence[int], passage_grad: PassageGrad
) -> Iterator[Float[Array, "B B"]]:
    """Cosines of every query with every positive at each width of `dims`; queries stay split, positives are gathered."""
    passage = sharding.shard(passage.astype(jnp.float32), sharding.P(None, None))
    passage = jax.lax.stop_gradient(passage) if passage_grad == "none" else passage
    return _prefix_cosines("bd,cd->bc", query, passage, lambda q, p: q[:, None] * p[None, :], dims)


def hard_cosines(
    query: Float[Array, "B D"], passage: Float[Array, "B D"], negatives: Float[Array, "B N D"], dims: Sequence[int]
) -> Iterator[Float[Array, "B 1+N"]]:
    """Cosines of each query with its own positive and negatives at each width of `dims`."""
    candidates = jnp.concatenate([passage[:, None], negatives], axis=1).astype(jnp.float32)
    candidates = sharding.shard(candidates, sharding.P(sharding.BATCH, None, None))
    return _prefix_cosines("bd,bnd->bn", query, candidates, lambda q, c: q[:, None] * c, dims)


def _prefix_cosines(contract: str, a, b, outer, dims: Sequence[int]) -> Iterator[Array]:
    """Cosines of `a[..., :d]` and `b[..., :d]` for ascending d, through running sums over the bands between the dims.

    Each component is multiplied and squared once, whatever the number of dims.
    """
    if list(dims) != sorted(set(dims)) or not 0 < dims[0] <= dims[-1] <= a.shape[-1]:
        raise ValueError(f"matryoshka dims {tuple(dims)} must ascend without repeats between 1 and the width {a.shape[-1]}")
    dot = squares_a = squares_b = 0.0
    for low, high in zip((0, *dims[:-1]), dims, strict=True):
        band_a, band_b = a[..., low:high], b[..., low:high]
        dot = dot + jnp.einsum(contract, band_a, band_b, precision=jax.lax.Precision.HIGHEST)
        squares_a = squares_a + jnp.sum(band_a * band_a, axis=-1)
        squares_b = squares_b + jnp.sum(band_b * band_b, axis=-1)
        yield dot * outer(_inverse_norm(squares_a), _inverse_norm(squares_b))


def _inverse_norm(squares: Float[Array, "..."]) -> Float[Array, "..."]:
    return jax.lax.rsqrt(jnp.maximum(squares, TINY))


def distillation(student: Embeddings, teacher: Embeddings, sample_mask: Float[Array, "B"], negative_mask: Float[Array, "B N"]) -> Mean:
    """Mean squared error of raw embeddings, teacher cut to the student's width: one mean each for queries, positives and
    negatives, added up (F2LLM `utils.py`; negatives together weigh as much as queries).

    Returns a `Mean` whose count is 1: the three means have different counts and are taken here.
    """
    width = student.query.shape[-1]
    masks = Embeddings(sample_mask, sample_mask, negative_mask)
    total = jnp.float32(0)
    for s, t, mask in zip(student, teacher, masks, strict=True):
        error = jnp.square(s.astype(jnp.float32) - jax.lax.stop_gradient(t[..., :width].astype(jnp.float32)))
        total += Mean(jnp.sum(jnp.sum(sharding.shard(error, _like(mask, error)), axis=-1) * mask), jnp.sum(mask) * width).value
    return Mean(total, jnp.float32(1))


def _like(mask: Array, error: Array) -> jax.sharding.PartitionSpec:
    """Samples split as the mask's are, everything else whole."""
    return sharding.P(sharding.BATCH, *[None] * (error.ndim - 1))
