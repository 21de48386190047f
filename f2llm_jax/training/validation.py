"""Held-out rows: losses as published, and how often the positive comes first, by source, task kind, language and width."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool

from f2llm_jax.data.pipeline import Pipeline
from f2llm_jax.data.records import Dataset
from f2llm_jax.training.step import EvalStep


def validate(
    eval_step: EvalStep, params: Any, held_out: Mapping[str, Pipeline], dataset: Dataset, batches: int, dims: Sequence[int]
) -> dict[str, float]:
    """Losses in nats a sample and accuracies in [0, 1], at full width unless said otherwise.

    `validation/loss` and `validation/accuracy` are means over sources; `.../source/NAME`, `.../kind/KIND` and, of accuracy,
    `.../language/CODE` (over that language's rows of all sources) and `.../dim/D` (mean over sources) take them apart.
    What an accuracy counts is said in `objectives.ranked_first`.

    Args:
      eval_step: from `make_eval_step` with these `dims`, jitted.
      params: of the model.
      held_out: one pipeline of validation rows a source.
      dataset: that they come from.
      batches: at most so many batches a source, always the same ones.
      dims: widths, ascending; the last is the full one.
    """
    if not held_out:
        return {}
    losses, firsts, languages = {}, {}, {}
    for name, pipeline in held_out.items():
        steps = range(min(batches, pipeline.plan.steps_per_epoch))
        metrics, first = zip(*jax.device_get([eval_step(params, data.batch) for data in pipeline.steps(0, len(steps))]), strict=True)
        losses[name] = _loss(metrics)
        of_rows = [pipeline.languages(step) for step in steps]
        firsts[name] = np.concatenate([found[:, : len(rows)] for found, rows in zip(first, of_rows, strict=True)], axis=1)
        languages[name] = [language for rows in of_rows for language in rows]
    kinds = {name: dataset.sources[name].kind for name in held_out}
    return {
        **_by_source("validation", losses, kinds),
        "validation/loss": _mean(losses.values()),
        **accuracies(firsts, languages, kinds, dims),
    }


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


def _by_source(prefix: str, values: Mapping[str, float], kinds: Mapping[str, str]) -> dict[str, float]:
    of_kind = {kind: _mean(value for name, value in values.items() if kinds[name] == kind) for kind in sorted(set(kinds.values()))}
    return {
        **{f"{prefix}/source/{name}": value for name, value in values.items()},
        **{f"{prefix}/kind/{kind}": value for kind, value in of_kind.items()},
    }


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _loss(batches: Sequence[Mapping[str, Any]]) -> float:
    """Sum of the two softmaxes' means, each taken once over all batches."""
    total = 0.0
    for part in ("in_batch", "hard"):
        summed = sum(float(batch[part].sum) for batch in batches)
        counted = sum(float(batch[part].count) for batch in batches)
        total += summed / max(counted, 1.0)
    return total
