"""Following frozen teachers: by raw embeddings as published, by direction, or by similarity scores; in their space or through a projection.

Dimensions: B samples, N negatives a sample, D student width, W teacher width, J widths of the student that follow, G candidates of a
block.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from f2llm_jax import sharding
from f2llm_jax.batch import Samples
from f2llm_jax.objectives.candidates import Candidates, Embeddings, candidate_blocks
from f2llm_jax.objectives.config import DistillationKind
from f2llm_jax.objectives.matryoshka import inverse_norm, prefix_cosines
from f2llm_jax.objectives.mean import Mean, mean_of

Projection = Float[Array, "D W"]


def distillation(
    student: Embeddings,
    teacher: Embeddings,
    samples: Samples,
    kind: DistillationKind,
    temperature: float,
    *,
    dims: tuple[int, ...] = (),
    weights: tuple[float, ...] = (),
    projection: Projection | None = None,
) -> Mean:
    """The distillation term; its count is 1, since it sums means of different counts.

    * "mse": mean squared error of raw embeddings, the teacher cut to the student's width: one mean each over queries, positives
      and negatives, added up, so that negatives together weigh as much as queries (F2LLM `utils.py`).
    * "cosine": the same three means of `1 - cosine(student, teacher cut to D)`.
    * "scores": mean over queries of KL(teacher || student) between softmaxes of `cosine / temperature` over the positives and
      negatives of the whole batch. The teacher scores at its full width, and only these scores cross over.

    With a projection, "mse" and "cosine" compare the teacher at its full width with `unit(student) @ projection`; a student of width d,
    the first d components at length 1, meets the first d rows.

    Args:
      student, teacher: raw; the teacher gets no gradient.
      samples: which of them exist.
      kind: what is compared.
      temperature: of the scores.
      dims: widths of the student at which it follows, ascending; empty for the full one. "mse" without a projection has no use for them.
      weights: one a width; empty for 1 each.
      projection: from the student's space to the teacher's, trained along.
    """
    teacher = Embeddings(*(jax.lax.stop_gradient(t.astype(jnp.float32)) for t in teacher))
    student = Embeddings(*(s.astype(jnp.float32) for s in student))
    dims = dims or student.query.shape[-1:]
    weights = weights or (1.0,) * len(dims)
    if kind == "scores":
        return Mean(_scores(student, teacher, samples, temperature, dims, weights).value, jnp.float32(1))
    if projection is not None:
        projection = sharding.shard(projection, sharding.P(None, None))
    masks = samples.sample_mask, samples.sample_mask, samples.negative_mask
    terms = [_follow(s, t, mask, kind, dims, weights, projection).value for s, t, mask in zip(student, teacher, masks, strict=True)]
    return Mean(jnp.asarray(sum(terms)), jnp.float32(1))


def _follow(
    student: Float[Array, "B ... D"],
    teacher: Float[Array, "B ... W"],
    mask: Float[Array, "B ..."],
    kind: DistillationKind,
    dims: tuple[int, ...],
    weights: tuple[float, ...],
    projection: Projection | None,
) -> Mean:
    """The mean over the vectors of one role."""
    split = sharding.P(sharding.BATCH, *[None] * (student.ndim - 1))
    student = sharding.shard(student, split)
    teacher = sharding.shard(teacher if projection is not None else teacher[..., : student.shape[-1]], split)
    if projection is not None:
        errors = [_error(x, teacher, kind) for x in _projected(student, projection, dims)]
    elif kind == "mse":
        errors = [_error(student, teacher, kind)]
    else:
        letters = "abc"[: student.ndim - 1]
        errors = list(1.0 - prefix_cosines(f"{letters}d,{letters}d->{letters}", student, teacher, jnp.multiply, dims))
    return mean_of(sum(weight * error for weight, error in zip(weights, errors, strict=True)), mask)


def _error(student: Float[Array, "B ... W"], teacher: Float[Array, "B ... W"], kind: DistillationKind) -> Float[Array, "B ..."]:
    """Of vectors in the teacher's space."""
    if kind == "mse":
        return jnp.mean(jnp.square(student - teacher), axis=-1)
    norms = inverse_norm(jnp.sum(student * student, axis=-1)) * inverse_norm(jnp.sum(teacher * teacher, axis=-1))
    return 1.0 - jnp.sum(student * teacher, axis=-1) * norms


def _projected(student: Float[Array, "B ... D"], projection: Projection, dims: tuple[int, ...]) -> Iterator[Float[Array, "B ... W"]]:
    """`unit(student[..., :d]) @ projection[:d]` for each of the dims, in running sums over the bands between them."""
    mapped, squares = jnp.float32(0), jnp.float32(0)
    for low, high in zip((0, *dims[:-1]), dims, strict=True):
        band = student[..., low:high]
        mapped = mapped + jnp.einsum("...d,dw->...w", band, projection[low:high], precision=jax.lax.Precision.HIGHEST)
        squares = squares + jnp.sum(band * band, axis=-1)
        yield mapped * inverse_norm(squares)[..., None]


def _scores(
    student: Embeddings, teacher: Embeddings, samples: Samples, temperature: float, dims: tuple[int, ...], weights: tuple[float, ...]
) -> Mean:
    """KL by streaming, at each width of the student: running log-sum-exps of both, and the teacher's mean of the difference of logits."""
    queries = [sharding.shard(e.query, sharding.SAMPLES_D) for e in (student, teacher)]
    blocks = [candidate_blocks(e, samples, "positives_and_negatives") for e in (student, teacher)]
    widths = dims, teacher.query.shape[-1:]

    def logits(query: Float[Array, "B D"], block: Candidates, dims: tuple[int, ...]) -> Float[Array, "J B G"]:
        cosine = prefix_cosines("bd,gd->bg", query, block.vectors, lambda q, c: q[:, None] * c[None, :], dims)
        return jnp.where(block.mask > 0, cosine / temperature, -jnp.inf)

    def grown(total: Float[Array, "J B"], logits: Float[Array, "J B G"]) -> Float[Array, "J B"]:
        return jax.nn.logsumexp(jnp.concatenate([total[..., None], logits], axis=-1), axis=-1)

    @jax.checkpoint
    def stream(carry, block: tuple[Candidates, Candidates]):
        total_student, total_teacher, difference = carry
        s, t = (logits(query, b, dims) for query, b, dims in zip(queries, block, widths, strict=True))
        new_student, new_teacher = grown(total_student, s), grown(total_teacher, t)
        share = jnp.exp(t - new_teacher[..., None])
        gap = jnp.where(jnp.isfinite(t), t - s, 0.0)  # masked alike on both sides
        difference = difference * jnp.exp(total_teacher - new_teacher) + jnp.sum(share * gap, axis=-1)
        return (new_student, new_teacher, difference), None

    # A floor far below any logit instead of -inf: its weight is exactly 0, its gradient is not NaN.
    floor = jnp.full_like(queries[0][:, 0], -1e4)[None]
    every = jnp.concatenate([floor] * len(dims))
    (total_student, total_teacher, difference), _ = jax.lax.scan(stream, (every, floor, jnp.zeros_like(every)), tuple(blocks))
    losses = difference - total_teacher + total_student
    return mean_of(sum(weight * loss for weight, loss in zip(weights, losses, strict=True)), samples.sample_mask)
