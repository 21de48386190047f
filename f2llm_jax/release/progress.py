"""How far a long copy is: a bar on a terminal, a line every ten seconds elsewhere; rate and time left on both."""

import sys
import time

from tqdm import tqdm

LINE_SECONDS = 10


class Progress:
    """Counts bytes of a known total; called with the bytes done since the last call."""

    def __init__(self, label: str, total: int):
        """Shows nothing yet.

        Args:
          label: what is being done, in a word or two.
          total: bytes in all.
        """
        self._label, self._total, self._done = label, total, 0
        self._start = self._shown = time.perf_counter()
        self._bar = tqdm(desc=label, total=total, unit="B", unit_scale=True, file=sys.stderr) if sys.stderr.isatty() else None

    def __call__(self, done: int) -> None:
        """Takes `done` more bytes."""
        self._done += done
        now = time.perf_counter()
        if self._bar:
            self._bar.update(done)
            if self._done == self._total:
                self._bar.close()
        elif now - self._shown >= LINE_SECONDS:
            self._shown = now
            rate = self._done / (now - self._start)
            left = tqdm.format_interval((self._total - self._done) / rate)
            gigabytes = f"{self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB"
            print(f"{self._label}: {gigabytes}, {rate / 1e6:,.0f} MB/s, {left} left", file=sys.stderr, flush=True)
