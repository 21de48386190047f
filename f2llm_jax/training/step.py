"""The training step and the evaluation step: pure functions of arrays, each on one screen."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from f2llm_jax import objectives, sharding
from f2llm_jax.batch import Batch
from f2llm_jax.model import encoder, low_rank
from f2llm_jax.model.chunk_encoder import ChunkEncoder
from f2llm_jax.objectives import Embeddings, LossFunction, Mean, Objective, Samples
from f2llm_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds. The order of data needs `step` and nothing else."""

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    projections: tuple[Float[Array, "D W"], ...] = ()  # into the space of each teacher; no part of the model


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen encoder of the same token rows; its parameters are an argument of the step, not part of this."""

    encoder: ChunkEncoder


@dataclasses.dataclass(frozen=True)
class TableRanks:
    """A new rank of the embedding table for each step (see low_rank.py), a function of seed and step.

    Attributes:
      largest: Z, that of the factors.
      seed: of the run.
    """

    largest: int
    seed: int

    def draw(self, step: Int[Array, ""]) -> Int[Array, ""]:
        """The rank of the update `step` (0-based)."""
        return low_rank.sample_rank(jax.random.fold_in(jax.random.key(self.seed), step), self.largest)


Step = Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, Mean]]]


def by_role(embeddings: Float[Array, "S D"], negative_mask: Float[Array, "B N"]) -> Embeddings:
    """Splits a batch's texts into queries, positives and negatives (the order `Batch` documents)."""
    samples, negatives = negative_mask.shape
    return Embeddings(
        query=embeddings[:samples],
        passage=embeddings[samples : 2 * samples],
        negatives=embeddings[2 * samples :].reshape(samples, negatives, -1),
    )


def by_depth(embeddings: Float[Array, "S D"] | Float[Array, "S J D"], negative_mask: Float[Array, "B N"]) -> list[Embeddings]:
    """Those of each depth by role, the deepest last."""
    depths = [embeddings] if embeddings.ndim == 2 else [embeddings[:, j] for j in range(embeddings.shape[1])]
    return [by_role(depth, negative_mask) for depth in depths]


def teacher_embeddings(teacher: Teacher | None, teacher_params: Any, batch: Batch) -> list[Embeddings] | None:
    """What to distil from: the cached vectors that came with the batch, else the online teacher's of each depth, else nothing."""
    if batch.teacher is not None:
        return [Embeddings(batch.teacher[:, 0], batch.teacher[:, 1], batch.teacher[:, 2:])]
    if teacher is None:
        return None
    with jax.named_scope("teacher"):
        return by_depth(encoder.encode(teacher.encoder, teacher_params, batch.texts, batch.text_count), batch.samples.negative_mask)


