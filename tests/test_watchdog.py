"""A hang ends with stacks and an exit code, slow hosts are named, time is accounted for: real processes, real kills."""

import json
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time

import kills
import pytest
import small_data
from small_runs import TRAIN, environment, train_command

from f2llm_jax.errors import HUNG
from f2llm_jax.reporting.goodput import read_goodput
from f2llm_jax.training.host_log import HostLog
from f2llm_jax.training.time_use import TimeUse
from f2llm_jax.training.watchdog import Watchdog

# TFDS and Beam use what protobuf, asyncio and Python are about to drop; none of it is ours.
pytestmark = [pytest.mark.filterwarnings(f"ignore:::{module}") for module in ("tensorflow_datasets", "apache_beam")]

HANGING = """
import pathlib, sys, threading
from etils import epath
from f2llm_jax.training.host_log import HostLog
from f2llm_jax.training.time_use import TimeUse
from f2llm_jax.training.watchdog import Watchdog
folder = epath.Path(sys.argv[1])
use, log = TimeUse(folder, 0), HostLog(folder, 0)
def waits_for_ever():
    threading.Event().wait()
with Watchdog(use, log, float(sys.argv[2]) / 60):
    use.resumed(3)
    for step in (4, 5):
        use.stepped(step)
    threading.Thread(target=waits_for_ever, daemon=True, name="a reader").start()
    with use.spending(sys.argv[3]):
        waits_for_ever()
"""


def hang(folder, seconds, phase):
    command = [sys.executable, "-c", textwrap.dedent(HANGING), str(folder), str(seconds), phase]
    begun = time.monotonic()
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    return done, time.monotonic() - begun


def test_a_hang_ends_with_the_stacks_of_all_threads_in_the_log(tmp_path):
    done, _ = hang(tmp_path, 1, "input")
    assert done.returncode == HUNG, done.stderr
    log = (tmp_path / "logs" / "host-0.log").read_text()
    assert re.search(r"hangs: input has taken \d+ s, more than 1 s; ends with exit code 76", log)
    assert log.count("waits_for_ever") >= 2 and "thread MainThread:" in log and "thread a reader:" in log
    assert "Current thread" in done.stderr  # also by Python's own handler, which needs nothing to work


def test_what_is_no_update_has_six_times_the_limit(tmp_path):
    done, seconds = hang(tmp_path, 1, "validation")
    assert done.returncode == HUNG and seconds > 6
    assert "validation has taken" in (tmp_path / "logs" / "host-0.log").read_text()


def test_slow_updates_raise_the_limit(tmp_path):
    use = TimeUse(tmp_path, 0)
    watchdog = Watchdog(use, HostLog(tmp_path, 0), 1)
    use.phase = "step"
    assert watchdog.limit() == 60
    use._recent.extend([8.0, 9.0, 100.0])
    assert watchdog.limit() == 20 * 9
    use.phase = "saving"
    assert watchdog.limit() == 360


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data.write(tmp_path_factory.mktemp("watchdog")).folder


