"""What a run recorded next to its checkpoints, where present: read for the model card and for the report."""

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from f2llm_jax.storage.files import read_json

Line = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The contents of a workdir's files up to a step; empty where a file is missing.

    Attributes:
      name: of the run, for people.
      config: the resolved configuration (`config.json`).
      sources: one entry a source of the data (`dataset.json`).
      environment: versions, devices, commit (`environment.json`).
      metrics: lines of `metrics.jsonl`.
      timings: lines of `timings.jsonl`.
    """

    name: str = ""
    config: Line = dataclasses.field(default_factory=dict)
    sources: Sequence[Line] = ()
    environment: Line = dataclasses.field(default_factory=dict)
    metrics: Sequence[Line] = ()
    timings: Sequence[Line] = ()

    @property
    def languages(self) -> list[str]:
        """Language codes of all sources, without scripts and regions, sorted."""
        return sorted({language.split("_")[0].split("-")[0] for source in self.sources for language in source["languages"]})

    @property
    def validations(self) -> list[Line]:
        """The lines of held-out figures."""
        return [line for line in self.metrics if "validation/loss" in line]

    def values(self, name: str) -> dict[int, Any]:
        """The metric `name` by step, as far as it was written."""
        return {line["step"]: line[name] for line in self.metrics if name in line}

    def accuracy_by(self, part: str, line: Line) -> dict[str, float]:
        """Held-out accuracies in one line of `validations`, by "source", "kind", "language" or "dim" (widths ascend)."""
        prefix = f"validation/accuracy/{part}/"
        found = {name.removeprefix(prefix): value for name, value in line.items() if name.startswith(prefix)}
        return dict(sorted(found.items(), key=lambda item: int(item[0]))) if part == "dim" else found


def read_record(workdir: epath.PathLike, step: int | None = None) -> RunRecord:
    """The record of the run in `workdir`, up to update `step` if it is given."""
    workdir = epath.Path(workdir)
    return RunRecord(
        name=workdir.name,
        config=_object(workdir / "config.json"),
        sources=_object(workdir / "dataset.json").get("sources", []),
        environment=_object(workdir / "environment.json"),
        metrics=_lines(workdir / "metrics.jsonl", step),
        timings=_lines(workdir / "timings.jsonl", step),
    )


def _object(path: epath.Path) -> dict[str, Any]:
    return read_json(path, sealed=True) if path.exists() else {}


def _lines(path: epath.Path, step: int | None) -> list[Line]:
    """A line that is broken, as the last one of a killed run, is left out."""
    found = []
    for line in path.read_bytes().decode(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            content = json.loads(line)
            if step is None or content["step"] <= step:
                found.append(content)
    return found
