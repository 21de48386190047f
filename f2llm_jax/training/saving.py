"""When the state of a run is saved: at its updates, by the clock, at the ends of epochs, and when the run ends."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from f2llm_jax.training import checkpoint
from f2llm_jax.training.replicas import check_replicas
from f2llm_jax.training.step import TrainState

ASKED_EVERY = 10  # updates between two questions of several hosts to the first one's clock: each answer waits for the devices


class Clock:
    """When a save by minutes is due, by the first host's clock."""

    def __init__(self, minutes: float):
        self._seconds, self._saved = 60 * minutes, time.monotonic()

    def due(self, step: int) -> bool:
        """Whether to save after update `step`; to be asked after every update, by all hosts alike."""
        if not self._seconds:
            return False
        due = time.monotonic() - self._saved > self._seconds
        if jax.process_count() == 1:
            return due
        return step % ASKED_EVERY == 0 and bool(multihost_utils.broadcast_one_to_all(np.int32(due)))

    def saved(self) -> None:
        """Starts to count again."""
        self._saved = time.monotonic()


class Saver:
    """Saves a run's checkpoints, each with the same metadata."""

    def __init__(
        self,
        checkpoints: ocp.training.Checkpointer,
        config: checkpoint.CheckpointConfig,
        metadata: dict[str, Any],
        total: int,
        ends: Sequence[int],
    ):
        """`total` is the run's number of updates, `ends` those that end an epoch."""
        self._checkpoints, self._config, self._metadata, self._total, self._ends = checkpoints, config, metadata, total, ends
        self._clock = Clock(config.minutes)

    def due(self, step: int, validated: bool) -> bool:
        """Whether to save after update `step`, which is `validated` or not; to be asked after every update, by all hosts alike."""
        due = step in self._ends or self._config.due(step, self._total) or self._clock.due(step)
        return due or (validated and bool(self._config.best))

    def save(self, step: int, state: TrainState, validation: Mapping[str, float]) -> None:
        """Starts saving, after a check that all replicas hold the same parameters (see `checkpoint.save`)."""
        check_replicas((state.params, state.projections))
        checkpoint.save(self._checkpoints, step, state, self._metadata, checkpoint.score(self._config.best, validation))
        self._clock.saved()
