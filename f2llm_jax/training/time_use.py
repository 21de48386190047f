"""Where the time of a run goes, on every host: `WORKDIR/time/host-I.BEGUN.jsonl`, a file for each start of each process.

Unlike `timings.jsonl` these files are never rewound, so they also know of updates that were lost with a killed process. The first line
says where the run resumed; each further line is one update: `step`, `at` (Unix time at its end), `step_seconds`, and the seconds before it
that were spent on `input`, `validation`, `saving` or `compiling`. `reporting/goodput.py` reads them.
"""

import collections
import contextlib
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from f2llm_jax.storage.files import is_remote, write_text

FOLDER = "time"
STORED_EVERY = 60.0  # seconds between two uploads where files cannot grow
COMPARED_EVERY = 100  # updates between two lines that name the slowest host
SLOW_SECONDS = 0.01  # a host that needs less than this longer than the others is not named
RECENT = 200  # updates of which the median is taken


class TimeUse:
    """Notes what the process is doing, and since when."""

    def __init__(self, workdir: epath.Path, process_id: int):
        """Writes nothing before the first update is done: a run that is refused leaves no workdir."""
        begun = time.time()
        self._file = workdir / FOLDER / f"host-{process_id}.{int(1000 * begun)}.jsonl"
        self._lines: list[dict[str, float]] = [{"begun": begun}]
        self._stored = -STORED_EVERY
        self._spent: dict[str, float] = collections.defaultdict(float)
        self._recent: collections.deque[float] = collections.deque(maxlen=RECENT)
        self._busy: list[float] = []
        self.phase, self.since = "starting", time.monotonic()

    @property
    def median_step(self) -> float:
        """Seconds of a recent update; 0 before there is one."""
        return statistics.median(tuple(self._recent)) if self._recent else 0.0

    def resumed(self, step: int) -> None:
        """Notes that the next update is `step + 1`."""
        self._lines[0] |= {"resumed": step, "starting": self._lap()}
        self.phase = "compiling"

    @contextlib.contextmanager
    def spending(self, phase: str) -> Iterator[None]:
        """Time in the block is of `phase`: "input", "validation" or "saving"."""
        before = self.phase
        self._spent[before] += self._lap()
        self.phase = phase
        try:
            yield
        finally:
            self._spent[phase] += self._lap()
            self.phase = before

    def stepped(self, step: int) -> None:
        """Notes that update `step` has been handed to the devices and the one before it is done."""
        self._spent[self.phase] += self._lap()
        seconds = self._spent.pop("step", 0.0)
        if seconds:
            self._recent.append(seconds)
        self._busy.append(self._spent["input"])
        spent = {name: round(value, 4) for name, value in self._spent.items() if value}
        self._lines.append({"step": step, "at": round(time.time(), 3), "step_seconds": round(seconds, 4), **spent})
        self._spent.clear()
        self.phase = "step"
        self._write()

    def slowest(self, step: int) -> str:
        """Every `COMPARED_EVERY` updates a line that names the host whose input is slowest; "" otherwise. All processes ask alike."""
        if jax.process_count() == 1 or step % COMPARED_EVERY or not self._busy:
            return ""
        waits = np.asarray(multihost_utils.process_allgather(np.float32(np.mean(self._busy)))).reshape(-1)
        self._busy.clear()
        host = int(waits.argmax())
        usual = float(np.median(np.delete(waits, host)))
        if waits[host] < usual + SLOW_SECONDS:
            return ""
        return f"step {step}: host {host} is the slowest: it waits {waits[host]:.2f} s a step for its input, the others {usual:.2f} s"

    def ends(self) -> None:
        """Notes that what is left is to write what is not yet written."""
        self._spent[self.phase] += self._lap()
        self.phase = "saving"

    def waiting(self) -> float:
        """Seconds since anything was noted."""
        return time.monotonic() - self.since

    def close(self) -> None:
        """Writes what is not yet written, if there was an update."""
        if is_remote(self._file) and len(self._lines) > 1:
            self._store()

    def _lap(self) -> float:
        now = time.monotonic()
        seconds, self.since = now - self.since, now
        return seconds

    def _write(self) -> None:
        if is_remote(self._file):
            if time.monotonic() - self._stored > STORED_EVERY:
                self._store()
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as file:
            file.write(_text(self._lines))
        self._lines.clear()

    def _store(self) -> None:
        write_text(self._file, _text(self._lines))
        self._stored = time.monotonic()


def _text(lines: Sequence[Mapping[str, float]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)
