"""What a run recorded beside its checkpoints, as far as it is there: read for the model card."""

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

SMOOTHING = 0.95  # of the curve of the training loss


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The contents of a workdir's files up to a step; empty where a file is missing.

    Attributes:
      config: the resolved configuration (`config.json`).
      sources: one entry a source of the data (`dataset.json`).
      environment: versions, devices, commit (`environment.json`).
      metrics: lines of `metrics.jsonl`.
    """

    config: Mapping[str, Any]
    sources: Sequence[Mapping[str, Any]]
    environment: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]

    @property
    def languages(self) -> list[str]:
        """Language codes of all sources, without scripts and regions, sorted."""
        return sorted({language.split("_")[0].split("-")[0] for source in self.sources for language in source["languages"]})

    @property
    def validations(self) -> list[Mapping[str, Any]]:
        """The lines that hold held-out losses."""
        return [line for line in self.metrics if "validation/loss" in line]


def read_record(workdir: epath.Path, step: int) -> RunRecord:
    """The record of the run in `workdir` up to update `step`."""
    metrics = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")] if metrics.exists() else []
    return RunRecord(
        config=_read(workdir / "config.json"),
        sources=_read(workdir / "dataset.json").get("sources", []),
        environment=_read(workdir / "environment.json"),
        metrics=[line for line in lines if line["step"] <= step],
    )


def _read(path: epath.Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def loss_curve(record: RunRecord) -> bytes | None:
    """A PNG of training and held-out loss by update; None where too little was recorded to draw."""
    steps = [(line["step"], line["loss"]) for line in record.metrics if "loss" in line]
    if len(steps) < 2:
        return None
    figure, axes = _axes()
    axes.plot(*zip(*steps, strict=True), color="tab:blue", alpha=0.2, linewidth=0.8)
    axes.plot([step for step, _ in steps], _smooth([loss for _, loss in steps]), color="tab:blue", label="training, smoothed")
    if held_out := [(line["step"], line["validation/loss"]) for line in record.validations]:
        axes.plot(*zip(*held_out, strict=True), color="tab:orange", marker="o", label="held out, mean of sources")
    axes.set(xlabel="updates", ylabel="loss")
    return _png(figure, axes)


def _axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # only here: most releases of a folder have nothing to draw

    figure = Figure(figsize=(7, 3.2), dpi=150, layout="constrained")
    return figure, figure.subplots()


def _png(figure: Any, axes: Any) -> bytes:
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def accuracy_by_width(line: Mapping[str, Any]) -> dict[int, float]:
    """What a validation found at each width, ascending."""
    prefix = "validation/accuracy/dim/"
    return dict(sorted((int(name.removeprefix(prefix)), value) for name, value in line.items() if name.startswith(prefix)))


def matryoshka_curve(record: RunRecord) -> bytes | None:
    """A PNG of held-out accuracy by width, at the last validation and the first; None where there is one width, or nothing."""
    curves = {line["step"]: accuracy_by_width(line) for line in (*record.validations[:1], *record.validations[-1:])}
    if not curves or len(next(reversed(curves.values()))) < 2:
        return None
    figure, axes = _axes()
    for step, style in zip(reversed(curves), ({"color": "tab:blue"}, {"color": "tab:gray", "linestyle": "--"}), strict=False):
        widths, accuracies = zip(*curves[step].items(), strict=True)
        axes.plot(widths, [100 * accuracy for accuracy in accuracies], marker="o", label=f"update {step:,}", **style)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="dimensions", ylabel="held-out accuracy, %", xticks=widths, xticklabels=widths)
    return _png(figure, axes)


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential mean without the bias of its start."""
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        mean, weight = SMOOTHING * mean + (1 - SMOOTHING) * value, SMOOTHING * weight + 1 - SMOOTHING
        smoothed.append(mean / weight)
    return smoothed
