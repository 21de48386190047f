"""Stopping on request: SIGTERM, which clusters send before they take a machine away, and Ctrl-C's politer sister.

With several hosts the notice may reach only one. Then JAX's coordination service finds the first step that all can still
reach, so that all save the same one.
"""

import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Whether the run was asked to stop; used as a context manager, which puts back the handler that it replaced."""

    def __enter__(self) -> "StopRequest":
        self._asked = False
        self._previous = None
        # With several hosts JAX handles the signal itself. A handler can only be set on the main thread.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._asked = True

    def before(self, step: int) -> bool:
        """Whether to save and stop before update `step`; to be asked before every update, by all hosts alike."""
        return self._asked or (jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step))
