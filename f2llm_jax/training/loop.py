"""The loop of a run: validate and save before a batch is drawn, so that a resumed run repeats neither."""

import dataclasses
import time
from typing import Any

from f2llm_jax.data.pipeline import Pipeline
from f2llm_jax.model.flops import Work, training_flops
from f2llm_jax.model.sizes import DecoderConfig
from f2llm_jax.training.metrics import Recorder, StepWork
from f2llm_jax.training.preemption import StopRequest
from f2llm_jax.training.profile import Profile
from f2llm_jax.training.program import Program
from f2llm_jax.training.saving import Saver
from f2llm_jax.training.step import TrainState
from f2llm_jax.training.time_use import TimeUse
from f2llm_jax.training.validation import HeldOut


@dataclasses.dataclass(frozen=True)
class Loop:
    """What every update uses."""

    model: DecoderConfig
    program: Program
    teacher_params: Any  # in the dtype of the computation; None without a live teacher
    batches: Pipeline
    held_out: HeldOut
    saver: Saver
    recorder: Recorder
    profile: Profile
    use: TimeUse
    total: int  # updates of the whole run
    threads: int  # that read a batch
    ahead: int  # batches read before they are needed

    def run(self, state: TrainState, first: int, resumed: bool, stop: StopRequest) -> int:
        """Updates `state`, which has made `first` updates, to the end or until `stop` is asked for; how many have been made then.

        The state of a checkpoint (`resumed`) was validated and saved before.
        """
        arrivals = self.batches.steps(first, self.total, self.threads, self.ahead)
        for step in range(first, self.total + 1):
            done, as_saved = step == self.total, resumed and step == first
            stopping = not done and stop.before(step)
            self._settle(state, step, first, as_saved, stopping)
            if done or stopping:
                break
            self.profile.before(step)
            waited = time.perf_counter()
            with self.use.spending("input"):
                data = next(arrivals)
            waited = time.perf_counter() - waited
            if step == first:
                self.recorder.say("compiling the training step; the bar moves once that is done")
            state, means = self.program.train_step(state, self.teacher_params, data.batch)
            described = {"epoch": data.plan.epoch, "source": data.plan.source, "kind": data.plan.kind}
            needed = training_flops(self.model, Work(data.tokens, data.squares))
            self.recorder.step(step + 1, means, described, StepWork(data.tokens, data.padded_tokens, needed, waited))
            self.use.stepped(step + 1)
            if line := self.use.slowest(step + 1):
                self.recorder.say(line)
        self.use.ends()
        return step

    def _settle(self, state: TrainState, step: int, first: int, as_saved: bool, stopping: bool) -> None:
        """Validates and saves the state after update `step` where that is due."""
        if as_saved:
            return
        validating = self.held_out.due(step, self.total)
        saving = self.saver.due(step, validating) or stopping
        found: dict[str, float] = {}
        if validating or saving:
            self.recorder.flush()  # a checkpoint never knows more than the metrics next to it
        if validating:
            if step in (0, first):
                self.recorder.say("scoring held-out rows before training (the first time, this compiles the evaluation step)")
            begun = time.perf_counter()
            with self.use.spending("validation"):
                found = self.held_out.score(self.program.eval_step, state.params, step, self.program.scored)
            self.recorder.validation(step, found, time.perf_counter() - begun)
        if saving:
            with self.use.spending("saving"):
                self.saver.save(step, state, found)
