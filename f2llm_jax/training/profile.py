"""A trace of a few steps for xprof (`xprof WORKDIR/profile`, or TensorBoard's profile tab)."""

import jax
from etils import epath


class Profile:
    """Traces the updates `start <= step < start + steps`; used as a context manager, so that a trace begun is written."""

    def __init__(self, folder: epath.Path, start: int, steps: int):
        """Nothing is traced if `steps` is 0."""
        self._folder, self._start, self._stop = folder, start, start + steps
        self._tracing = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def before(self, step: int) -> None:
        """To be called before every update."""
        if step == self._start < self._stop:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        elif step == self._stop:
            self._end()

    def _end(self) -> None:
        if self._tracing:
            jax.effects_barrier()
            jax.profiler.stop_trace()
            self._tracing = False
