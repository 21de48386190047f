"""Several processes as one run: the startup check, the same losses, a stop of all at one step. Processes are real, joined by gloo."""

import contextlib
import json
import shutil
import socket
import subprocess
import threading
import time

import kills
import pytest
from etils import epath
from small_runs import ROOT, TRAIN, environment, losses, train_command

import f2llm_jax
from f2llm_jax.configs import stage2
from f2llm_jax.errors import DivergedError, Preempted, UserError
from f2llm_jax.storage.locks import LockedError
from f2llm_jax.training import hosts
from f2llm_jax.training.host_log import HostLog
from f2llm_jax.training.resuming import AS_IT_WAS
from f2llm_jax.training.startup_check import Processes, StartupError, startup_check
from f2llm_jax.weights.checkpoint_reader import find_checkpoint

SETTINGS = {"f2llm_jax": "1.0 with sources abc", "--config.batch.size": "24"}


def free_port():
    """A port that is free, as is the one below it."""
    while True:
        with contextlib.suppress(OSError), socket.create_server(("", 0)) as probe:
            port = probe.getsockname()[1]
            with socket.create_server(("", port - 1)):
                return port


@contextlib.contextmanager
def calling(count, limit, facts, names=()):
    """Checks `count` processes in a thread each, those that have settings; yields their outcomes, then waits for all."""
    processes, outcomes = Processes("localhost", free_port(), count, names), {}

    def call(index):
        begun = time.monotonic()
        try:
            startup_check(processes, index, facts[index], limit)
            problem = ""
        except StartupError as error:
            problem = str(error)
        outcomes[index] = problem, time.monotonic() - begun

    threads = {index: threading.Thread(target=call, args=[index], daemon=True) for index in facts}
    yield processes, outcomes, threads
    for thread in threads.values():
        thread.join(timeout=limit + 10)


def call_all(count, limit, facts, names=()):
    with calling(count, limit, facts, names) as (_, outcomes, threads):
        for index in reversed(threads):  # process 0 last: the others try until it listens
            threads[index].start()
            time.sleep(0.3)
    assert outcomes.keys() == facts.keys()
    return {index: problem for index, (problem, _) in outcomes.items()}


def test_all_there_and_alike():
    assert set(call_all(5, 20, dict.fromkeys(range(5), SETTINGS)).values()) == {""}


def test_the_missing_are_named_by_all_who_came_within_the_limit():
    present = dict.fromkeys((0, 1, 3), SETTINGS)
    with calling(5, 3, present, names=[f"pod-{i}" for i in range(5)]) as (_, outcomes, threads):
        threads[3].start()
        time.sleep(1)  # the limit counts from the first to start
        threads[0].start()
        threads[1].start()
    assert {problem for problem, _ in outcomes.values()} == {outcomes[0][0]}
    assert "process 2 (pod-2), process 4 (pod-4) of 5 did not answer" in outcomes[0][0]
    assert all(f"process {i} ({socket.gethostname()})" in outcomes[0][0] for i in present)
    assert outcomes[3][1] < 3.5 and outcomes[0][1] < 2.8


def test_process_0_missing():
    (problem,) = call_all(2, 1, {1: SETTINGS}).values()
    assert "process 0 of 2 did not answer at localhost:" in problem and "within 1 s" in problem


def test_who_differs_is_named_with_what_differs():
    other, older = SETTINGS | {"--config.batch.size": "32"}, SETTINGS | {"f2llm_jax": "1.0 with sources def"}
    problems = call_all(5, 20, {0: SETTINGS, 1: SETTINGS, 2: other, 3: SETTINGS, 4: older})
    here = socket.gethostname()
    assert len(set(problems.values())) == 1
    assert f"process 2 ({here}) differs from process 0 ({here}): --config.batch.size is 32, not 24" in problems[0]
    assert f"process 4 ({here}) differs from process 0 ({here}): f2llm_jax is 1.0 with sources def, not" in problems[0]
    odd_one = call_all(3, 20, {0: other, 1: SETTINGS, 2: SETTINGS})[2]  # the many are right
    assert "process 0" in odd_one.split(" differs from ")[0] and "process 1" not in odd_one.split(" differs from ")[0]


def test_another_number_of_processes_and_one_number_twice():
    processes = Processes("localhost", free_port(), 2)
    problems = []

    def call(index, count):
        with pytest.raises(StartupError) as caught:
            startup_check(Processes(processes.host, processes.port, count), index, SETTINGS, 20)
        problems.append(str(caught.value))

    for pair, expected in (([(0, 2), (3, 4)], "number of processes is 4, not 2"), ([(0, 3), (1, 3), (1, 3)], "claim the same number")):
        threads = [threading.Thread(target=call, args=each) for each in pair]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        assert len(problems) == len(pair) and all(expected in problem for problem in problems), problems
        problems.clear()


