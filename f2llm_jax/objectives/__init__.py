"""What is learned, as pure functions of raw embeddings; no model, no data, no configuration file is known here."""

from f2llm_jax.batch import Samples
from f2llm_jax.objectives.accuracy import pair_cosines, ranked_first
from f2llm_jax.objectives.candidates import Embeddings, split
from f2llm_jax.objectives.config import ContrastiveConfig, Objective
from f2llm_jax.objectives.matryoshka import matryoshka_dims, matryoshka_weights
from f2llm_jax.objectives.mean import Mean, mean_of
from f2llm_jax.objectives.total import LossFunction, total

__all__ = [
    "ContrastiveConfig",
    "Embeddings",
    "LossFunction",
    "Mean",
    "Objective",
    "Samples",
    "matryoshka_dims",
    "matryoshka_weights",
    "mean_of",
    "pair_cosines",
    "ranked_first",
    "split",
    "total",
]
