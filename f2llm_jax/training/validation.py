"""Held-out rows: losses as published, and how often the positive comes first, by source, task kind, language and width.

Of graded pairs, whose passages are not right or wrong: how well the order of cosines is that of scores.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jaxtyping import Bool, Float

from f2llm_jax.data.pipeline import BatchConfig, Pipeline, read_steps
from f2llm_jax.data.records import Dataset
from f2llm_jax.objectives import Mean
from f2llm_jax.training.held_out import draw
from f2llm_jax.training.step import OWN, EvalStep

# The kinds of task that have each.
LOSSES = {"in_batch": ("retrieval",), "hard": ("retrieval", "clustering", "classification"), "graded": ("graded",)}


@dataclasses.dataclass(frozen=True)
class _Scored:
    """What the evaluation step found on the batches of one source."""

    metrics: list[Mapping[str, Mean]]
    first: Bool[np.ndarray, "J rows"]
    languages: list[str]
    spearman: list[float]  # by width, of graded pairs; empty of others


class HeldOut:
    """The held-out rows of a dataset, and when which of them are scored."""

    def __init__(
        self, dataset: Dataset, batch: BatchConfig, config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh, ends: Sequence[int] = ()
    ):
        """`config` is that of the run, `ends` the updates that end an epoch, after which rows are scored too."""
        self._dataset, self._config, self._seed, self._ends = dataset, config.eval, config.seed, ends
        self._pipelines = {
            name: Pipeline(dataset, "validation", batch, config.seed, mesh, [name])
            for name, source in dataset.sources.items()
            if source.rows["validation"]
        }
        self.scored = bool(self._pipelines) and config.eval.every > 0 and config.eval.batches > 0

    def due(self, step: int, total: int) -> bool:
        """Whether rows are scored after update `step` of `total`."""
        return self.scored and (step == total or step in self._ends or step % self._config.every == 0)

    def score(self, eval_step: EvalStep, params: Any, step: int, dims: Sequence[int]) -> dict[str, float]:
        """The figures of `validate` after update `step`."""
        sizes = {name: pipeline.plan.steps_per_epoch for name, pipeline in self._pipelines.items()}
        drawn = draw(sizes, self._config.batches, self._seed, step // self._config.every)
        return validate(eval_step, params, self._pipelines, self._dataset, drawn, dims)


def validate(
    eval_step: EvalStep,
    params: Any,
    held_out: Mapping[str, Pipeline],
    dataset: Dataset,
    drawn: tuple[Mapping[str, int], Mapping[str, int]],
    dims: Sequence[int],
) -> dict[str, float]:
    """Losses in nats a sample and accuracies in [0, 1], at full width unless said otherwise.

    `validation/loss` and `validation/accuracy` are means over sources; `.../source/NAME`, `.../kind/KIND` and, of accuracy,
    `.../language/CODE` (over that language's rows of all sources) and `.../dim/D` (mean over sources) take them apart. A loss is the sum
    of `validation/in_batch`, which exists for retrieval only, and `validation/hard`, which are taken apart alike (F2LLM `utils.py`); that
    of graded pairs, which have no accuracy, is `validation/graded`, and `validation/spearman` is the rank correlation of their scores
    and cosines. `validation/scores` is the loss on scores of documents, where it is trained, and no part of `validation/loss`.
    What an accuracy counts is said in `objectives.ranked_first`. Metrics of an objective of the user's are
    `validation/NAME`, means over all rows.

    Args:
      eval_step: from `make_eval_step` with these `dims`, jitted.
      params: of the model.
      held_out: one pipeline of validation rows a source.
      dataset: that they come from.
      drawn: from `held_out.draw`; sources of the second part have figures of their own and take no part in any other.
      dims: widths, ascending; the last is the full one.
    """
    every, in_turn = drawn
    if not every:
        return {}
    kinds = {name: dataset.sources[name].kind for name in (*every, *in_turn)}
    graded = {name: kind == "graded" for name, kind in kinds.items()}
    scored = _score(eval_step, params, held_out, {**every, **in_turn}, graded)
    found = _figures({name: scored[name] for name in every}, kinds, dims)
    if in_turn:
        own = _figures({name: scored[name] for name in in_turn}, kinds, dims)
        found |= {name: value for name, value in own.items() if "/source/" in name}
    return found


def _score(
    eval_step: EvalStep, params: Any, held_out: Mapping[str, Pipeline], counts: Mapping[str, int], graded: Mapping[str, bool]
) -> dict[str, _Scored]:
    """The batches of all sources, read one after the other while the devices compute."""
    chosen = [(name, step) for name, count in counts.items() for step in range(count)]
    arrivals = read_steps([(held_out[name], step) for name, step in chosen])
    outputs = jax.device_get([eval_step(params, data.batch) for data in arrivals])
    scored = {}
    for source in counts:
        mine = [(step, *output) for (name, step), output in zip(chosen, outputs, strict=True) if name == source]
        languages = [held_out[source].languages(step) for step, *_ in mine]
        sizes, spearman = [len(of_rows) for of_rows in languages], []
        if graded[source]:
            grades = np.concatenate([held_out[source].grades(step) for step, *_ in mine])
            spearman = [rank_correlation(of_dim, grades) for of_dim in _joined([cosines for *_, cosines in mine], sizes)]
        first = _joined([first for _, _, first, _ in mine], sizes)
        flat = [language for of_rows in languages for language in of_rows]
        scored[source] = _Scored([metrics for _, metrics, _, _ in mine], first, flat, spearman)
    return scored


def _joined(batches: Sequence[np.ndarray], sizes: Sequence[int]) -> np.ndarray:
    """`[J, rows]` of batches `[J, B]`, of each as many as it has rows."""
    return np.concatenate([batch[:, :size] for batch, size in zip(batches, sizes, strict=True)], axis=1)


def _figures(scored: Mapping[str, _Scored], kinds: Mapping[str, str], dims: Sequence[int]) -> dict[str, float]:
    losses: dict[str, dict[str, float]] = {loss: {} for loss in LOSSES}
    for name, found in scored.items():
        for loss, of_kinds in LOSSES.items():
            if kinds[name] in of_kinds:
                losses[loss][name] = _mean_over_batches([batch[loss] for batch in found.metrics])
    total = {name: sum(by_source.get(name, 0.0) for by_source in losses.values()) for name in scored}
    parts: dict[str, float] = {}
    for loss, by_source in losses.items():
        if by_source:
            parts |= _by_source(f"validation/{loss}", by_source, kinds) | {f"validation/{loss}": _mean(by_source.values())}
    firsts = {name: found.first for name, found in scored.items() if kinds[name] != "graded"}
    languages = {name: found.languages for name, found in scored.items()}
    return {
        **_by_source("validation", total, kinds),
        **parts,
        "validation/loss": _mean(total.values()),
        **accuracies(firsts, languages, kinds, dims),
        **correlations({name: found.spearman for name, found in scored.items() if found.spearman}, kinds, dims),
        **_scores(scored, kinds),
        **_own([batch for found in scored.values() for batch in found.metrics]),
    }


def _scores(scored: Mapping[str, _Scored], kinds: Mapping[str, str]) -> dict[str, float]:
    """The loss on scores of documents, of the sources that have rows with two."""
    losses = {
        name: _mean_over_batches([batch["scores"] for batch in found.metrics])
        for name, found in scored.items()
        if sum(float(batch["scores"].count) for batch in found.metrics if "scores" in batch)
    }
    return _by_source("validation/scores", losses, kinds) | {"validation/scores": _mean(losses.values())} if losses else {}


def _own(batches: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Metrics of an objective of the user's over all held-out rows, as `validation/NAME`."""
    names = [name for name in batches[0] if name.startswith(OWN)]
    sums = {name: np.sum([[batch[name].sum, batch[name].count] for batch in batches], axis=0) for name in names}
    return {f"validation/{name.removeprefix(OWN)}": float(total / max(count, 1.0)) for name, (total, count) in sums.items()}


def accuracies(
    firsts: Mapping[str, Bool[np.ndarray, "J rows"]], languages: Mapping[str, Sequence[str]], kinds: Mapping[str, str], dims: Sequence[int]
) -> dict[str, float]:
    """The accuracies of `validate`, from which rows of each source had their positive first.

    Args:
      firsts: by source, for each of `dims` and each row.
      languages: by source, of each row; "" where unknown.
      kinds: by source.
      dims: widths, ascending; the last is the full one.
    """
    if not firsts:
        return {}
    by_source = {name: float(first[-1].mean()) for name, first in firsts.items()}
    by_language = defaultdict(list)
    for name, first in firsts.items():
        for language, right in zip(languages[name], first[-1], strict=True):
            by_language[language].append(right)
    by_dim = np.mean([first.mean(axis=1) for first in firsts.values()], axis=0)
    return {
        **_by_source("validation/accuracy", by_source, kinds),
        **{f"validation/accuracy/language/{code}": _mean(by_language[code]) for code in sorted(by_language) if code},
        **{f"validation/accuracy/dim/{dim}": float(accuracy) for dim, accuracy in zip(dims, by_dim, strict=True)},
        "validation/accuracy": _mean(by_source.values()),
    }


def correlations(spearman: Mapping[str, Sequence[float]], kinds: Mapping[str, str], dims: Sequence[int]) -> dict[str, float]:
    """The rank correlations of `validate`, from those of each source at each of `dims`."""
    if not spearman:
        return {}
    by_source = {name: of_dims[-1] for name, of_dims in spearman.items()}
    by_dim = np.mean(list(spearman.values()), axis=0)
    return {
        **_by_source("validation/spearman", by_source, kinds),
        **{f"validation/spearman/dim/{dim}": float(value) for dim, value in zip(dims, by_dim, strict=True)},
        "validation/spearman": _mean(by_source.values()),
    }


def rank_correlation(cosines: Float[np.ndarray, " rows"], grades: Float[np.ndarray, " rows"]) -> float:
    """Spearman's, of the rows that have a grade; NaN where there is none, as of one row or of grades that are all alike."""
    there = np.isfinite(grades)
    ranks = [_ranks(values[there]) for values in (cosines, grades)]
    if not all(len(np.unique(of_values)) > 1 for of_values in ranks):
        return float("nan")
    return float(np.corrcoef(np.stack(ranks))[0, 1])


def _ranks(values: Float[np.ndarray, " rows"]) -> Float[np.ndarray, " rows"]:
    """Places in ascending order; equal values share the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def _by_source(prefix: str, values: Mapping[str, float], kinds: Mapping[str, str]) -> dict[str, float]:
    found = {f"{prefix}/source/{name}": value for name, value in values.items()}
    for kind in sorted({kinds[name] for name in values}):
        found[f"{prefix}/kind/{kind}"] = _mean(value for name, value in values.items() if kinds[name] == kind)
    return found


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _mean_over_batches(batches: Sequence[Mean]) -> float:
    """Taken once over all batches."""
    return sum(float(batch.sum) for batch in batches) / max(sum(float(batch.count) for batch in batches), 1.0)
