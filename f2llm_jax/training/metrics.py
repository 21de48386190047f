"""What a run writes down: exact metrics, timings, what loggers make of both (see `loggers`), and a progress display.

`metrics.jsonl` holds only what is a function of configuration and data, so two runs can be compared byte by byte; what
depends on the machine goes to `timings.jsonl`. The device is asked for a step's metrics only after the next step has been
dispatched, so it never waits for the host.
"""

import collections
import dataclasses
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath
from tqdm import tqdm

from f2llm_jax.errors import DivergedError
from f2llm_jax.model.flops import PEAK_FLOPS
from f2llm_jax.objectives import Mean
from f2llm_jax.storage.files import is_remote, naming, write_text
from f2llm_jax.training.loggers import Logger
from f2llm_jax.training.source_means import SourceMeans

RATE_WINDOW = 50  # steps over which tokens per second are averaged
NOT_FINITE = "not finite, so not in metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class StepWork:
    """What a step took.

    Attributes:
      tokens: real tokens of the batch.
      padded_tokens: computed on, padding included.
      model_flops: of the student (`model.flops`); neither a teacher's nor what is computed twice.
      input_wait: seconds that the loop waited for the batch.
    """

    tokens: int
    padded_tokens: int
    model_flops: float
    input_wait: float