@pytest.mark.parametrize("failing", [0, 2])
def test_all_learn_why_one_cannot_start(failing, tmp_path, capsys):
    """Before the hosts have joined, whichever of them it is; its own error stays the one that it raises."""
    port, problems = free_port(), {}

    def start(index):
        place = hosts.Place(f"localhost:{port}", 3, index)
        try:
            with hosts.Joining(place, {"--workdir": str(tmp_path)}, 30) as joining:
                if index == failing:
                    raise LockedError("the workdir is written by pid 7")
                joining.join()
        except UserError as error:
            problems[index] = error

    threads = [threading.Thread(target=start, args=[index], daemon=True) for index in range(3)]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=40)
    assert time.monotonic() - begun < 25 and problems.keys() == {0, 1, 2}
    assert isinstance(problems.pop(failing), LockedError)
    why = f"process {failing} ({socket.gethostname()}) cannot start: the workdir is written by pid 7"
    assert [str(problem) for problem in problems.values()] == [f"startup check: {why}"] * 2
    assert "cannot start: the workdir is written by pid 7" in capsys.readouterr().err


def test_who_starts_over_is_taken_and_strangers_are_not():
    with calling(3, 20, dict.fromkeys(range(3), SETTINGS)) as (processes, outcomes, threads):
        threads[0].start()
        for line in (b"GET / HTTP/1.1\r\n\r\n", b"", b'{"index": 1}\n'):
            while True:
                with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("localhost", processes.port)) as stranger:
                    stranger.sendall(line)
                    break
        killed = {"token": "", "index": 1, "host": "killed", "settings": {"number of processes": "3"}, "left": 20}
        with socket.create_connection(("localhost", processes.port)) as connection:
            connection.sendall(json.dumps(killed).encode() + b"\n")
            time.sleep(0.5)
        threads[1].start()
        threads[2].start()
    assert {problem for problem, _ in outcomes.values()} == {""}


def attack_lines():
    good = {"token": "", "index": 1, "host": "h", "settings": {"number of processes": "2"}, "left": 20}
    yield from (good | {"token": token} for token in ("x", None, 3, ["a"]))
    yield from (good | {"index": index} for index in (-1, True, "1", 1.5, None, [1], 2**40))
    yield from (good | {"host": host} for host in (None, 3, ["h"]))
    yield from (good | {"settings": settings} for settings in (None, [], "x", {"a": 1}, {"a": ["b"]}))
    yield from (good | {"left": left} for left in (None, "1", float("nan"), float("inf"), -1, True))
    yield from ([], "x", 1, None)


def reach(processes):
    """A connection to process 0, once it listens."""
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(("localhost", processes.port))


def drip(connection):
    with contextlib.suppress(OSError):
        while True:
            connection.sendall(b"a")
            time.sleep(0.1)


def test_lines_of_strangers_change_nothing():
    """Wrong tokens and types, deep JSON, endless lines, silence, a byte now and then: the check ends well, and in time."""
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        processes, outcomes, threads = stack.enter_context(calling(2, 20, dict.fromkeys(range(2), SETTINGS)))
        threads[0].start()
        silent = [stack.enter_context(reach(processes)) for _ in range(20)]
        threading.Thread(target=drip, args=[silent[0]], daemon=True).start()
        broken = (b"[" * 2**19, b'{"a":' * 2**17, b"\xff\xfe", b"", b"x" * 2**21)
        for line in (*(json.dumps(content).encode() for content in attack_lines()), *broken):
            connection = stack.enter_context(reach(processes))
            with contextlib.suppress(OSError):
                connection.sendall(line + b"\n")
        threads[1].start()
        threads[1].join(timeout=30)
    assert {problem for problem, _ in outcomes.values()} == {""}
    assert time.monotonic() - begun < 15


def test_dripping_and_silent_strangers_do_not_move_the_deadline():
    with contextlib.ExitStack() as stack:
        processes, outcomes, threads = stack.enter_context(calling(2, 3, {0: SETTINGS}))
        threads[0].start()
        strangers = [stack.enter_context(reach(processes)) for _ in range(6)]
        threading.Thread(target=drip, args=[strangers[0]], daemon=True).start()
        threads[0].join(timeout=30)
    problem, seconds = outcomes[0]
    assert "process 1 of 2 did not answer" in problem and seconds < 5


