"""Pictures of runs, laid over each other: curves by update, quality by width, source and language, similarities, a map of texts.

Each chart is a matplotlib figure, or None where nothing was recorded to draw. `svg` gives one that takes the colour of the text
around it, so one picture serves a light and a dark page.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from f2llm_jax.reporting.run_record import Line, RunRecord

COLORS = ("#2f7ed8", "#e0702e", "#1a9e77", "#9a5fd0", "#d1405a", "#7d8590")  # told apart on white and on black
INK = "#010203"  # is replaced by the colour of the text around a picture
WIDTH, HEIGHT = 4.8, 2.9  # inches of a chart; shown at about 72 pixels an inch
SMOOTHING = 0.95  # of curves with one value an update
LABELLED = 60  # languages that have a line of their own
SETTINGS = {
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.18,
    "svg.fonttype": "none",
    "svg.hashsalt": "f2llm_jax",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK),
}

Points = list[tuple[int, float]]


def colors(runs: Sequence[RunRecord]) -> list[str]:
    """Of each run, the same in every chart."""
    return [COLORS[i % len(COLORS)] for i in range(len(runs))]


def png(figure: Figure) -> bytes:
    """The picture on white."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150, metadata={"Software": None})
    return picture.getvalue()


def svg(figure: Figure, name: str) -> str:
    """The picture as an SVG element without a background; `name` keeps its ids apart from those of the page's other pictures."""
    picture = io.StringIO()
    with rc_context(SETTINGS):
        figure.savefig(picture, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    element = picture.getvalue()[picture.getvalue().index("<svg") :]
    element = re.sub(r'(id="|href="#|url\(#)', rf"\1{name}-", element)
    return element.replace(INK, "currentColor")


def by_update(runs: Sequence[RunRecord], name: str, label: str, *, log: bool = False) -> Figure | None:
    """A metric of the training steps, smoothed, and under the smooth line its values."""
    return _curves(runs, lambda run: _points(run.metrics, name), label, log=log)


def loss(runs: Sequence[RunRecord]) -> Figure | None:
    """The training loss, and the mean held-out loss as dots."""
    figure = by_update(runs, "loss", "loss")
    if figure:
        for run, color in zip(runs, colors(runs), strict=True):
            figure.axes[0].plot(*_columns(_points(run.validations, "validation/loss")), "o--", color=color, markersize=4, linewidth=1)
        figure.axes[0].set_title("line: training, smoothed · dots: held out, mean of sources", fontsize=8, loc="left")
    return figure


def learning_rate(runs: Sequence[RunRecord]) -> Figure | None:
    """The learning rate of each update."""
    return _curves(runs, lambda run: _points(run.metrics, "learning_rate"), "learning rate", smooth=False)


def throughput(runs: Sequence[RunRecord]) -> Figure | None:
    """Real tokens a second."""
    return _curves(runs, lambda run: _points(run.timings, "tokens_per_second"), "real tokens a second", smooth=False)


def token_efficiency(runs: Sequence[RunRecord]) -> Figure | None:
    """Real tokens over the padded tokens that the devices compute on, in per cent."""
    return _curves(runs, lambda run: _points(run.timings, "token_efficiency", 100), "computed tokens that are real, %", smooth=False)


def input_wait(runs: Sequence[RunRecord]) -> Figure | None:
    """The share of its time that a step waited for its batch, in per cent."""

    def points(run: RunRecord) -> Points:
        timed = [line for line in run.timings if "steps_per_second" in line]
        return [(line["step"], 100 * line["input_wait_seconds"] * line["steps_per_second"]) for line in timed]

    return _curves(runs, points, "time waiting for input, %")


def horizontal_shares(shares: Mapping[str, Mapping[str, float]]) -> Figure | None:
    """A bar for each run, cut into its shares, in per cent."""
    if not shares:
        return None
    figure, axes = _figure()
    parts = list(dict.fromkeys(part for one in shares.values() for part in one))
    left = dict.fromkeys(shares, 0.0)
    for part in parts:
        axes.barh(list(shares), [100 * one.get(part, 0) for one in shares.values()], left=list(left.values()), label=part, height=0.5)
        left = {name: left[name] + 100 * one.get(part, 0) for name, one in shares.items()}
    axes.set_xlabel("share of the time, %")
    axes.legend(fontsize=8)
    return figure


def by_width(runs: Sequence[RunRecord]) -> Figure | None:
    """Held-out accuracy at each width: the last validation of each run, dashed its first."""
    drawn = [(run, run.accuracy_by("dim", run.validations[-1])) for run in runs if run.validations]
    drawn = [(run, found) for run, found in drawn if len(found) > 1]
    if not drawn:
        return None
    figure, axes = _figure()
    for run, found in drawn:
        color = colors(runs)[list(runs).index(run)]
        axes.plot(*_percent(found), "o-", color=color, markersize=4, label=run.name)
        if len(run.validations) > 1:
            axes.plot(*_percent(run.accuracy_by("dim", run.validations[0])), "--", color=color, linewidth=1, alpha=0.6)
    axes.set_xscale("log", base=2)
    widths = sorted({int(width) for _, found in drawn for width in found})
    axes.set(xlabel="dimensions", ylabel="held-out accuracy, %", xticks=widths, xticklabels=widths)
    axes.set_title("line: after training · dashed: before", fontsize=8, loc="left")
    return _finished(figure, axes, runs)


def by_source(runs: Sequence[RunRecord]) -> Figure | None:
    """Held-out accuracy of each source after training, sorted; hollow before."""
    return _dots(runs, "source", "held-out accuracy by source, %")


def by_language(runs: Sequence[RunRecord]) -> Figure | None:
    """Held-out accuracy of each language, the lowest first; of many languages those with the fewest training rows stand out."""
    found = runs[0].accuracy_by("language", runs[0].validations[-1]) if runs[0].validations else {}
    if len(found) < 2:
        return None
    if len(found) <= LABELLED:
        return _dots(runs, "language", "held-out accuracy by language, %")
    rows = training_rows(runs[0])
    ordered = sorted(found, key=lambda code: (found[code], code))
    scarce = set(sorted(found, key=lambda code: rows.get(code, 0))[: len(found) // 3])
    figure, axes = _figure(width=2 * WIDTH)
    others = set(found) - scarce
    for codes, color, label in ((others, COLORS[0], "other languages"), (scarce, COLORS[1], "third with the fewest training rows")):
        places = [i for i, code in enumerate(ordered) if code in codes]
        axes.bar(places, [100 * found[ordered[i]] for i in places], width=0.9, color=color, label=label)
    axes.set(xlabel=f"{len(found)} languages, sorted", ylabel="held-out accuracy, %", xticks=[])
    axes.set_xlim(-1, len(found))
    axes.grid(visible=False, axis="x")
    _legend(axes, loc="upper left")
    return figure


def training_rows(run: RunRecord) -> dict[str, int]:
    """Rows of each language over all sources."""
    rows: dict[str, int] = {}
    for source in run.sources:
        for code, count in source["languages"].items():
            rows[code] = rows.get(code, 0) + count
    return rows


def similarities(positive: Float[np.ndarray, "B"], negative: Float[np.ndarray, " Q"]) -> Figure:
    """Cosines of held-out queries with their positives and with their hard negatives."""
    figure, axes = _figure()
    bins = np.linspace(min(positive.min(), negative.min()), 1, 41)
    for values, color, label in ((negative, COLORS[1], "hard negatives"), (positive, COLORS[0], "positives")):
        axes.hist(values, list(bins), weights=np.full(len(values), 100 / len(values)), color=color, alpha=0.6, label=label)
    axes.set(xlabel="cosine with the query", ylabel="% of pairs")
    _legend(axes)
    return figure


def text_map(places: Float[np.ndarray, "S 2"], groups: Sequence[str]) -> Figure:
    """Texts as dots, coloured by group; the largest groups by name, the rest grey."""
    figure, axes = _figure(height=1.3 * HEIGHT)
    names, counts = np.unique(np.asarray(groups), return_counts=True)
    named = names[np.argsort(-counts, kind="stable")][: len(COLORS) - 1]
    rest = ~np.isin(groups, named)
    if rest.any():
        axes.scatter(places[rest, 0], places[rest, 1], s=6, color=COLORS[-1], alpha=0.4, linewidths=0, label="others")
    for name, color in zip(named, COLORS, strict=False):
        mine = places[np.asarray(groups) == name]
        axes.scatter(mine[:, 0], mine[:, 1], s=6, color=color, alpha=0.7, linewidths=0, label=name)
    axes.set(xticks=[], yticks=[])
    _legend(axes, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3, markerscale=2, handletextpad=0.2)
    return figure


def _curves(runs: Sequence[RunRecord], points: Callable[[RunRecord], Points], label: str, *, log=False, smooth=True) -> Figure | None:
    if not any(len(points(run)) > 1 for run in runs):
        return None
    figure, axes = _figure()
    for run, color in zip(runs, colors(runs), strict=True):
        steps, values = _columns(points(run))
        if smooth:
            axes.plot(steps, values, color=color, alpha=0.2, linewidth=0.7)
            values = smoothed(values)
        axes.plot(steps, values, color=color, linewidth=1.5, label=run.name)
    if log:
        axes.set_yscale("log")
    axes.set(xlabel="updates", ylabel=label)
    return _finished(figure, axes, runs)


def _dots(runs: Sequence[RunRecord], part: str, label: str) -> Figure | None:
    ends = {run.name: (run.validations[0], run.validations[-1]) for run in runs if run.validations}
    found = {name: [run.accuracy_by(part, line) for line in ends[name]] for run in runs if (name := run.name) in ends}
    if not found or not next(iter(found.values()))[1]:
        return None
    after = next(iter(found.values()))[1]
    names = sorted(after, key=lambda name: (after[name], name), reverse=True)  # the lowest is on top
    figure, axes = _figure(height=max(HEIGHT, 0.19 * len(names) + 0.8))
    for run, color in zip(runs, colors(runs), strict=True):
        styles: tuple[dict[str, Any], ...] = ({"markerfacecolor": "none", "alpha": 0.6}, {"label": run.name})
        for values, style in zip(found.get(run.name, []), styles, strict=False):
            axes.plot([100 * values.get(name, np.nan) for name in names], range(len(names)), "o", color=color, markersize=4.5, **style)
    axes.set(xlabel=label, yticks=range(len(names)), yticklabels=names)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.set_title("filled: after training · hollow: before", fontsize=8, loc="left")
    return _finished(figure, axes, runs)


def _figure(width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Axes]:
    with rc_context(SETTINGS):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots()


def _legend(axes: Axes, **place: object) -> None:
    axes.legend(frameon=False, fontsize=8, **place)


def _finished(figure: Figure, axes: Axes, runs: Sequence[RunRecord]) -> Figure:
    """One run needs no legend: the page says its name."""
    if len(runs) > 1:
        _legend(axes)
    return figure


def _points(lines: Sequence[Line], name: str, scale: float = 1) -> Points:
    return [(line["step"], scale * line[name]) for line in lines if name in line]


def _columns(points: Points) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _percent(found: Line) -> tuple[list[int], list[float]]:
    return [int(width) for width in found], [100 * value for value in found.values()]


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential mean without the bias of its start."""
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean, weight = SMOOTHING * mean + (1 - SMOOTHING) * value, SMOOTHING * weight + 1 - SMOOTHING
        result.append(mean / weight)
    return result
