"""The launch scripts issue exactly the commands that launch/README.md shows; training is started again as it says. No cloud is asked."""

import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from f2llm_jax.configs import stage1

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
README = (LAUNCH / "README.md").read_text(encoding="utf-8")
SCRIPTS = sorted(LAUNCH.rglob("*.sh"))
EXAMPLES = [block.split("\n")[:-1] for block in re.findall(r"```console\n\$ (.*?)```", README, re.DOTALL)]
# Notes what it was called with; asked for the state of a slice, it says the next of `STATES`.
RECORDER = """#!/usr/bin/env bash
{ printf '%s\\0' "$(basename "$0")" "$@"; printf '\\n'; } >>"$RECORD"
[[ "$(basename "$0")" != kubectl ]] || cat >>"$RECORD.stdin"
if [[ "$*" == *"queued-resources list"* ]]; then
  head -n 1 "$STATES"
  sed -i 1d "$STATES"
fi
"""


def settings_of(script):
    """The variables that the README exports in the section about a script."""
    section = next(part for part in README.split("\n## ") if f"$ {script}" in part)
    exports = [shlex.split(line)[1:] for line in section.splitlines() if line.startswith("    export ")]
    return dict(word.split("=", 1) for words in exports for word in words)


class Run:
    """A script's run: exit code, output, and the commands that it issued."""

    def __init__(self, folder, command, states=(), **environment):
        (folder / "bin").mkdir(exist_ok=True)
        for name in ("gcloud", "kubectl", "xpk", "docker", "git"):
            (folder / "bin" / name).write_text(RECORDER)
            (folder / "bin" / name).chmod(0o755)
        (folder / "states").write_text("".join(f"{state}\n" for state in states))
        record = folder / "record"
        record.unlink(missing_ok=True)
        settings = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")} | environment
        settings |= {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "RECORD": str(record), "STATES": str(folder / "states")}
        words = [str(ROOT / command[0]), *command[1:]]
        done = subprocess.run(words, cwd=folder, env=settings, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr
        lines = record.read_text().split("\0\n")[:-1] if record.exists() else []
        self.commands = [line.split("\0") for line in lines if not line.startswith("git\0diff\0")]
        self.stdin = (folder / "record.stdin").read_text() if (folder / "record.stdin").exists() else ""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck_finds_nothing(script):
    command = [pathlib.Path(sys.executable).parent / "shellcheck", "--external-sources", script.relative_to(ROOT)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_every_subcommand_stands_in_the_readme():
    shown = {tuple(example[0].split()[:2]) for example in EXAMPLES}
    for script in ("launch/tpu_vm.sh", "launch/gke/gke.sh"):
        head = (ROOT / script).read_text().partition("\nset -euo")[0]
        subcommands = re.findall(r"^#   ([a-z-]+)[A-Z_. \[\]]*  +\S", head, re.MULTILINE)
        assert len(subcommands) >= 6
        assert {(script, name) for name in subcommands} - {("launch/gke/gke.sh", "manifest")} <= shown


@pytest.mark.parametrize("example", [e for e in EXAMPLES if "local.sh" not in e[0]], ids=lambda example: " ".join(example[0].split()[:2]))
def test_commands_are_the_documented_ones(example, tmp_path):
    shown, *expected = map(shlex.split, example)
    environment = settings_of(shown[0])
    states = ["", "ACTIVE"] if "create" in shown else ["ACTIVE"]
    run = Run(tmp_path, shown, states, **environment)
    assert run.code == 0, run.err
    assert run.commands == expected
    dry = Run(tmp_path, [shown[0], "--dry-run", *shown[1:]], **environment)
    assert dry.code == 0 and dry.commands == []
    assert [shlex.split(line) for line in dry.out.splitlines()] == expected


def vm(folder, *arguments, states, **more):
    return Run(folder, ["launch/tpu_vm.sh", *arguments], states, **settings_of("launch/tpu_vm.sh"), POLL_SECONDS="0", **more)


def verbs(run):
    return [command[4] for command in run.commands if command[:4] == ["gcloud", "compute", "tpus", "queued-resources"]]


def test_create_goes_on_waiting_and_asks_anew_for_what_was_taken(tmp_path):
    waited = vm(tmp_path, "create", states=["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    assert waited.code == 0 and verbs(waited) == ["list"] * 4
    there = vm(tmp_path, "create", states=["ACTIVE", "ACTIVE"])
    assert there.code == 0 and verbs(there) == ["list"] * 2
    taken = vm(tmp_path, "create", states=["SUSPENDED", "SUSPENDED", "WAITING_FOR_RESOURCES", "ACTIVE"])
    assert taken.code == 0 and verbs(taken) == ["list", "list", "delete", "create", "list", "list"]
    refused = vm(tmp_path, "create", states=["", "FAILED"])
    assert refused.code == 2 and "the request is FAILED" in refused.err and verbs(refused) == ["list", "create", "list"]


def test_deleting_what_is_gone_and_missing_settings(tmp_path):
    gone = vm(tmp_path, "delete", states=[""])
    assert gone.code == 0 and verbs(gone) == ["list"] and "there is no f2llm" in gone.out
    slices = vm(tmp_path, "create", states=["", "ACTIVE"], SLICES="2")
    assert "--node-count=2" in slices.commands[1] and not any("--node-id" in word for word in slices.commands[1])
    for words, expected in (
        (["launch/tpu_vm.sh", "create"], "set TPU_NAME"),
        (["launch/gke/gke.sh", "apply", "--config=x"], "set NAME"),
        (["launch/gke/gke.sh", "xpk", "--config=x"], "set NAME"),
        (["launch/tpu_vm.sh"], "set TPU_NAME"),
        (["launch/gke/gke.sh", "begin"], "unknown subcommand 'begin'"),
    ):
        run = Run(tmp_path, words)
        assert run.code == 2 and expected in run.err and run.commands == []


def jobset(folder, *flags, **more):
    run = Run(folder, ["launch/gke/gke.sh", "manifest", *flags], **settings_of("launch/gke/gke.sh"), **more)
    assert run.code == 0, run.err
    return run.out


@pytest.mark.parametrize("spot", ["no", "yes"])
def test_the_jobset_is_of_the_published_schema(tmp_path, spot):
    """Strict types by the published classes, which drop what they do not know: so nothing may be lost."""
    given = yaml.safe_load(jobset(tmp_path, "--config=configs/stage1.py:size=14b", SPOT=spot))
    assert JobsetV1alpha2JobSet.from_dict(given).to_dict() == given
    for path, wrong in ((("spec", "failurePolicy", "maxRestarts"), "20"), (("spec", "replicatedJobs", 0, "replica"), 2)):
        broken = yaml.safe_load(yaml.safe_dump(given))
        inner = broken
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = wrong
        with pytest.raises((ValueError, AssertionError)):
            assert JobsetV1alpha2JobSet.from_dict(broken).to_dict() == broken


DEVICES = {"launch/tpu_vm.sh run": 64, "launch/gke/gke.sh apply": 256, "launch/gke/gke.sh xpk": 256}


@pytest.mark.parametrize(("script", "devices"), DEVICES.items())
def test_what_is_shown_fits_the_slices_that_are_shown(script, devices):
    """A v5p-128 has 64 devices, two slices of tpu7x-128 have 256."""
    (command,) = (example[0] for example in EXAMPLES if example[0].startswith(script + " "))
    flags = dict(word.removeprefix("--config").split("=", 1) for word in shlex.split(command)[2:])
    config = stage1.get_config(flags.pop("").partition(":")[2])
    for name, value in flags.items():
        config.update_from_flattened_dict({name[1:]: int(value) if value.isdigit() else value})
    assert (config.mesh.data, config.mesh.tensor) == (-1, 1) and devices % config.mesh.fsdp == 0
    assert config.batch.microbatch_rows % devices == 0


def test_the_jobset_says_what_it_should(tmp_path):
    words = ["--config=configs/stage1.py:size=14b", '--config.init=a "b" \\c & *']
    given = yaml.safe_load(jobset(tmp_path, *words, SPOT="yes"))
    (slices,) = given["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert (slices["replicas"], job["parallelism"], job["completions"], job["backoffLimit"]) == (2, 16, 16, 0)
    assert container["command"] == ["python", "-m", "f2llm_jax.main", "--workdir=gs://my-bucket/stage1", *words]
    assert container["resources"] == {"limits": {"google.com/tpu": "4"}}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu7x",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["restartPolicy"] == "Never"  # Kubernetes heeds a podFailurePolicy with no other
    (saved, taken) = job["podFailurePolicy"]["rules"]
    assert saved["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [75]}
    assert taken["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    (rule,) = given["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])
    applied = Run(tmp_path, ["launch/gke/gke.sh", "apply", *words], **settings_of("launch/gke/gke.sh"), SPOT="yes")
    assert yaml.safe_load(applied.stdin) == given
    local = Run(tmp_path, ["launch/gke/gke.sh", "manifest", "--config=x"], **settings_of("launch/gke/gke.sh") | {"WORKDIR": "here"})
    assert local.code == 2 and "must be gs://" in local.err


# Stands in for training: ends as the next line of `plan` says (exit code, then a checkpoint to leave), and notes each start.
TRAINING = """#!/usr/bin/env bash
read -r code step <plan || exit 99
sed -i 1d plan
echo "$code" >>starts
[[ -z "$step" ]] || mkdir -p "run/checkpoints/$step"
if [[ "$code" == wait ]]; then
  trap 'exit 75' TERM
  touch waiting
  while :; do sleep 0.05; done
fi
exit "$code"
"""


def keep_running(folder, plan, **more):
    (folder / "plan").write_text("".join(f"{line}\n" for line in plan))
    (folder / "starts").write_text("")
    (folder / "training").write_text(TRAINING)
    (folder / "training").chmod(0o755)
    environment = os.environ | {"XDG_RUNTIME_DIR": str(folder), "RESTART_SECONDS": "0", "MAX_CRASHES": "3"} | more
    command = [LAUNCH / "keep_running.sh", "run", "./training"]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("plan", "code", "starts"),
    [
        (["0"], 0, 1),
        (["75 10", "137", "134 20", "1", "1", "75 30", "1", "1", "0 40"], 0, 9),  # never three crashes in a row without a checkpoint
        (["1", "1", "7"], 7, 3),
        (["9 100", "9 20", "9 100", "6"], 6, 4),  # only a newer checkpoint is progress
    ],
)
def test_training_is_started_again_while_it_gets_on(tmp_path, plan, code, starts):
    process = keep_running(tmp_path, plan)
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == code, printed
    assert len((tmp_path / "starts").read_text().split()) == starts
    assert ("gives up" in printed) == (code != 0)


@pytest.mark.parametrize(("healthy", "code", "starts"), [("0", 0, 7), ("300", 134, 3)])
def test_lost_hosts_end_no_healthy_run(tmp_path, healthy, code, starts):
    """Five hosts lost or hanging between two checkpoints, after a while or at once."""
    process = keep_running(tmp_path, ["134", "76", "134", "134", "76", "134", "0"], HEALTHY_SECONDS=healthy)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert len((tmp_path / "starts").read_text().split()) == starts


def test_the_options_of_a_slice(tmp_path):
    """Maintenance announced by SIGTERM, and a disk with the data."""
    settings = settings_of("launch/tpu_vm.sh")
    run = Run(tmp_path, ["launch/tpu_vm.sh", "create"], ["", "ACTIVE"], **settings, AUTOCHECKPOINT="yes", DATA_DISK="corpus")
    disk = f"--data-disk=source=projects/{settings['PROJECT']}/zones/{settings['ZONE']}/disks/corpus,mode=read-only"
    assert run.code == 0 and run.commands[1][-2:] == ["--autocheckpoint-enabled", disk]


def test_sigterm_goes_to_training_and_a_second_loop_leaves_it_alone(tmp_path):
    process = keep_running(tmp_path, ["wait"])
    while not (tmp_path / "waiting").exists():
        time.sleep(0.05)
    second = subprocess.run(
        [LAUNCH / "keep_running.sh", "run", "false"],
        cwd=tmp_path,
        env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert second.returncode == 0 and "already runs" in second.stderr
    (noted,) = tmp_path.glob("f2llm_jax/*.lock")
    assert int(noted.read_text()) == process.pid
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and "stopped on request" in printed
    assert noted.read_text() == ""  # nobody's process id is left for `tpu_vm.sh stop`
    assert (tmp_path / "starts").read_text().split() == ["wait"]


# Stands in for Python: prints what it was called with and ends with the code of its number.
PYTHON = """#!/usr/bin/env bash
echo "$JAX_PLATFORMS $JAX_NUM_CPU_DEVICES $*"
[[ "$*" =~ process_id=([0-9]+) ]]
codes=($CODES)
exit "${codes[${BASH_REMATCH[1]}]}"
"""


@pytest.mark.parametrize(("codes", "code"), [("0 0", 0), ("75 75", 75), ("75 0", 75), ("75 1", 1), ("134 1", 134)])
def test_a_local_run_of_several(tmp_path, codes, code):
    shown, *expected = map(shlex.split, next(example for example in EXAMPLES if "local.sh" in example[0]))
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    run = Run(tmp_path, shown, PYTHON=str(tmp_path / "python"), CODES=codes)
    assert run.code == code
    dry = Run(tmp_path, [shown[0], "--dry-run", *shown[1:]])
    assert [shlex.split(line) for line in dry.out.splitlines()] == expected
    for index, words in enumerate(expected):
        assert f"[{index}] cpu 4 {' '.join(words[4:])}" in run.out.splitlines()
