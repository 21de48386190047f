"""The sum of all terms."""

from collections.abc import Callable

from jaxtyping import Array, Float

from f2llm_jax.batch import Samples
from f2llm_jax.objectives.candidates import Embeddings
from f2llm_jax.objectives.config import Objective
from f2llm_jax.objectives.contrastive import contrastive
from f2llm_jax.objectives.distillation import distillation
from f2llm_jax.objectives.mean import Mean
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
) -> tuple[Float[Array, ""], dict[str, Mean]]:
    """The loss, and what to log of it.

    `teacher` is what distillation follows, `guide` what finds false negatives (see false_negatives.py); either may be None.

    The weighted value of each optional term is logged too, as `weighted/NAME`; the contrastive parts have weight 1.
    """
    loss, metrics = contrastive(embeddings, samples, objective.contrastive, guide)
    extra = {}
    if teacher is not None:
        term = distillation(embeddings, teacher, samples, objective.distillation, objective.contrastive.temperature)
        extra["distillation"] = objective.distillation_weight, term
    if objective.spread_out_weight:
        extra["spread_out"] = objective.spread_out_weight, spread_out(embeddings, samples.sample_mask)
    for name, (weight, term) in extra.items():
        loss = loss + weight * term.value
        metrics |= {name: term, f"weighted/{name}": Mean(weight * term.sum, term.count)}
    return loss, metrics