def make_train_step(
    student: ChunkEncoder,
    objective: Objective | LossFunction,
    optimizer_config: OptimizerConfig,
    teacher: Teacher | None = None,
    table_ranks: TableRanks | None = None,
) -> Step:
    """`(state, teacher_params, batch) -> (state, metrics)`; `teacher_params` is None without a teacher.

    If `student` has several depths, the loss is the mean over them (layer matryoshka), each following the teacher's of its place,
    counted from the deepest; the guide is the (first) teacher's deepest for all. With `table_ranks` only that many columns of the factored
    embedding table take part in a step.
    Metrics are `Mean`s: `loss`, its parts, `grad_norm` before clipping, the `learning_rate` of this update, and `skipped`, which is
    1 where loss or gradient was not finite: then weights and moments stay as they were and only counters advance.
    """
    optimizer = make_optimizer(optimizer_config)
    own = None if isinstance(objective, Objective) else objective
    follows = own or cast(Objective, objective).distillation_weight

    def loss_function(
        embeddings: Embeddings, samples: Samples, teacher: Embeddings | None, guide: Embeddings | None, projections: Sequence[Array]
    ) -> tuple[Float[Array, ""], dict[str, Mean]]:
        if own:
            return own(embeddings, samples, teacher)
        return objectives.total(embeddings, samples, cast(Objective, objective), teacher, guide, projections)

    def train_step(state: TrainState, teacher_params: Any, batch: Batch) -> tuple[TrainState, dict[str, Mean]]:
        targets = teacher_embeddings(teacher, teacher_params, batch)

        def loss(
            embeddings: Float[Array, "S D"] | Float[Array, "S J D"], projections: Sequence[Array]
        ) -> tuple[Float[Array, ""], dict[str, Mean]]:
            depths = by_depth(embeddings, batch.samples.negative_mask)
            followed = [None] * len(depths) if not (targets and follows) else targets[-len(depths) :]
            if len(followed) < len(depths):  # cached vectors: each depth follows the whole teacher
                followed = followed * len(depths)
            guide = objectives.split(targets[-1], () if own else cast(Objective, objective).teacher_widths)[0] if targets else None
            losses = [
                loss_function(depth, batch.samples, target, guide, projections) for depth, target in zip(depths, followed, strict=True)
            ]
            # The mean over depths, as ML-Embed's `utils.py`; metrics are those of the whole depth.
            return cast(Array, sum(value for value, _ in losses)) / len(losses), losses[-1][1]

        narrowed, scalars = (lambda params: params), {}
        if table_ranks:
            scalars["table_rank"] = table_ranks.draw(state.step)
            narrowed = functools.partial(low_rank.narrowed, rank=scalars["table_rank"])
        params = narrowed(state.params)
        (total, parts), (gradients, of_projections) = encoder.value_and_grads(
            loss, student, params, state.projections, batch.texts, batch.text_count
        )
        before, gradients = trained(state.params, state.projections), trained(narrowed(gradients), of_projections)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, before)
            after = _unless(finite, optax.apply_updates(before, updates), before)
            params, projections = after if state.projections else (after, ())
            opt_state = _unless(finite, opt_state, state.opt_state)
        scalars |= {"loss": total, "grad_norm": norm, "skipped": ~finite, "learning_rate": learning_rate(optimizer_config, state.step)}
        metrics = parts | {name: Mean(jnp.float32(value), jnp.float32(1)) for name, value in scalars.items()}
        return TrainState(state.step + 1, params, opt_state, projections), metrics

    return train_step


def trained(params: Any, projections: tuple[Any, ...]) -> Any:
    """What the optimizer updates, and in whose structure its moments are: the parameters alone where there is no projection."""
    return (params, projections) if projections else params


def _unless(finite: Bool[Array, ""], new: Any, old: Any) -> Any:
    """The new arrays if the step was finite, else the old ones; scalars, which count steps, are new in any case."""
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o) if n.ndim else n, new, old)


EvalStep = Callable[[Any, Batch], tuple[dict[str, Mean], Bool[Array, "J B"], Float[Array, "J B"] | None]]


OWN = "own/"  # begins the metrics of an objective of the user's


def make_eval_step(student: ChunkEncoder, objective: Objective, dims: Sequence[int], own: LossFunction | None = None) -> EvalStep:
    """`(params, batch) -> (metrics, first, cosines)`, from one pass over the batch.

    `metrics` are at full width, as the published validation loss (no matryoshka); `first` says for each of `dims` and each
    sample whether its positive came first, `cosines` how near the two are (None in data without graded pairs), on every device.
    With a loss function of the user's `own`, its loss and its metrics are among the metrics, as `own/objective` and `own/NAME`.
    """
    plain = Objective(
        contrastive=dataclasses.replace(objective.contrastive, dims=(), weights=()),
        graded=objective.graded,
        scores=objective.scores,
        scores_weight=0.0 if own else objective.scores_weight,
        scores_temperature=objective.scores_temperature,
    )

    def eval_step(params: Any, batch: Batch) -> tuple[dict[str, Mean], Bool[Array, "J B"], Float[Array, "J B"] | None]:
        embeddings = by_role(encoder.encode(student, params, batch.texts, batch.text_count), batch.samples.negative_mask)
        _, metrics = objectives.total(embeddings, batch.samples, plain)
        if own:
            loss, found = own(embeddings, batch.samples, None)
            count = batch.samples.sample_mask.sum()
            metrics |= {OWN + name: mean for name, mean in {"objective": Mean(loss * count, count), **found}.items()}
        first = sharding.shard(objectives.ranked_first(embeddings, batch.samples, dims), sharding.P(None, None))
        if batch.samples.graded_weight is None:
            return metrics, first, None
        return metrics, first, sharding.shard(objectives.pair_cosines(embeddings, dims), sharding.P(None, None))

    return eval_step
