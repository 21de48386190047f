"""Chains of commands: order, what is done, failures, SIGKILL; the family's chain and the ablation's; the family in small."""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import sentence_transformers
import small_data
from small_runs import environment

from f2llm_jax.chain import links, sweep
from f2llm_jax.chain.family import family_links
from f2llm_jax.chain.links import ChainError, Link
from f2llm_jax.chain.sweep import Arm, ArmScore
from f2llm_jax.configs import ablation, common, family
from f2llm_jax.model.sizes import SIZES

ROOT = pathlib.Path(__file__).parents[1]
# A command for tests: notes each start in LOG, waits while a file WAIT exists, fails while a file FAIL exists, then makes OUT.
COMMAND = """
import pathlib, sys, time
out = pathlib.Path(sys.argv[1])
with open(out.parent / "log", "a") as log:
    log.write(out.name + "\\n")
while (out.parent / "wait").exists():
    time.sleep(0.02)
if (out.parent / "fail").exists():
    sys.exit(3)
out.mkdir(exist_ok=True)
"""
# A process that runs the chain of a folder.
CHAIN = """
import sys
from f2llm_jax.chain import links
root = sys.argv[1]
links.run([links.Link(name, "small_command", (f"{root}/{name}",)) for name in "abc"], root)
"""


def chain(root, more=()):
    return [
        Link("a", "small_command", (f"{root}/a",)),
        Link("b", "small_command", (f"{root}/b", *more), ("a",), whole=False),
        Link("c", "small_command", (f"{root}/c",), ("a", "b")),
    ]


@pytest.fixture
def root(tmp_path, monkeypatch):
    (tmp_path / "small_command.py").write_text(COMMAND)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def started(root):
    return (root / "log").read_text().split() if (root / "log").exists() else []


def test_a_chain_runs_once_in_order(root, capfd):
    assert set(links.statuses(chain(root), root).values()) == {"missing"}
    links.run(chain(root), root)
    links.run(chain(root), root)
    assert started(root) == ["a", "b", "c"]
    assert set(links.statuses(chain(root), root).values()) == {"done"}
    assert "[2/3] b: python -m small_command" in capfd.readouterr().err


def test_a_failure_stops_the_chain_and_the_next_run_goes_on(root):
    links.run(chain(root)[:1], root)
    (root / "fail").touch()
    with pytest.raises(ChainError, match="b ended with exit code 3"):
        links.run(chain(root), root)
    (root / "fail").unlink()
    links.run(chain(root), root)
    assert started(root) == ["a", "b", "b", "c"]


def test_what_another_command_made_is_not_taken_for_done(root):
    links.run(chain(root), root)
    with pytest.raises(ChainError, match=r"(?s)b was made by another command.*now is: .* more"):
        links.run(chain(root, ("more",)), root)
    assert started(root) == ["a", "b", "c"]


def test_what_stands_there_already_is_used_if_it_is_whole_by_nature(root):
    for name in ("a", "b"):
        (root / name).mkdir()
    assert links.statuses(chain(root), root) == {"a": "done", "b": "begun", "c": "missing"}
    links.run(chain(root), root)
    assert started(root) == ["b", "c"]
    assert "begun" not in links.describe(chain(root), root) and "3 of 3 done" in links.describe(chain(root), root)


def test_a_killed_chain_waits_for_the_command_it_left_behind(root):
    """SIGKILL of the chain alone: its command lives on, and the next run starts nothing beside it."""
    (root / "wait").touch()
    first = subprocess.Popen([sys.executable, "-c", CHAIN, str(root)])
    while started(root) != ["a"]:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = subprocess.Popen([sys.executable, "-c", CHAIN, str(root)], stderr=subprocess.PIPE, text=True)
    assert "waiting for it" in second.stderr.readline()
    assert started(root) == ["a"]
    (root / "wait").unlink()
    assert second.wait(60) == 0
    second.stderr.close()
    assert started(root) == ["a", "b", "c"]


