"""Learning from scores of a row's documents, as a reranker or a person gives them.

Dimensions: B samples, N negatives a sample, J matryoshka widths, D model.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from f2llm_jax import sharding
from f2llm_jax.objectives.candidates import Embeddings
from f2llm_jax.objectives.config import ContrastiveConfig, ScoreLoss
from f2llm_jax.objectives.matryoshka import prefix_cosines
from f2llm_jax.objectives.mean import Mean, mean_of


def score_loss(
    embeddings: Embeddings,
    scores: Float[Array, "B 1+N"],
    there: Bool[Array, "B 1+N"],
    kind: ScoreLoss,
    temperature: float,
    config: ContrastiveConfig,
) -> Mean:
    """The loss of cosines over `config.temperature` against scores over `temperature`, weighted over widths as the contrastive terms are.

    * "kl": mean over rows of KL(scores || cosines) between softmaxes over the row's own documents (listwise distillation of
      cross-encoders, as in bge-m3, arXiv 2402.03216, and sentence-transformers' DistillKLDivLoss).
    * "margin_mse": mean over negatives of the squared difference of margins, positive less negative (Margin-MSE, arXiv 2010.02666).

    Args:
      embeddings: raw.
      scores: of positive and negatives, NaN for none.
      there: which of these documents exist.
      kind: of the loss.
      temperature: that scores are divided by.
      config: of the cosines.

    Returns:
      Its count is that of rows with two scores ("kl") or of negatives with one whose positive has one ("margin_mse").
    """
    dims, weights = config.widths(embeddings.query.shape[-1])
    query = sharding.shard(embeddings.query.astype(jnp.float32), sharding.SAMPLES_D)
    documents = jnp.concatenate([embeddings.passage[:, None], embeddings.negatives], axis=1).astype(jnp.float32)
    documents = sharding.shard(documents, sharding.ROWS_TD)
    cosines = prefix_cosines("bd,bnd->bn", query, documents, lambda q, d: q[:, None] * d, dims)
    scores, there = (sharding.shard(x, sharding.SAMPLES_D) for x in (scores, there))
    scored = there & jnp.isfinite(scores)
    logits = cosines / config.temperature
    targets = jnp.where(scored, scores, 0.0) / temperature
    by_width = jnp.asarray(weights)
    if kind == "margin_mse":
        margins = (logits[..., :1] - logits[..., 1:]) - (targets[:, :1] - targets[:, 1:])
        return mean_of(jnp.einsum("j,jbn->bn", by_width, jnp.square(margins)), (scored[:, :1] & scored[:, 1:]).astype(jnp.float32))
    counted = scored.sum(axis=1) > 1
    usable = scored | ~counted[:, None]  # all of a row that does not count, so that no softmax is over nothing
    teacher = jax.nn.log_softmax(jnp.where(usable, targets, -jnp.inf), axis=-1)
    student = jax.nn.log_softmax(jnp.where(usable, logits, -jnp.inf), axis=-1)
    gap = jnp.where(usable, teacher - student, 0.0)
    return mean_of(jnp.einsum("j,bn,jbn->b", by_width, jnp.exp(teacher), gap), counted.astype(jnp.float32))
