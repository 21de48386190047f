"""Training losses averaged by source over an interval of steps, as the published trainer logs them."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

LOSSES = ("in_batch", "hard")


class SourceMeans:
    """Takes the metrics of each step and gives their means at the end of every interval.

    A name is `train/LOSS/source/NAME`, the mean over the steps of that source, or `train/LOSS/kind/KIND`, the mean over the sources of
    that kind (F2LLM `utils.py`, `training_loss_in_batch` and `training_loss_hard`). A source that was not drawn has no mean.
    """

    def __init__(self, interval: int, earlier: Iterable[Mapping[str, Any]] = ()):
        """`earlier` are the lines of metrics.jsonl up to now, of which those of the interval under way count."""
        self._interval = interval
        self._values: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        for line in earlier:
            if "source" in line:
                self.add(line["step"], line)

    def add(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """The means if `step` (1-based) ends an interval, else nothing.

        `metrics` are those of one step: its `source`, its `kind` and its losses; a loss that is not there counts for nothing.
        """
        for loss in LOSSES:
            if loss in metrics:
                self._values[loss, metrics["kind"], metrics["source"]].append(metrics[loss])
        if step % self._interval:
            return {}
        of_source, of_kind = {}, defaultdict(list)
        for (loss, kind, source), values in sorted(self._values.items()):
            mean = sum(values) / len(values)
            of_source[f"train/{loss}/source/{source}"] = mean
            of_kind[f"train/{loss}/kind/{kind}"].append(mean)
        self._values.clear()
        return of_source | {name: sum(values) / len(values) for name, values in of_kind.items()}
