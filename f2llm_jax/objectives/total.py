"""The sum of all terms."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from f2llm_jax.batch import Samples
from f2llm_jax.errors import UserError
from f2llm_jax.objectives.candidates import Embeddings, split
from f2llm_jax.objectives.config import Objective
from f2llm_jax.objectives.contrastive import contrastive
from f2llm_jax.objectives.distillation import Projection, distillation
from f2llm_jax.objectives.graded import graded_loss
from f2llm_jax.objectives.mean import Mean
from f2llm_jax.objectives.scores import score_loss
from f2llm_jax.objectives.spread_out import spread_out

# What training minimises: a pure function `(embeddings, samples, teacher) -> (loss, metrics)` of the whole batch. `teacher` is None
# where there is none and on held-out rows. `total` with its `objective` bound is one.
LossFunction = Callable[[Embeddings, Samples, Embeddings | None], tuple[Float[Array, ""], dict[str, Mean]]]


def total(
    embeddings: Embeddings,
    samples: Samples,
    objective: Objective,
    teacher: Embeddings | None = None,
    guide: Embeddings | None = None,
    projections: Sequence[Projection] = (),
) -> tuple[Float[Array, ""], dict[str, Mean]]:
    """The loss, and what to log of it.

    `teacher` is what distillation follows, `guide` what finds false negatives (see false_negatives.py); either may be None.
    `projections` has one for each teacher, or is empty.

    The weighted value of each optional term is logged too, as `weighted/NAME`; the contrastive parts are logged without `hard_weight`.
    """
    if objective.contrastive.positives != "own" and samples.query_ids is None:
        raise UserError(
            f"config.objective.positives={objective.contrastive.positives!r} needs to know which rows are of one query, and the data was "
            "prepared by an older version that did not note it; prepare it again with --overwrite, or set it to 'own'"
        )
    loss, metrics = contrastive(embeddings, samples, objective.contrastive, guide)
    extra = {}
    if teacher is not None:
        terms = _follow_each(embeddings, teacher, samples, objective, projections)
        shares = objective.teacher_weights or (1.0 / len(terms),) * len(terms)
        term = Mean(jnp.asarray(sum(share * one.sum for share, one in zip(shares, terms, strict=True))), jnp.float32(1))
        extra["distillation"] = objective.distillation_weight, term
        if len(terms) > 1:
            metrics |= {f"distillation/{number}": one for number, one in enumerate(terms)}
    if objective.scores_weight:
        extra["scores"] = objective.scores_weight, _scores(embeddings, samples, objective)
    if objective.graded_weight and samples.graded_weight is not None:
        extra["graded"] = objective.graded_weight, graded_loss(embeddings, samples, objective.graded, objective.contrastive)
    if objective.spread_out_weight:
        extra["spread_out"] = objective.spread_out_weight, spread_out(embeddings, samples.sample_mask)
    for name, (weight, term) in extra.items():
        loss = loss + weight * term.value
        metrics |= {name: term, f"weighted/{name}": Mean(weight * term.sum, term.count)}
    return loss, metrics


def _follow_each(
    embeddings: Embeddings, teacher: Embeddings, samples: Samples, objective: Objective, projections: Sequence[Projection]
) -> list[Mean]:
    """The distillation term of each teacher."""
    teachers = split(teacher, objective.teacher_widths)
    dims, weights = objective.followed(embeddings.query.shape[-1])
    return [
        distillation(
            embeddings,
            one,
            samples,
            objective.distillation,
            objective.contrastive.temperature,
            dims=dims,
            weights=weights,
            projection=projection,
        )
        for one, projection in zip(teachers, projections or (None,) * len(teachers), strict=True)
    ]


def _scores(embeddings: Embeddings, samples: Samples, objective: Objective) -> Mean:
    if samples.scores is None:
        raise UserError(
            f"config.objective.scores_weight={objective.scores_weight} learns from scores, and no source of the data has any; prepare "
            "files with a column of scores (docs/data.md), again with --overwrite if they were prepared before, or set it to 0"
        )
    there = jnp.concatenate([samples.sample_mask[:, None], samples.negative_mask], axis=1) > 0
    return score_loss(embeddings, samples.scores, there, objective.scores, objective.scores_temperature, objective.contrastive)
