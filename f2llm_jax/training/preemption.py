"""Stopping on request: SIGTERM, which clusters send before they take a machine away, and Ctrl-C.

With several hosts the notice may reach only one. Then JAX's coordination service finds the first step that all can still
reach, so that all save the same one.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from f2llm_jax.cli.command import INTERRUPTED


class StopRequest:
    """Whether the run was asked to stop; used as a context manager, which puts back the handler that it replaced."""

    def __enter__(self) -> "StopRequest":
        self._asked = False
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # only there handlers can be set
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupted)
            if jax.process_count() == 1:  # with several hosts JAX handles it, and tells the others
                self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._asked = True

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        """The first Ctrl-C is SIGTERM, the second ends the process at once."""
        signal.signal(number, self._end)
        os.write(2, b"stops after this update and saves; Ctrl-C again ends at once, without saving\n")
        os.kill(os.getpid(), signal.SIGTERM)

    def _end(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        os.write(2, b"interrupted twice: ended at once; the same command resumes from the last checkpoint\n")
        os._exit(INTERRUPTED)

    def before(self, step: int) -> bool:
        """Whether to save and stop before update `step`; to be asked before every update, by all hosts alike."""
        return self._asked or (jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step))