class Recorder:
    """Writes the metrics of a run; used as a context manager, so that the last step is written too.

    Of several hosts the first writes files and calls loggers.
    """

    def __init__(
        self,
        folder: epath.Path,
        start: int,
        total: int,
        log_every: int,
        max_skipped: int,
        *,
        resumed: bool = False,
        loggers: Sequence[Logger] = (),
    ):
        """Continues the files in `folder` after step `start`: later lines, of a run that was killed, are removed.

        Args:
          folder: the workdir.
          start: updates already made.
          total: updates of the whole run.
          log_every: steps of an interval that losses are averaged over by source; without a terminal, also between two progress lines.
          max_skipped: steps in a row that may be skipped because they were not finite.
          resumed: whether a checkpoint of `start` was gone on from. Without one a run begins anew, and nothing of before it stays.
          loggers: functions that take each line as it is written.
        """
        first = jax.process_index() == 0
        last = start if resumed else -1
        self._metrics, self._timings = (_Lines(folder / name, last) if first else None for name in ("metrics.jsonl", "timings.jsonl"))
        self._source_means = SourceMeans(log_every, self._metrics.kept() if self._metrics else ())
        self._loggers = loggers if first else ()
        self._max_skipped, self._skipped = max_skipped, 0
        self._told: set[str] = set()  # metrics of which it was said that they were not finite
        self._log_every, self._start, self._total = log_every, start, total
        self._pending: tuple[int, dict[str, Mean], dict[str, Any], dict[str, float]] | None = None
        self._recent: collections.deque[tuple[float, StepWork]] = collections.deque(maxlen=RATE_WINDOW)
        self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True) if interactive() else None

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.flush()
        finally:
            if self._bar:
                self._bar.close()

    def step(self, step: int, means: Mapping[str, Mean], described: Mapping[str, Any], work: StepWork) -> None:
        """Takes step `step` (1-based: the number of updates made) and writes the one before.

        Args:
          step: updates made, this one included.
          means: device values; not read now.
          described: host values, functions of configuration and data (epoch, source, learning rate).
          work: what the step took.
        """
        self._write_pending()
        now = time.perf_counter()
        self._recent.append((now, work))
        self._pending = (step, dict(means), dict(described), {"input_wait_seconds": work.input_wait, **self._rates()})

    def flush(self) -> None:
        """Writes the step that is still held back, and makes files whole on an object store.

        Raises:
          DivergedError: too many steps in a row had no finite loss and gradient.
        """
        self._write_pending()
        for lines in filter(None, (self._metrics, self._timings)):
            lines.store()

    def _write_pending(self) -> None:
        if self._pending is None:
            return
        (step, means, described, timing), self._pending = self._pending, None
        values = {name: float(mean.value) for name, mean in jax.device_get(means).items() if mean.count > 0}
        self._skipped = self._skipped + 1 if values["skipped"] else 0
        # JSON knows no NaN; that a step was skipped is said where it was.
        dropped = {name for name, value in values.items() if not math.isfinite(value)}
        if not self._skipped and (missing := dropped - self._told):
            self._told |= missing
            self.say(f"step {step}/{self._total}  {NOT_FINITE}: {', '.join(sorted(missing)[:5])}")
        if step == self._start + 1 and values.get("grad_norm") == 0:
            self.say(f"step {step}/{self._total}  the gradient is zero, so nothing is learned: does the loss depend on the embeddings?")
        values = {name: value for name, value in values.items() if name not in dropped and (name != "skipped" or value)}
        self.write(step, {**described, **values})
        if means_of_sources := self._source_means.add(step, {**described, **values}):
            self.write(step, means_of_sources)
        self._time(step, timing)
        self._show(step, values, timing)
        if self._skipped > self._max_skipped:
            raise DivergedError(
                f"update {step} on a batch of source {described.get('source')!r} (epoch {described.get('epoch')}) and {self._max_skipped} "
                "before it had no finite loss and gradient and were skipped; the last checkpoint is unharmed: lower the learning rate, or "
                "train in float32 to find the cause"
            )

    def _time(self, step: int, timing: Mapping[str, float]) -> None:
        if self._timings:
            self._timings.append({"step": step, **timing})
        for log in self._loggers:
            log(step, {f"timing/{name}": value for name, value in timing.items()})

    def validation(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """Writes what `validate` found after update `step`, and how long it took."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self.write(step, finite)
        self._time(step, {"validation_seconds": seconds})
        shown = [
            f"{name} {values[f'validation/{name}']:.4f}" for name in ("loss", "accuracy", "spearman") if f"validation/{name}" in values
        ]
        self.say(f"step {step}/{self._total}  held-out {', '.join(shown)}")
        if missing := sorted(values.keys() - finite.keys()):
            self.say(f"step {step}/{self._total}  {NOT_FINITE}: {', '.join(missing[:5])}")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes a line of metrics."""
        if self._metrics:
            self._metrics.append({"step": step, **values})
        for log in self._loggers:
            log(step, values)

    def say(self, line: str) -> None:
        """Prints a line without disturbing the bar."""
        tqdm.write(line, file=sys.stderr) if self._bar else print(line, file=sys.stderr, flush=True)

    def _rates(self) -> dict[str, float]:
        (first, *_), (last, *_) = self._recent[0], self._recent[-1]
        steps, seconds = len(self._recent) - 1, last - first
        done = [work for _, work in self._recent][1:]
        tokens, flops = sum(work.tokens for work in done), sum(work.model_flops for work in done)
        if not steps:
            return {}
        rates = {"tokens_per_second": tokens / seconds, "steps_per_second": steps / seconds, "model_flops_per_second": flops / seconds}
        if peak := PEAK_FLOPS.get(jax.devices()[0].device_kind):
            rates["mfu"] = flops / seconds / (peak * jax.device_count())
        return rates | {"token_efficiency": tokens / sum(work.padded_tokens for work in done)}

    def _show(self, step: int, values: Mapping[str, float], timing: Mapping[str, float]) -> None:
        rate = f"{timing.get('tokens_per_second', 0):,.0f} tokens/s"
        if self._bar:
            self._bar.set_postfix_str(f"loss {values.get('loss', math.nan):.3f}, {rate}", refresh=False)
            self._bar.update(step - self._bar.n)
        elif step % self._log_every == 0 or step in (self._start + 1, self._total):
            left = (self._total - step) / timing["steps_per_second"] if "steps_per_second" in timing else float("nan")
            remaining = "?" if left != left else tqdm.format_interval(left)
            loss = values.get("loss", math.nan)
            print(f"step {step}/{self._total}  loss {loss:.4f}  {rate}  {remaining} left", file=sys.stderr, flush=True)


def interactive() -> bool:
    """Whether somebody watches, on a terminal or in a notebook, and wants a bar that moves."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


class _Lines:
    """A file of JSON lines that grows: line by line on a disk; on an object store, which cannot append, whole at each `store`."""

    def __init__(self, file: epath.Path, start: int):
        """Drops the lines after step `start`, and those that are broken, as a last one that was cut short."""
        self._file, self._remote = file, is_remote(file)
        kept = _until(file.read_bytes().decode(errors="replace"), start) if file.exists() else []
        self._lines = kept if self._remote else []
        if file.exists() and not self._remote:  # an object is written whole or not at all
            write_text(file, "".join(kept))

    def kept(self) -> list[dict[str, Any]]:
        """The lines that were there and stay."""
        text = "".join(self._lines) if self._remote else self._file.read_text() if self._file.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def append(self, values: Mapping[str, Any]) -> None:
        line = json.dumps(values, allow_nan=False) + "\n"
        if self._remote:
            self._lines.append(line)
            return
        with naming(self._file), self._file.open("a") as file:
            file.write(line)

    def store(self) -> None:
        if self._remote:
            write_text(self._file, "".join(self._lines))


def _until(text: str, step: int) -> list[str]:
    """The lines of steps up to `step`, without those that are broken."""
    kept = []
    for line in text.splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    return kept
