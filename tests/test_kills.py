"""A run that SIGKILL ends twenty times, between saves and within them, is the undisturbed run to the bit."""

import random
import signal
import subprocess
import threading
import time

import pytest
from small_runs import assert_same_weights, environment, train_command

pytestmark = pytest.mark.slow

KILLS, STEPS = 20, 150  # so many that the last kill still finds the run, on a busy machine too
UNFINISHED = "*.orbax-checkpoint-tmp*"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def begin(folder, small_dataset):
    """Begins a run that saves after every update, in a process of its own; what it prints goes to a list."""
    runs_in = environment(1, folder / "compiled")

    def call(workdir):
        command = train_command(small_dataset.folder, workdir, steps=STEPS, checkpoint__every=1, checkpoint__keep=2, eval__every=25)
        process = subprocess.Popen(command, env=runs_in, stderr=subprocess.PIPE, text=True)
        printed = []
        reader = threading.Thread(target=lambda: printed.extend(process.stderr), daemon=True)
        reader.start()
        return process, printed, reader

    return call


def ended(process, printed, reader, timeout=600):
    process.wait(timeout)
    reader.join(timeout)
    process.stderr.close()
    return process.returncode, "".join(printed)


def newest(workdir):
    return max((int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit()), default=-1)


def wait_for(process, condition, timeout=120):
    """Until the condition holds or the process has ended."""
    until = time.monotonic() + timeout
    while process.poll() is None and not condition():
        assert time.monotonic() < until
        time.sleep(0.002)


def wait_for_start(process, printed):
    """Until the banner, before which nothing is written."""
    wait_for(process, lambda: any("parameters" in line for line in printed))


@pytest.fixture
def undisturbed(folder, begin):
    """A run to its end; its workdir, the seconds from its banner to its first save, and those of a step."""
    workdir = folder / "undisturbed"
    process, printed, reader = begin(workdir)
    wait_for_start(process, printed)
    started = time.monotonic()
    wait_for(process, lambda: newest(workdir) >= 0)
    saved = time.monotonic()
    code, text = ended(process, printed, reader)
    assert code == 0, text
    return workdir, saved - started, (time.monotonic() - saved) / STEPS


def test_twenty_kills_change_nothing(folder, begin, undisturbed):
    whole, start_seconds, step_seconds = undisturbed
    workdir, dice, within = folder / "killed", random.Random(5), 0
    for number in range(KILLS):
        process, printed, reader = begin(workdir)
        wait_for_start(process, printed)
        if number % 4 == 0:  # while it reads, compiles, validates, makes its first steps
            time.sleep(dice.uniform(0, start_seconds + 4 * step_seconds))
        else:
            before = newest(workdir)
            wait_for(process, lambda old=before: newest(workdir) > old)
            time.sleep(dice.uniform(0, 3 * step_seconds))
        if number % 4 in (1, 3):
            wait_for(process, lambda: list((workdir / "checkpoints").glob(UNFINISHED)))
            time.sleep(dice.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        code, text = ended(process, printed, reader)
        assert code == -signal.SIGKILL, f"it ended before kill {number}: {text}"
        within += bool(list((workdir / "checkpoints").glob(UNFINISHED)))
    print(f"{within} of {KILLS} kills came within a save, the last after step {newest(workdir)}")
    assert within >= 3
    code, text = ended(*begin(workdir))
    assert code == 0 and "resumes at step" in text, text
    assert not list((workdir / "checkpoints").glob(UNFINISHED))
    assert (workdir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert_same_weights(workdir, whole)
