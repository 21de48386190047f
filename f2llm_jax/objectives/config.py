"""Which terms are summed and how. Every default is the published recipe."""

import dataclasses
import math
from typing import Literal

from f2llm_jax.errors import UserError
from f2llm_jax.objectives.matryoshka import check_dims, matryoshka_weights

PassageGrad = Literal["full", "none"]
NegativePool = Literal["positives", "positives_and_negatives"]
LossDtype = Literal["float32", "bfloat16"]
Positives = Literal["own", "masked", "joint"]
GuideMargin = Literal["", "absolute", "relative"]
ScoreLoss = Literal["kl", "margin_mse"]
GradedLoss = Literal["cosent", "angle"]
DistillationKind = Literal["mse", "cosine", "scores"]


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """The contrastive terms.

    Attributes:
      temperature: cosines are divided by it.
      dims: matryoshka widths, ascending; empty for the full width alone.
      weights: one a width; empty for the published `1 / (n * sqrt(D / d))`.
      in_batch_pool: whom a query is compared with across the batch: "positives" (published) or also all hard negatives.
      in_batch_passage_grad: "full" sends the in-batch loss's gradient to both sides; "none" to queries only, as the published
        multi-GPU trainer does, whose gather carries no gradient.
      positives: what the positives of other rows of the same query are in the in-batch softmax: negatives ("own", published), left out
        ("masked"), or positives too ("joint": the loss is minus the log of the share of all of them, MIL-NCE, arXiv 1912.06430).
      mask_false_negatives: leave out candidates whose text is the positive's.
      false_negative_margin: leave out candidates whose cosine exceeds the positive's by more than this; inf for never.
      guide: leave out candidates that the teacher finds nearer to the query than the positive, less a margin of the given kind (see
        false_negatives.py); "" for none.
      guide_margin: a cosine ("absolute") or a share of the positive's ("relative"); negative ones leave out less.
      hard_weight: weight of the softmax over own negatives in retrieval, where there is one over the batch too; for other kinds it is
        always 1. With 0 and the pool "positives_and_negatives" the loss is MultipleNegativesRankingLoss of sentence-transformers.
      query_negatives: other queries are negatives of a query too (GTE, arXiv 2308.03281, section 3.3; Qwen3-Embedding, arXiv 2506.05176).
      document_negatives: other documents of the pool are negatives of the positive too (the same).
      hardness: a query's own hard negatives weigh `exp(hardness * cosine)` in the sum, without gradient through the weight
        (EmbeddingGemma, arXiv 2509.20354, section 2.3, takes 5); 0 for all alike.
      focal: each sample's loss is multiplied by `(1 - p) ** focal`, p being the probability of its positive (focal loss, arXiv 1708.02002;
        KaLM-Embedding-V2, arXiv 2506.20923, takes 0.5); 0 for all alike.
      loss_dtype: normalised vectors, cosines and logits are rounded to it; "bfloat16" is what the published trainer computes in.
    """

    temperature: float = 0.05
    dims: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    in_batch_pool: NegativePool = "positives"
    in_batch_passage_grad: PassageGrad = "full"
    positives: Positives = "own"
    mask_false_negatives: bool = False
    false_negative_margin: float = float("inf")
    guide: GuideMargin = ""
    guide_margin: float = 0.0
    hard_weight: float = 1.0
    query_negatives: bool = False
    document_negatives: bool = False
    hardness: float = 0.0
    focal: float = 0.0
    loss_dtype: LossDtype = "float32"

    def __post_init__(self):
        if not self.temperature > 0:
            raise UserError(f"temperature={self.temperature} must be positive; the published value is 0.05")
        _one_of("in_batch_passage_grad", self.in_batch_passage_grad, ("full", "none"))
        _one_of("loss_dtype", self.loss_dtype, ("float32", "bfloat16"))
        _one_of("in_batch_pool", self.in_batch_pool, ("positives", "positives_and_negatives"))
        _one_of("positives", self.positives, ("own", "masked", "joint"))
        _one_of("guide", self.guide, ("", "absolute", "relative"))
        for name in ("hard_weight", "hardness", "focal"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{name}={getattr(self, name)} must be a number from 0")
        if not self.hard_weight and self.in_batch_pool == "positives":
            raise UserError(
                "hard_weight=0 leaves the hard negatives of retrieval out of every loss; set in_batch_pool='positives_and_negatives', "
                "which takes them into the softmax over the batch, or a weight above 0"
            )
        if not math.isfinite(self.guide_margin):
            raise UserError(f"guide_margin={self.guide_margin} must be finite; guide='' leaves nothing out")
        if self.guide_margin and not self.guide:
            raise UserError(f"guide_margin={self.guide_margin} has no effect without a guide; set guide to 'absolute' or 'relative'")
        if self.weights and len(self.weights) != len(self.dims):
            raise UserError(f"{len(self.weights)} matryoshka weights for {len(self.dims)} dims; give one a dim, or none for the published")

    def widths(self, width: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The dims and weights for embeddings of the given width."""
        dims = self.dims or (width,)
        check_dims(dims, width)
        return dims, self.weights or matryoshka_weights(dims)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """The whole objective.

    Attributes:
      contrastive: the two softmaxes.
      distillation: how a teacher is followed: "mse" of raw embeddings (published), "cosine", or "scores" (see distillation.py).
      distillation_weight: of that term; 0 without a teacher.
      distillation_matryoshka: follow at every trained width, with the widths' weights, and not at the full one alone.
      projection: compare in the teacher's space, through a linear map that is trained along.
      teacher_widths: W of each of several teachers, whose vectors come one after another; empty for one of any width.
      teacher_weights: one a teacher, of its part of the distillation term; empty for equal parts that add up to 1.
      scores: how scores of rows are learned from: "kl" or "margin_mse" (see scores.py).
      scores_weight: of that term; 0 for none.
      scores_temperature: scores are divided by it.
      graded: how pairs with a score of their likeness are learned from: "cosent" or "angle" (see graded.py).
      graded_weight: of that term, which such pairs alone have.
      spread_out_weight: of the spread-out regulariser (EmbeddingGemma, arXiv 2509.20354); 0 for none.
    """

    contrastive: ContrastiveConfig = ContrastiveConfig()
    distillation: DistillationKind = "mse"
    distillation_weight: float = 0.0
    distillation_matryoshka: bool = False
    projection: bool = False
    teacher_widths: tuple[int, ...] = ()
    teacher_weights: tuple[float, ...] = ()
    scores: ScoreLoss = "kl"
    scores_weight: float = 0.0
    scores_temperature: float = 1.0
    graded: GradedLoss = "cosent"
    graded_weight: float = 1.0
    spread_out_weight: float = 0.0

    def __post_init__(self):
        _one_of("distillation", self.distillation, ("mse", "cosine", "scores"))
        if self.projection and self.distillation == "scores":
            raise UserError(
                "distillation='scores' compares similarities, which needs no projection; set projection=False, or 'mse' or 'cosine'"
            )
        if self.distillation_matryoshka and self.distillation == "mse" and not self.projection:
            raise UserError(
                "distillation='mse' compares each component by itself, so shorter widths add nothing: set distillation_matryoshka=False, "
                "projection=True, or distillation='cosine' or 'scores'"
            )
        if self.distillation_matryoshka and not self.contrastive.dims:
            raise UserError(
                "distillation_matryoshka follows at the trained widths, and none is trained; set matryoshka=True, or leave it out"
            )
        if self.teacher_weights and len(self.teacher_weights) != max(1, len(self.teacher_widths)):
            raise UserError(
                f"{len(self.teacher_weights)} teacher_weights for {max(1, len(self.teacher_widths))} teachers; give one a teacher"
            )
        if not all(0 <= weight < math.inf for weight in self.teacher_weights):
            raise UserError(f"teacher_weights={self.teacher_weights} must be numbers from 0")
        _one_of("scores", self.scores, ("kl", "margin_mse"))
        _one_of("graded", self.graded, ("cosent", "angle"))
        if self.graded == "angle" and (odd := [dim for dim in self.contrastive.dims if dim % 2]):
            raise UserError(f"graded='angle' takes halves of vectors, and the matryoshka width {odd[0]} is odd; use even ones or 'cosent'")
        if not self.scores_temperature > 0:
            raise UserError(f"scores_temperature={self.scores_temperature} must be positive")
        for name in ("distillation_weight", "scores_weight", "graded_weight", "spread_out_weight"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name}={getattr(self, name)} must not be negative")

    def followed(self, width: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The widths at which a student of that width follows a teacher, and their weights."""
        return self.contrastive.widths(width) if self.distillation_matryoshka else ((width,), (1.0,))
