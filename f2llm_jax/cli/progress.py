"""How far a command is: a bar on a terminal, a line now and then elsewhere; each with rate and time left."""

import sys
import time
from collections.abc import Callable
from typing import Self

from tqdm import tqdm

LINE_SECONDS = 10.0

# What library functions report to: units done, units in all.
ProgressCallback = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    """A `ProgressCallback` that shows nothing."""


class Progress:
    """The phases of a command, one after the other; used as a context manager, so that the last bar is closed."""

    def __init__(self, line_seconds: float = LINE_SECONDS):
        """Shows nothing yet; without a terminal, a line at most every `line_seconds`."""
        self._line_seconds = line_seconds
        self._bar: tqdm | None = None
        self._phase, self._note, self._done, self._shown = "", "", 0, 0.0
        self._start = self._last = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def of(self, phase: str, unit: str) -> ProgressCallback:
        """A callback that shows the phase of this name, in these units."""
        return lambda done, total: self.show(phase, done, total, unit)

    def counter(self, phase: str, unit: str, total: int) -> Callable[[int], None]:
        """The same for a phase that tells how many units it did since it last told."""
        done = 0

        def report(more: int) -> None:
            nonlocal done
            done += more
            self.show(phase, done, total, unit)

        return report

    def begin(self, phase: str) -> None:
        """Names a phase that reports nothing and may take long."""
        self._close()
        self._last = time.perf_counter()
        self.say(f"{phase} ...")

    def show(self, phase: str, done: int, total: int, unit: str, note: str = "") -> None:
        """`done` of `total` units of a phase, which begins when its name is first heard or its count falls back."""
        now = time.perf_counter()
        if phase != self._phase or done < self._done:
            self._close()
            self._phase, self._start, self._shown, self._done = phase, self._last, now, 0
        self._note, self._last = note, now
        if sys.stderr.isatty():
            scaled = unit == "B"
            self._bar = self._bar or tqdm(desc=phase, unit=unit if scaled else f" {unit}", unit_scale=scaled, file=sys.stderr)
            self._bar.total = total
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._done)
        elif now - self._shown >= self._line_seconds or (done == total and now - self._start >= self._line_seconds):
            self._shown = now
            self.say(self._line(done, total, unit, now))
        self._done = done

    def say(self, line: str) -> None:
        """Prints a line without disturbing the bar."""
        if self._bar:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def _line(self, done: int, total: int, unit: str, now: float) -> str:
        rate = done / max(now - self._start, 1e-9)
        left = tqdm.format_interval((total - done) / rate) if rate else "?"
        if unit == "B":
            amounts, speed = f"{done / 1e9:.1f} of {total / 1e9:.1f} GB", f"{rate / 1e6:,.0f} MB/s"
        else:
            amounts, speed = f"{done:,} of {total:,} {unit}", f"{rate:,.1f} {unit}/s"
        return f"{self._phase}: {amounts}, {speed}{f', {self._note}' if self._note else ''}, {left} left"

    def _close(self) -> None:
        if self._bar:
            self._bar.close()
        self._bar, self._phase = None, ""
