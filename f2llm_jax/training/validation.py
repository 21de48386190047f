"""Validation losses on held-out rows: by source, by task kind and on average, at full width as published."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from f2llm_jax.batch import Batch
from f2llm_jax.data.pipeline import Pipeline
from f2llm_jax.data.records import Dataset
from f2llm_jax.objectives import Mean


def validate(
    eval_step: Callable[[Any, Batch], dict[str, Mean]],
    params: Any,
    held_out: Mapping[str, Pipeline],
    dataset: Dataset,
    batches: int,
) -> dict[str, float]:
    """Losses in nats a sample: `validation/source/NAME`, `validation/kind/KIND`, `validation/loss` (means over sources).

    Args:
      eval_step: from `make_eval_step`, jitted.
      params: of the model.
      held_out: one pipeline of validation rows a source.
      dataset: that they come from.
      batches: at most so many batches a source, always the same ones.
    """
    sums = {
        name: [eval_step(params, data.batch) for data in pipeline.steps(0, min(batches, pipeline.plan.steps_per_epoch))]
        for name, pipeline in held_out.items()
    }
    losses = {name: _total(parts) for name, parts in jax.device_get(sums).items()}
    kinds = {kind: [loss for name, loss in losses.items() if dataset.sources[name].kind == kind] for kind in _kinds(held_out, dataset)}
    return {
        **{f"validation/source/{name}": loss for name, loss in losses.items()},
        **{f"validation/kind/{kind}": float(np.mean(of_kind)) for kind, of_kind in kinds.items()},
        **({"validation/loss": float(np.mean(list(losses.values())))} if losses else {}),
    }


def _kinds(held_out: Mapping[str, Pipeline], dataset: Dataset) -> list[str]:
    return sorted({dataset.sources[name].kind for name in held_out})


def _total(batches: list[dict[str, Mean]]) -> float:
    """Sum of the two softmaxes' means, each taken once over all batches."""
    total = 0.0
    for part in ("in_batch", "hard"):
        summed = sum(float(batch[part].sum) for batch in batches)
        counted = sum(float(batch[part].count) for batch in batches)
        total += summed / max(counted, 1.0)
    return total