def test_a_bucket_is_no_place_to_run_in(root):
    with pytest.raises(ChainError, match="runs in a local folder, not in gs://bucket/runs"):
        links.run(chain(root), "gs://bucket/runs")
    assert started(root) == []


def test_an_ablation_without_data_is_refused_before_any_work(tmp_path):
    command = [sys.executable, "-m", "f2llm_jax.ablation", "--root", str(tmp_path / "runs"), f"--config.data={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "has no dataset.json" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def flags_of(link):
    return dict(part.removeprefix("--config.").split("=", 1) for part in link.arguments if part.startswith("--config."))


@pytest.mark.parametrize("arg", ["", "toy"])
def test_the_family_is_the_published_chain(arg, tmp_path):
    config = family.get_config(arg)
    made = family_links(config, tmp_path)
    names = [link.name for link in made]
    assert len(set(names)) == len(names)
    for number, link in enumerate(made):
        assert all(need in names[:number] or need not in names for need in link.needs), link.name
    by_name = {link.name: link for link in made}
    teachers = {"80m": "0.6b", "160m": "0.6b", "330m": "0.6b", "0.6b": "1.7b", "1.7b": "4b", "4b": None, "8b": None, "14b": None}
    for size, teacher in teachers.items():
        assert f"release-{size}" in by_name
        link = by_name[f"stage2-{size}"]
        flags = flags_of(link)
        assert flags.get("teacher") == (f"{tmp_path}/stage2-{teacher}" if teacher else None)
        start = f"pruned-{size}" if size in ("80m", "160m", "330m") else f"stage1-{size}"
        assert flags["init"] == f"{tmp_path}/{start}" and start in link.needs
        assert (f"stage1-{size}" in by_name) == (start == f"stage1-{size}")
        if not arg:
            assert (float(flags["optimizer.learning_rate"]), int(flags["epochs"])) == (common.LEARNING_RATE[size], common.EPOCHS[size])
            assert flags["size"] == size
    if not arg:
        assert flags_of(by_name["stage1-14b"])["init"] == "Qwen/Qwen3-14B"
    arguments = by_name["pruned-80m"].arguments
    assert arguments[arguments.index("--model") + 1] == f"{tmp_path}/stage1-0.6b"
    assert arguments[arguments.index("--target") + 1] == ("toy-80m" if arg else "80m")


def test_the_plan_is_printed_by_the_command(tmp_path):
    (tmp_path / "corpus").mkdir()
    command = [sys.executable, "-m", "f2llm_jax.family", "--config", "configs/family.py:toy", "--root", str(tmp_path), "--plan"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[:2] == ["1", "done"] and lines[2].split()[:2] == ["2", "missing"]
    assert f"needs data2, pruned-80m, stage2-0.6b; makes {tmp_path}/stage2-80m" in done.stdout
    assert lines[-1] == "1 of 27 done"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus"]


def test_arms_differ_in_start_teacher_and_seed_only(tmp_path):
    config = ablation.get_config()
    made = {link.name: link for link in sweep.sweep_links(config, tmp_path)}
    arms = sweep.arms(config)
    assert len(arms) == 12
    for arm in arms:
        flags = flags_of(made[arm.name])
        assert flags.pop("seed") == str(arm.seed)
        assert flags.pop("init", None) == (None if arm.start == "random" else f"{tmp_path}/{arm.start}")
        assert flags.pop("teacher_cache", None) == (f"{tmp_path}/{sweep.CACHE}" if arm.distilled else None)
        assert flags == {k: v for k, v in flags_of(made[arms[0].name]).items() if k not in ("seed", "init", "teacher_cache")}
    shared = {link.name for link in sweep.sweep_links(ablation.get_config("choices"), tmp_path)} & set(made)
    assert {"source", "teacher", "pruned", "pruned-distilled-0"} <= shared


def test_the_table_is_means_and_deviations_over_seeds():
    config = ablation.get_config()
    rng = np.random.default_rng(0)
    found = {arm.name: tuple(ArmScore(*rng.random(2)) for _ in range(2)) for arm in sweep.arms(config)}
    found |= {"source": (ArmScore(0.1, 3.0), ArmScore(0.5, 1.75)), "teacher": (ArmScore(0.5, 1.75), ArmScore(0.75, 1.25))}
    written = sweep.table(config, found)
    for start in ("random", "pruned"):
        for distilled in (False, True):
            values = [100 * found[Arm(start, distilled, seed).name][1].accuracy for seed in (0, 1, 2)]
            assert f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" in written
    assert "source: 50.00, teacher: 75.00" in written and "source: 1.75, teacher: 1.25" in written
    assert sweep.picture(config, found).startswith(b"\x89PNG")


def run_family(root, raw, *flags, **options):
    command = [sys.executable, "-m", "f2llm_jax.family", "--config", "configs/family.py:toy", "--root", str(root), "--run", *flags]
    overrides = [f"--config.raw={raw / 'raw'}", f"--config.tokenizer={raw / 'tokenizer'}"]
    return subprocess.Popen([*command, *overrides], cwd=ROOT, env=environment(1, root / "compiled"), text=True, **options)


@pytest.mark.slow
def test_the_family_in_small_survives_sigkill_and_loads(tmp_path, small_dataset):
    """All of it from one command, killed with its children as stage 2 of 0.6b writes metrics; then eight releases of eight widths."""
    small = small_dataset.folder.parent
    root = tmp_path / "family"
    root.mkdir()
    first = run_family(root, small, start_new_session=True)
    while not (root / "stage2-0.6b" / "metrics.jsonl").exists():
        assert first.poll() is None
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert (root / "stage2-1.7b").exists() and not (root / "stage2-330m").exists()
    before = json.loads((root / "chain.json").read_text())
    second = run_family(root, small, stderr=subprocess.PIPE)
    said = second.communicate(timeout=1800)[1]
    assert second.returncode == 0, said
    after = json.loads((root / "chain.json").read_text())
    assert before.keys() <= after.keys() and {name for name in before if after[name] != before[name]} == {"checksum"}
    assert "stage1-14b: python" not in said
    for size in common.LEARNING_RATE:
        model = sentence_transformers.SentenceTransformer(str(root / f"release-{size}"), device="cpu")
        shape = SIZES[f"toy-{size}"]
        assert model.encode(["the cat"]).shape == (1, shape.hidden_size)
        config = json.loads((root / f"release-{size}" / "config.json").read_text())
        assert (config["num_hidden_layers"], config["intermediate_size"]) == (shape.num_hidden_layers, shape.intermediate_size)
        steps = [json.loads(line)["step"] for line in (root / f"stage2-{size}" / "metrics.jsonl").read_text().splitlines()]
        assert steps[-1] == family.TOY_STEPS


@pytest.mark.slow
def test_a_sweep_in_small_ends_in_a_table(tmp_path, small_dataset):
    overrides = {
        "data": small_dataset.folder,
        "source_steps": 30,
        "teacher_steps": 10,
        "steps": 5,
        "calibration_rows": 32,
        "max_length": small_data.MAX_LENGTH,
    }
    flags = [f"--config.{name}={value}" for name, value in overrides.items()]
    training = ("--config.batch.size=24", "--config.batch.microbatch_rows=16", "--config.optimizer.warmup_steps=2")
    flags += ["--config.seeds=(0,)", f"--config.train_flags={training}"]
    command = [sys.executable, "-m", "f2llm_jax.ablation", "--root", str(tmp_path / "runs"), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr + shlex.join(command)
    table = (tmp_path / "runs" / "starts.md").read_text()
    assert done.stdout.strip().endswith(table.strip()) and table.count("| pruned |") == 2 and (tmp_path / "runs" / "starts.png").exists()
    said = done.stdout.strip().removesuffix(table.strip()).splitlines()  # by the commands it runs
    assert [line.split()[0] for line in said] == ["cached", "pruned"]
