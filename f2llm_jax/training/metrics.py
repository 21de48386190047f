"""What a run writes down: exact metrics, timings, TensorBoard, and a progress display.

`metrics.jsonl` holds only what is a function of configuration and data, so two runs can be compared byte by byte; what
depends on the machine goes to `timings.jsonl`. The device is asked for a step's metrics only after the next step has been
dispatched, so it never waits for the host.
"""

import collections
import json
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from tensorboardX import SummaryWriter
from tqdm import tqdm

from f2llm_jax.objectives import Mean

RATE_WINDOW = 50  # steps over which tokens per second are averaged


class Recorder:
    """Writes the metrics of a run; used as a context manager, so that the last step is written too."""

    def __init__(self, folder: epath.Path, start: int, total: int, log_every: int):
        """Continues the files in `folder` after step `start`: later lines, of a run that was killed, are removed.

        Args:
          folder: the workdir.
          start: updates already made.
          total: updates of the whole run.
          log_every: steps between two plain progress lines, where there is no terminal.
        """
        self._metrics, self._timings = folder / "metrics.jsonl", folder / "timings.jsonl"
        for file in (self._metrics, self._timings):
            _keep_until(file, start)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self._log_every, self._start, self._total = log_every, start, total
        self._pending: tuple[int, dict[str, Mean], dict[str, Any], dict[str, float]] | None = None
        self._recent: collections.deque[tuple[float, int, int]] = collections.deque(maxlen=RATE_WINDOW)
        self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()
        self._board.close()
        if self._bar:
            self._bar.close()

    def step(self, step: int, means: Mapping[str, Mean], facts: Mapping[str, Any], tokens: int, slots: int, input_wait: float) -> None:
        """Takes step `step` (1-based: the number of updates made) and writes the one before.

        Args:
          step: updates made, this one included.
          means: device values; not read now.
          facts: host values, functions of configuration and data (epoch, source, learning rate).
          tokens: real tokens of the batch.
          slots: token slots computed on.
          input_wait: seconds that the loop waited for this batch.
        """
        self.flush()
        now = time.perf_counter()
        self._recent.append((now, tokens, slots))
        self._pending = (step, dict(means), dict(facts), {"input_wait_seconds": input_wait, **self._rates()})

    def flush(self) -> None:
        """Writes the step that is still held back."""
        if self._pending is None:
            return
        (step, means, facts, timing), self._pending = self._pending, None
        values = {name: float(mean.value) for name, mean in jax.device_get(means).items() if mean.count > 0}
        self.write(step, {**facts, **values})
        _append(self._timings, {"step": step, **timing})
        for name, value in timing.items():
            self._board.add_scalar(f"timing/{name}", value, step)
        self._show(step, values, timing)

    def validation(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """Writes what `validate` found after update `step`, and how long it took."""
        self.write(step, values)
        _append(self._timings, {"step": step, "validation_seconds": seconds})
        self.say(f"step {step}/{self._total}  held-out loss {values['validation/loss']:.4f}, accuracy {values['validation/accuracy']:.4f}")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes a line of metrics, and its numbers to TensorBoard."""
        _append(self._metrics, {"step": step, **values})
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name, value, step)

    def say(self, line: str) -> None:
        """Prints a line without disturbing the bar."""
        tqdm.write(line, file=sys.stderr) if self._bar else print(line, file=sys.stderr, flush=True)

    def _rates(self) -> dict[str, float]:
        (first, *_), (last, *_) = self._recent[0], self._recent[-1]
        steps, seconds = len(self._recent) - 1, last - first
        tokens, slots = (sum(r[i] for r in list(self._recent)[1:]) for i in (1, 2))
        if not steps:
            return {}
        return {"tokens_per_second": tokens / seconds, "steps_per_second": steps / seconds, "token_efficiency": tokens / slots}

    def _show(self, step: int, values: Mapping[str, float], timing: Mapping[str, float]) -> None:
        rate = f"{timing.get('tokens_per_second', 0):,.0f} tokens/s"
        if self._bar:
            self._bar.set_postfix_str(f"loss {values['loss']:.3f}, {rate}", refresh=False)
            self._bar.update(step - self._bar.n)
        elif step % self._log_every == 0 or step in (self._start + 1, self._total):
            left = (self._total - step) / timing["steps_per_second"] if "steps_per_second" in timing else float("nan")
            remaining = "?" if left != left else tqdm.format_interval(left)
            print(f"step {step}/{self._total}  loss {values['loss']:.4f}  {rate}  {remaining} left", file=sys.stderr, flush=True)


def _append(file: epath.Path, values: Mapping[str, Any]) -> None:
    with file.open("a") as f:
        f.write(json.dumps(values) + "\n")


def _keep_until(file: epath.Path, step: int) -> None:
    """Drops the lines after `step` and a last line that was cut short."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            break
    beside = file.with_name(file.name + ".partial")
    beside.write_text("".join(kept))
    beside.replace(file)