def processes(data, folder, workdir, python, *flags, port, steps=200):
    begun = []
    for index in range(2):
        place = [f"--coordinator_address=localhost:{port}", "--num_processes=2", f"--process_id={index}", "--initialization_timeout=120"]
        command = train_command(data, workdir, *place, *flags, python=python[index], steps=steps, eval__every=999, checkpoint__every=999)
        begun.append(
            subprocess.Popen(command, cwd=folder, env=environment(2), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        )
    return begun


@pytest.mark.slow
def test_a_stopped_process_is_seen_by_the_other(data, tmp_path):
    """SIGSTOP to one of two in the middle of a run: the other, which waits in a collective, ends itself long before heartbeats would."""
    port = 20_000 + (id(tmp_path) // 16) % 20_000
    both = processes(data, tmp_path, "run", [TRAIN, kills.at_step(5, "SIGSTOP")], "--config.hang_minutes=0.2", port=port)
    begun = time.monotonic()
    try:
        _, printed = both[0].communicate(timeout=300)
        assert both[0].returncode == HUNG, printed
        assert time.monotonic() - begun < 200
        log = (tmp_path / "run" / "logs" / "host-0.log").read_text()
        assert "hangs: step has taken" in log and "thread MainThread:" in log and "run.py" in log
    finally:
        both[1].send_signal(signal.SIGCONT)
        both[1].kill()
        both[1].communicate()


SLOW_INPUT = """
import sys, time
from f2llm_jax import main
from f2llm_jax.data.plan import Plan
step = Plan.step
def slow(self, number):
    time.sleep(1)
    return step(self, number)
Plan.step = slow
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_straggler_is_named_while_the_run_goes_and_in_its_account(data, tmp_path):
    """The second of two processes waits for its input; the first says so at update 100, and the time files tell the same."""
    port = 20_000 + (id(tmp_path) // 16) % 20_000
    both = processes(data, tmp_path, "run", [TRAIN, ("-c", SLOW_INPUT)], "--config.data.threads=1", port=port, steps=101)
    try:
        _, printed = both[0].communicate(timeout=500)
        assert both[0].returncode == 0, printed
        assert both[1].wait(timeout=60) == 0
    finally:
        for process in both:
            process.kill()
            process.communicate()
    (wait, others) = re.search(
        r"step 100: host 1 is the slowest: it waits ([\d.]+) s a step for its input, the others ([\d.]+) s", printed
    ).groups()
    assert float(wait) > 3 * float(others)
    account = read_goodput(tmp_path / "run")
    assert account.slowest_host == 1 and account.input_by_host[1] == pytest.approx(float(wait), abs=0.1)


def test_the_slowest_host_is_named_in_the_account(tmp_path):
    """Two hosts' files, of which the second waits for its input."""
    folder = tmp_path / "time"
    folder.mkdir()
    for host, wait in ((0, 0.01), (1, 0.4)):
        lines = [{"begun": 100.0, "resumed": 0, "starting": 5.0}]
        lines += [{"step": step, "at": 105.0 + step, "step_seconds": 0.5, "input": wait} for step in range(1, 11)]
        (folder / f"host-{host}.100000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_goodput(tmp_path)
    assert found.slowest_host == 1 and "slowest input: host 1, 0.400 s an update" in str(found)
    assert found.wall == 15 and found.share == pytest.approx(5 / 15)


def test_lost_updates_and_time_between_starts(tmp_path):
    """Resumed at 0, made 5 updates, killed; resumed at 3 after 20 seconds, made 2 more. The last line of the first was cut short."""
    folder = tmp_path / "time"
    folder.mkdir()
    one = [{"begun": 100.0, "resumed": 0, "starting": 4.0}]
    one += [{"step": s, "at": 104.0 + s, "step_seconds": 1.0, **({"saving": 0.5} if s == 4 else {})} for s in range(1, 6)]
    two = [{"begun": 129.0, "resumed": 3, "starting": 6.0}]
    two += [{"step": s, "at": 132.0 + s, "step_seconds": 1.0} for s in range(4, 6)]
    (folder / "host-0.100000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in one) + '{"step": 6, "at"')
    (folder / "host-0.129000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in two))
    found = read_goodput(tmp_path)
    assert found.lost_steps == 2 and found.starts == 2 and found.wall == 37
    assert found.spent == {"starting": 10, "updates": 5, "lost": 2, "saving": 0.5, "down": 20}
    assert found.share == 5 / 37 and "2 updates lost at 1 restarts" in str(found)


@pytest.mark.slow
def test_goodput_of_a_run_killed_five_times(data, tmp_path):
    """By hand, from the clock of this test and the steps at which it killed and resumed, and as the report reads it."""
    killed, steps = (4, 7, 9, 14, 18), 20
    begun, lost, before = time.time(), 0, 0
    for at in (*killed, None):
        python = TRAIN if at is None else kills.at_step(at)
        command = train_command(data, "run", python=python, steps=steps, checkpoint__every=5, eval__every=999)
        done = subprocess.run(command, cwd=tmp_path, env=environment(1, tmp_path / "compiled"), capture_output=True, text=True, timeout=300)
        assert done.returncode == (0 if at is None else -signal.SIGKILL), done.stderr
        # A save that was under way at the kill may be missing: where it resumed is what the run said.
        found = re.search(r"resumes at step (\d+)", done.stderr)
        lost += max(0, before - (int(found[1]) if found else 0))
        before = (at or 1) - 1  # killed as it is about to record `at`: the last one noted is the one before
    wall = time.time() - begun
    found = read_goodput(tmp_path / "run")
    assert found.starts == 6 and found.lost_steps == lost
    assert found.wall == pytest.approx(wall, rel=0.25)
    lines = [json.loads(line) for path in sorted(pathlib.Path(tmp_path, "run", "time").iterdir()) for line in path.read_text().splitlines()]
    counted = {line["step"]: line["step_seconds"] for line in lines if "step" in line}  # the last time that each was made
    assert sorted(counted) == list(range(1, steps + 1))
    assert found.spent["updates"] == pytest.approx(sum(counted.values()), rel=1e-6)
    assert sum(found.spent.values()) == pytest.approx(found.wall, rel=0.1)
    assert str(found).startswith(f"{found.share:.1%} of")
