"""A run that hangs ends itself: with the stacks of all threads in its host's log, and an exit code after which it is started again.

Heartbeats between hosts see a process that is dead. One that waits for ever (for a host that hangs, a device, a bucket) is alive to them.
"""

import faulthandler
import os
import sys
import threading
import traceback
from types import TracebackType

from f2llm_jax.errors import HUNG
from f2llm_jax.training.host_log import HostLog
from f2llm_jax.training.time_use import TimeUse

USUAL_STEPS = 20  # an update may take this many times the median one
SLOW_PHASES = 6  # what is not an update may take this many times the limit: compiling, a validation, a save, the start
LOOKS = 20  # within a limit


class Watchdog:
    """Watches `use` from a thread; used as a context manager."""

    def __init__(self, use: TimeUse, log: HostLog, minutes: float):
        """Args: what the process does; where stacks are written; minutes that an update may take at least, 0 to watch nothing."""
        self._use, self._log, self._limit = use, log, 60 * minutes
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._limit:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()

    def limit(self) -> float:
        """Seconds that what the process is doing now may take."""
        if self._use.phase in ("step", "input"):
            return max(self._limit, USUAL_STEPS * self._use.median_step)
        return SLOW_PHASES * self._limit

    def _watch(self) -> None:
        while not self._done.wait(self._limit / LOOKS):
            seconds, limit, phase = self._use.waiting(), self.limit(), self._use.phase
            if seconds > limit:
                self._end(f"hangs: {phase} has taken {seconds:.0f} s, more than {limit:.0f} s; ends with exit code {HUNG}, to be run again")

    def _end(self, reason: str) -> None:
        faulthandler.dump_traceback(all_threads=True)  # first what can neither wait nor fail
        print(reason, file=sys.stderr, flush=True)
        # The log may be in a bucket that does not answer: it has a limit of its own.
        writer = threading.Thread(target=lambda: (self._log.say(f"{reason}\n{stacks()}"), self._log.store()), daemon=True)  # type: ignore[func-returns-value]
        writer.start()
        writer.join(60)
        os._exit(HUNG)


def stacks() -> str:
    """What every thread of this process is at."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found = sys._current_frames().items()
    return "\n".join(f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame)).rstrip()}" for ident, frame in found)