def test_places(monkeypatch):
    assert hosts.find_place(None, None, None, 1) == hosts.ALONE
    assert hosts.find_place("a:1234", 3, 2, 1) == hosts.Place("a:1234", 3, 2)
    for given, expected in (
        (("a:1234", 3, None), "--process_id missing"),
        ((None, 3, 1), "--coordinator_address missing"),
        (("a:1234", 3, 3), "one of 0 to 2"),
        (("a", 3, 1), "must be host:port"),
    ):
        with pytest.raises(hosts.HostsError, match=expected):
            hosts.find_place(*given, 1)
    slurm = {"JOB_ID": "4095", "STEP_NODELIST": "node[007-009]", "NTASKS": "3", "PROCID": "2", "LOCALID": "0", "STEP_NUM_NODES": "3"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert hosts.find_place(None, None, None, 1) == hosts.Place("node007:65535", 3, 2)  # whose next port there is none


def test_facts_tell_code_and_every_field(monkeypatch, tmp_path):
    config = stage2.get_config("runlocal")
    facts = hosts.settings_of(config, tmp_path, AS_IT_WAS)
    assert facts["--config.batch.negatives.clustering"] == "3" and facts["--workdir"] == str(tmp_path)
    with config.unlocked():
        config.batch.negatives.clustering = 4
    shutil.copytree(ROOT / "f2llm_jax", tmp_path / "copy")
    with (tmp_path / "copy" / "data" / "plan.py").open("a") as file:
        file.write("\n")
    monkeypatch.setattr(f2llm_jax, "__file__", str(tmp_path / "copy" / "__init__.py"))
    changed = hosts.settings_of(config, tmp_path, AS_IT_WAS)
    assert {name for name in facts if facts[name] != changed[name]} == {"--config.batch.negatives.clustering", "f2llm_jax"}


def test_every_end_is_logged_and_a_refused_run_leaves_nothing(tmp_path):
    workdir = epath.Path(tmp_path / "run")
    with pytest.raises(ValueError, match="refused"), HostLog(workdir, 3) as log:
        log.say("started")
        raise ValueError("refused")
    assert not workdir.exists()
    with HostLog(workdir, 3) as log:
        log.say("started")
        workdir.mkdir()
        log.say("resumes at step 7")
        assert "resumes" in (workdir / "logs" / "host-3.log").read_text()  # though it may be killed next
    for error in (Preempted("stopped after update 8"), DivergedError("update 9")):
        with pytest.raises(type(error)), HostLog(workdir, 3):
            raise error
    lines = (workdir / "logs" / "host-3.log").read_text().splitlines()
    assert [line.partition("+00:00 ")[2] for line in lines[:5]] == [
        "started",
        "resumes at step 7",
        "done",
        "stopped after update 8",
        "ended by DivergedError: update 9",
    ]
    with pytest.raises(ZeroDivisionError), HostLog(workdir, 3):
        raise ZeroDivisionError("a bug")
    lines = (workdir / "logs" / "host-3.log").read_text().splitlines()
    assert lines[6].startswith("Traceback") and lines[-1].endswith("ZeroDivisionError: a bug")


def start(folder, data, workdir, *flags, devices=1, python=TRAIN, root=ROOT):
    """A run in a process of its own, begun only."""
    command, runs_in = train_command(data, workdir, *flags, python=python), environment(devices, PYTHONPATH=str(root))
    return subprocess.Popen(command, cwd=folder, env=runs_in, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def place(port, count, index, limit=60):
    flags = {"coordinator_address": f"localhost:{port}", "num_processes": count, "process_id": index, "initialization_timeout": limit}
    return [f"--{name}={value}" for name, value in flags.items()]


def end(*processes, timeout=400):
    """Waits; the exit codes and what each printed on stderr."""
    try:
        printed = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], printed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hosts")


@pytest.fixture(scope="module")
def data(small_dataset):
    return small_dataset.folder


def test_a_process_alone_says_who_is_missing(folder, tmp_path):
    begun = [start(folder, "absent", tmp_path / "run", *place(free_port(), 2, index, limit=3)) for index in (0, 1)]
    codes, printed = end(*begun, timeout=60)
    assert codes == [1, 1]
    for index in (0, 1):
        assert f"main: error: startup check: process {1 - index} of 2 did not answer" in printed[index], printed[index]
        assert "within 3 s" in printed[index] and "Traceback" not in printed[index]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_other_code_or_another_configuration_is_refused_by_all(folder, tmp_path):
    for package in ("f2llm_jax", "configs"):
        shutil.copytree(ROOT / package, tmp_path / "older" / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "older" / "f2llm_jax" / "text.py").open("a") as file:
        file.write("# of yesterday\n")
    port = free_port()
    begun = [
        start(folder, "absent", tmp_path / "run", *place(port, 3, 0)),
        start(folder, "absent", tmp_path / "run", *place(port, 3, 1), root=tmp_path / "older"),
        start(folder, "absent", tmp_path / "run", *place(port, 3, 2), "--config.seed=7"),
    ]
    codes, printed = end(*begun, timeout=90)
    assert codes == [1, 1, 1]
    for text in printed:
        assert "process 2" in text and "--config.seed is 7, not 0" in text, text
        assert "process 1" in text and "f2llm_jax is " in text and "Traceback" not in text


# A soft softmax: the small corpus is learned so fast that by the published temperature some losses are 0.000003, all rounding.
FLAT = [
    "--config.steps=20",
    "--config.eval.every=99",
    "--config.checkpoint.every=99",
    "--config.objective.temperature=0.5",
    "--config.optimizer.learning_rate=1e-3",
]
LAYOUTS = {  # name: processes, devices of each, mesh flags
    "1": (1, 1, []),
    "8 as fsdp": (1, 8, []),
    "8 as data, fsdp, tensor": (1, 8, ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]),
    "two processes of 4": (2, 4, []),
    "two processes of 4 as data, fsdp, tensor": (2, 4, ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]),
}


