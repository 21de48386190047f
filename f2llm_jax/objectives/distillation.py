"""Following a frozen teacher: by raw embeddings as published, by direction, or by similarity scores.

Dimensions: B samples, N negatives a sample, D student width, W teacher width (at least D), G candidates of a block.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from f2llm_jax import sharding
from f2llm_jax.batch import Samples
from f2llm_jax.objectives.candidates import Candidates, Embeddings, candidate_blocks
from f2llm_jax.objectives.config import DistillationKind
from f2llm_jax.objectives.matryoshka import prefix_cosines
from f2llm_jax.objectives.mean import Mean, mean_of


def distillation(student: Embeddings, teacher: Embeddings, samples: Samples, kind: DistillationKind, temperature: float) -> Mean:
    """The distillation term; its count is 1, since it sums means of different counts.

    * "mse": mean squared error of raw embeddings, the teacher cut to the student's width: one mean each over queries, positives
      and negatives, added up, so that negatives together weigh as much as queries (F2LLM `utils.py`).
    * "cosine": the same three means of `1 - cosine(student, teacher cut to D)`.
    * "scores": mean over queries of KL(teacher || student) between softmaxes of `cosine / temperature` over the positives and
      negatives of the whole batch. The teacher scores at its full width, and only these scores cross over.
    """
    teacher = Embeddings(*(jax.lax.stop_gradient(t.astype(jnp.float32)) for t in teacher))
    student = Embeddings(*(s.astype(jnp.float32) for s in student))
    if kind == "scores":
        return Mean(_scores(student, teacher, samples, temperature).value, jnp.float32(1))
    masks = samples.sample_mask, samples.sample_mask, samples.negative_mask
    terms = [_follow(s, t, mask, kind).value for s, t, mask in zip(student, teacher, masks, strict=True)]
    return Mean(jnp.asarray(sum(terms)), jnp.float32(1))


def _follow(student: Float[Array, "B ... D"], teacher: Float[Array, "B ... W"], mask: Float[Array, "B ..."], kind: str) -> Mean:
    split = sharding.P(sharding.BATCH, *[None] * (student.ndim - 1))
    student, teacher = sharding.shard(student, split), sharding.shard(teacher[..., : student.shape[-1]], split)
    if kind == "mse":
        return mean_of(jnp.mean(jnp.square(student - teacher), axis=-1), mask)
    letters = "abc"[: student.ndim - 1]
    cosine = prefix_cosines(f"{letters}d,{letters}d->{letters}", student, teacher, jnp.multiply, student.shape[-1:])[0]
    return mean_of(1.0 - cosine, mask)


def _scores(student: Embeddings, teacher: Embeddings, samples: Samples, temperature: float) -> Mean:
    """KL by streaming: running log-sum-exps of both, and the teacher's running mean of the difference of logits."""
    queries = [sharding.shard(e.query, sharding.SAMPLES_D) for e in (student, teacher)]
    blocks = [candidate_blocks(e, samples, "positives_and_negatives") for e in (student, teacher)]

    def logits(query: Float[Array, "B D"], block: Candidates) -> Float[Array, "B G"]:
        cosine = prefix_cosines("bd,gd->bg", query, block.vectors, lambda q, c: q[:, None] * c[None, :], query.shape[-1:])[0]
        return jnp.where(block.mask > 0, cosine / temperature, -jnp.inf)

    @jax.checkpoint
    def stream(carry, block: tuple[Candidates, Candidates]):
        total_student, total_teacher, difference = carry
        s, t = (logits(query, b) for query, b in zip(queries, block, strict=True))
        new_student = jax.nn.logsumexp(jnp.concatenate([total_student[:, None], s], axis=-1), axis=-1)
        new_teacher = jax.nn.logsumexp(jnp.concatenate([total_teacher[:, None], t], axis=-1), axis=-1)
        share = jnp.exp(t - new_teacher[:, None])
        gap = jnp.where(jnp.isfinite(t), t - s, 0.0)  # masked alike on both sides
        difference = difference * jnp.exp(total_teacher - new_teacher) + jnp.sum(share * gap, axis=-1)
        return (new_student, new_teacher, difference), None

    # A floor far below any logit instead of -inf: its weight is exactly 0, its gradient is not NaN.
    floor = jnp.full_like(queries[0][:, 0], -1e4)
    (total_student, total_teacher, difference), _ = jax.lax.scan(stream, (floor, floor, jnp.zeros_like(floor)), tuple(blocks))
    return mean_of(difference - total_teacher + total_student, samples.sample_mask)
