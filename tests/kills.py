"""Signals to commands: at the moment that a test names, or at random ones again and again."""

import json
import random
import signal
import subprocess
from collections.abc import Callable, Sequence

# Runs a command of this project; as it is about to call `target` for the `at`-th time, or with `at` as its first argument, it sends itself
# the signal, once the file `after` is there.
_PROGRAM = """
import importlib, json, os, pathlib, signal, sys, time
plan = json.loads(sys.argv.pop(1))
module, _, path = plan["target"].partition(":")
owner = importlib.import_module("f2llm_jax." + module)
*inner, name = path.split(".")
for part in inner:
    owner = getattr(owner, part)
original, calls = getattr(owner, name), []
def replacement(*arguments, **options):
    calls.append(1)
    now = arguments[1] if plan["by_argument"] else len(calls)
    if now == plan["at"]:
        while plan["after"] and not pathlib.Path(plan["after"]).exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.Signals[plan["signal"]])
    return original(*arguments, **options)
setattr(owner, name, replacement)
sys.exit(importlib.import_module("f2llm_jax." + plan["command"]).main(sys.argv[1:]))
"""


def at_call(command: str, target: str, at: int) -> tuple[str, ...]:
    """Python's arguments for `command`, which kills itself before the `at`-th call of `target`, "room.module:function"."""
    plan = {"command": command, "target": target, "at": at, "by_argument": False, "signal": "SIGKILL", "after": ""}
    return "-c", _PROGRAM, json.dumps(plan)


def at_step(step: int, name: str = "SIGKILL", after: object = "") -> tuple[str, ...]:
    """Python's arguments for training that sends itself a signal before it records `step`, and once the path `after` is there."""
    plan = {"command": "main", "target": "training.metrics:Recorder.step", "at": step, "by_argument": True, "signal": name}
    return "-c", _PROGRAM, json.dumps(plan | {"after": str(after)})


def at_random(command: Sequence[str], kills: int, longest: float, finished: Callable[[], None], killed: Callable[[int], None]) -> None:
    """Kills `command` so many times, each time begun anew and after up to `longest` seconds.

    `finished` is called where a command was done before its moment came, to remove what it made; `killed`, with the number of kills so far,
    after each kill.
    """
    draw, number = random.Random(0), 0
    while number < kills:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                assert process.wait(longest * draw.random()) == 0
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                number += 1
                killed(number)
            else:
                finished()