def train_together(folder, data, workdir, count, devices, *flags, python=None):
    """A run of `count` processes to its end; `python` by process, where it is not the plain command. Exit codes and outputs."""
    port, python = free_port(), python or {}
    where = {index: place(port, count, index, limit=120) if count > 1 else [] for index in range(count)}
    begun = [start(folder, data, workdir, *where[i], *flags, devices=devices, python=python.get(i, TRAIN)) for i in range(count)]
    return end(*begun)


@pytest.mark.slow
@pytest.mark.parametrize("taught", [False, True])
def test_every_layout_of_devices_and_processes_gives_the_same_losses(folder, data, taught):
    flags = list(FLAT)
    if taught:
        codes, printed = train_together(folder, data, "teacher", 1, 1, *FLAT, "--config.seed=5", "--config.steps=6")
        assert codes == [0], printed
        flags.append(f"--config.teacher={folder / 'teacher'}")
    found = {}
    for name, (count, devices, mesh) in LAYOUTS.items():
        workdir = folder / f"{name}, {'taught' if taught else 'alone'}"
        codes, printed = train_together(folder, data, workdir, count, devices, *flags, *mesh)
        assert codes == [0] * count, printed
        assert sorted(path.name for path in (workdir / "logs").iterdir()) == [f"host-{i}.log" for i in range(count)]
        found[name] = losses(workdir)
    for name, values in found.items():
        assert list(values) == list(range(1, 21)), name
        worst = max(abs(values[step] / found["1"][step] - 1) for step in values)
        print(f"{name}: {worst:.1e}")  # shown by pytest -s; noted in docs/log.md
        assert worst < 1e-5, name


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_both_go_on(folder, data):
    """JAX's heartbeats, or a collective that fails, end the one that is left; it does not say that all is well."""
    flags = [*FLAT, "--config.checkpoint.every=5"]
    begun = time.monotonic()
    codes, printed = train_together(folder, data, "one_killed", 2, 4, *flags, python={1: kills.at_step(13)})
    print(f"exit codes {codes} after {time.monotonic() - begun:.0f} s")
    assert codes[1] == -9 and codes[0] not in (0, 75), printed
    assert 5 <= find_checkpoint(folder / "one_killed").step <= 12
    codes, printed = train_together(folder, data, "one_killed", 2, 4, *flags)
    assert codes == [0, 0], printed
    codes, printed = train_together(folder, data, "none_killed", 2, 4, *flags)
    assert codes == [0, 0], printed
    assert (folder / "one_killed" / "metrics.jsonl").read_bytes() == (folder / "none_killed" / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_sigterm_to_one_of_two_stops_both_at_one_step(folder, data):
    """And the run goes on with one process and two devices as if it had never been two."""
    flags, at = [*FLAT, "--config.steps=24"], 11
    codes, printed = train_together(folder, data, "as_one", 1, 2, *flags)
    assert codes == [0], printed
    codes, printed = train_together(folder, data, "stopped", 2, 4, *flags, python={1: kills.at_step(at, "SIGTERM")})
    assert codes == [75, 75], printed
    step = find_checkpoint(folder / "stopped").step
    assert at <= step <= 14
    logs = [(folder / "stopped" / "logs" / f"host-{i}.log").read_text() for i in (0, 1)]
    for text in (*printed, *logs):
        assert f"stopped on request after update {step} of 24, which is saved" in text, text
    codes, printed = train_together(folder, data, "stopped", 1, 2, *flags)
    assert codes == [0] and f"resumes at step {step}" in printed[0], printed
    got, want = losses(folder / "stopped"), losses(folder / "as_one")
    worst = max(abs(got[s] / want[s] - 1) for s in range(step + 1, step + 11))
    print(f"stopped at {step}, the next ten: {worst:.1e}")
    assert worst < 1e-5
