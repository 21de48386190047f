"""How much of a run's time was spent on updates that count, from what every host noted (`training/time_use.py`)."""

import collections
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from f2llm_jax.reporting.charts import horizontal_shares

FOLDER = "time"
NAME = re.compile(r"host-(\d+)\.(\d+)\.jsonl")


@dataclasses.dataclass(frozen=True)
class Goodput:
    """Seconds of one host by what they were spent on, from its first start to its last update."""

    wall: float
    spent: Mapping[str, float]  # updates that count, updates that were lost, input, validation, saving, compiling, starting, down
    lost_steps: int  # updates made again after a process was killed
    starts: int
    input_by_host: Mapping[int, float]  # mean seconds that an update waited for its batch

    @property
    def share(self) -> float:
        """Seconds of updates that count over all seconds."""
        return self.spent.get("updates", 0.0) / self.wall if self.wall else 0.0

    @property
    def slowest_host(self) -> int:
        """The host that waits longest for its input."""
        return max(self.input_by_host, key=lambda host: self.input_by_host[host])

    def __str__(self) -> str:
        lost = f"{self.lost_steps} updates lost at {self.starts - 1} restarts" if self.starts > 1 else "no restart"
        slowest = f"; slowest input: host {self.slowest_host}, {self.input_by_host[self.slowest_host]:.3f} s an update"
        return f"{self.share:.1%} of {self.wall:,.0f} s were spent on updates that count; {lost}" + slowest * (len(self.input_by_host) > 1)


def read_goodput(workdir: epath.PathLike) -> Goodput | None:
    """The goodput of the first host; None where no update was noted."""
    by_host: dict[int, list[list[dict[str, Any]]]] = collections.defaultdict(list)
    folder = epath.Path(workdir) / FOLDER
    names = [(match, path) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))] if folder.exists() else []
    for match, path in sorted(names, key=lambda found: int(found[0][2])):
        if lines := _lines(path.read_text()):
            by_host[int(match[1])].append(lines)
    if 0 not in by_host:
        return None
    waits = {host: _mean([line.get("input", 0.0) for start in starts for line in start[1:]]) for host, starts in sorted(by_host.items())}
    return _account(by_host[0], waits)


def _account(starts: Sequence[Sequence[Mapping[str, Any]]], waits: Mapping[int, float]) -> Goodput:
    spent: collections.Counter[str] = collections.Counter()
    lost_steps = 0
    for number, (head, *lines) in enumerate(starts):
        following = starts[number + 1][0] if number + 1 < len(starts) else None
        spent["starting"] += head["starting"]
        for line in lines:
            lost = following is not None and line["step"] > following["resumed"]
            lost_steps += lost
            spent["lost" if lost else "updates"] += line["step_seconds"]
            for name in ("input", "validation", "saving", "compiling"):
                spent[name] += line.get(name, 0.0)
        if following:
            spent["down"] += following["begun"] - lines[-1]["at"]
    wall = starts[-1][-1]["at"] - starts[0][0]["begun"]
    return Goodput(wall, {name: seconds for name, seconds in spent.items() if seconds > 0}, lost_steps, len(starts), waits)


def _lines(text: str) -> list[dict[str, Any]]:
    """The lines of a start, a last one that was cut short left out; none if there was no update."""
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found if len(found) > 1 and "resumed" in found[0] else []


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def goodput_chart(found: Mapping[str, Goodput]):
    """For each run, the shares of its time."""
    return horizontal_shares({name: {what: seconds / one.wall for what, seconds in one.spent.items()} for name, one in found.items()})
