"""Whole runs by the real command: they learn, survive SIGKILL to the bit, move to other devices, and refuse what does not fit."""

import json
import shutil
import subprocess

import kills
import numpy as np
import pytest
import small_data
from small_runs import OVERRIDES, STEPS, TRAIN, assert_same_weights, environment, losses, metrics, train_command

from f2llm_jax.configs import stage2
from f2llm_jax.errors import UserError
from f2llm_jax.storage import files
from f2llm_jax.training.provenance import ResumeError
from f2llm_jax.training.resuming import AS_IT_WAS, Resume
from f2llm_jax.training.run import run
from f2llm_jax.training.start import StartError
from f2llm_jax.weights.checkpoint_reader import find_checkpoint

SAVED = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def data(small_dataset):
    return small_dataset.folder


def train(folder, data, workdir, *flags, devices=1, python=TRAIN):
    """A run in a process of its own; `workdir` is relative to `folder`."""
    command = train_command(data, workdir, *flags, python=python)
    runs_in = environment(devices, folder / "compiled")
    return subprocess.run(command, cwd=folder, env=runs_in, capture_output=True, text=True, timeout=300)


def forget_after(workdir, step):
    """Makes a run look as if its last checkpoint was that of `step`."""
    for checkpoint in (workdir / "checkpoints").iterdir():
        if checkpoint.name.isdigit() and int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)


@pytest.fixture(scope="module")
def undisturbed(folder, data):
    done = train(folder, data, "undisturbed")
    assert done.returncode == 0, done.stderr
    return folder / "undisturbed"


@pytest.fixture
def in_process():
    """`run` here, on this process's eight devices, with `OVERRIDES` and more."""

    def call(data, workdir, resume=AS_IT_WAS, **more):
        config = stage2.get_config("runlocal")
        config.update_from_flattened_dict({**OVERRIDES, "data.folder": str(data), **more})
        run(config, workdir, resume=resume)

    return call


def test_a_run_learns_every_task_kind(folder, data):
    """With a seed whose draw of weights learns the hardest kind, of two held-out rows, well within so few steps."""
    done = train(folder, data, "learned", "--config.seed=2")
    assert done.returncode == 0, done.stderr
    validation = {line["step"]: line for line in metrics(folder / "learned") if "validation/loss" in line}
    names = {
        "validation/loss",
        *(f"validation/kind/{k}" for k in small_data.KINDS.values()),
        *(f"validation/source/{s}" for s in small_data.KINDS),
    }
    for name in names:
        assert validation[STEPS][name] < 0.8 * validation[0][name], name


def test_a_run_writes_down_what_it_did(undisturbed):
    lines = metrics(undisturbed)
    assert sorted(losses(undisturbed)) == list(range(1, STEPS + 1))
    validation = {line["step"]: line for line in lines if "validation/loss" in line}
    assert list(validation) == [0, 15, 30]
    np.testing.assert_allclose(
        validation[0]["validation/loss"], np.mean([validation[0][f"validation/source/{s}"] for s in small_data.KINDS])
    )
    first = lines[1]
    assert first["step"] == 1 and first["learning_rate"] == 0 and first["epoch"] == 0 and first["kind"] == small_data.KINDS[first["source"]]
    assert {line["source"] for line in lines if "loss" in line} == set(small_data.KINDS)
    config = json.loads((undisturbed / "config.json").read_text())
    assert config["optimizer"]["learning_rate"] == 4e-3 and config["batch"]["negatives"]["clustering"] == 2
    assert list((undisturbed / "tensorboard").iterdir())
    timings = [json.loads(line) for line in (undisturbed / "timings.jsonl").read_text().splitlines()]
    steps = [line for line in timings if "input_wait_seconds" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1)) and steps[-1]["model_flops_per_second"] > 0
    assert [line["step"] for line in timings if "validation_seconds" in line] == list(validation)
    assert find_checkpoint(undisturbed).step == STEPS


def test_a_run_killed_twice_is_the_undisturbed_one_to_the_bit(folder, data, undisturbed):
    """Killed right after a checkpoint, whose own metrics come one step late, and killed with metrics beyond a checkpoint."""
    workdir = folder / "killed"
    for killed_at, saved in ((SAVED + 1, SAVED), (2 * SAVED + 3, 2 * SAVED)):
        done = train(folder, data, workdir.name, python=kills.at_step(killed_at, after=workdir / "checkpoints" / str(saved)))
        assert done.returncode == -9, done.stderr
        assert saved <= max(losses(workdir)) < killed_at
    done = train(folder, data, workdir.name)
    assert done.returncode == 0, done.stderr
    assert f"resumes at step {2 * SAVED}" in done.stderr
    assert (workdir / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    assert_same_weights(workdir, undisturbed)


def test_sigterm_saves_and_the_same_command_goes_on(folder, data, undisturbed):
    stopped_at, workdir = 13, folder / "stopped"
    done = train(folder, data, workdir.name, python=kills.at_step(stopped_at, "SIGTERM"))
    assert done.returncode == 75 and f"stopped on request after update {stopped_at} of {STEPS}, which is saved" in done.stderr, done.stderr
    assert find_checkpoint(workdir).step == stopped_at == max(losses(workdir))
    done = train(folder, data, workdir.name)
    assert done.returncode == 0 and f"resumes at step {stopped_at}" in done.stderr, done.stderr
    assert (workdir / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    assert_same_weights(workdir, undisturbed)


def test_a_checkpoint_restores_on_other_devices(folder, data, undisturbed):
    """From one device to eight, parameters split over fsdp and tensor, and from those back to one."""
    many, one = folder / "on_eight", folder / "back_on_one"
    shutil.copytree(undisturbed, many)
    forget_after(many, SAVED)
    done = train(folder, data, many.name, "--config.mesh.fsdp=4", "--config.mesh.tensor=2", devices=8)
    assert done.returncode == 0, done.stderr
    assert "'fsdp': 4, 'tensor': 2" in done.stderr and f"resumes at step {SAVED}" in done.stderr
    shutil.copytree(many, one)
    forget_after(one, 2 * SAVED)
    done = train(folder, data, one.name)
    assert done.returncode == 0, done.stderr
    want = losses(undisturbed)
    for workdir, since in ((many, SAVED), (one, 2 * SAVED)):
        got = losses(workdir)
        np.testing.assert_allclose([got[since + 1], got[since + 2]], [want[since + 1], want[since + 2]], rtol=1e-5)
        # It trained rather than kept the lines of before: updates in another order of addition differ in the last bits.
        assert got != want
        np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-2)


def test_a_finished_run_run_again_changes_nothing(data, undisturbed, in_process, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    in_process(data, workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
    assert_same_weights(workdir, undisturbed)


def of_another_tokenizer(data, folder):
    """The dataset as another tokenizer with as many ids would have made it."""
    shutil.copytree(data, folder)
    content = files.read_json(folder / "dataset.json", sealed=True)
    files.write_json(folder / "dataset.json", content | {"tokenizer_fingerprint": "0" * 64}, sealed=True)
    return folder


def test_a_checkpoint_of_another_size_is_refused(data, undisturbed, in_process, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    with pytest.raises(ResumeError, match=r"size: 'toy' before, '80m' now"):
        in_process(data, workdir, size="80m")
    with pytest.raises(UserError, match=r"another model than this configuration's \(.*hidden_size 128 and not 320") as refused:
        in_process(data, workdir, size="80m", resume=Resume(with_changes=True))
    assert "\n" not in str(refused.value)


def test_weights_that_do_not_fit_are_refused_before_they_are_read(data, undisturbed, in_process, tmp_path):
    with pytest.raises(StartError, match="has width 128, less than the student's 320"):
        in_process(data, tmp_path / "run", size="80m", teacher=str(undisturbed))
    with pytest.raises(StartError, match=r"is not of size 80m: it is of size toy; pass --config\.size=toy"):
        in_process(data, tmp_path / "run", size="80m", init=str(undisturbed))
    other = of_another_tokenizer(data, tmp_path / "other")
    for role, remedy in {"init": "run prepare again with --tokenizer", "teacher": "distil from a model of the student's family"}.items():
        with pytest.raises(StartError, match=f"has another tokenizer than the .*{remedy}"):
            in_process(other, tmp_path / "run", **{role: str(undisturbed)})
    with pytest.raises(StartError, match="unknown size 'huge'"):
        in_process(data, tmp_path / "run", size="huge")
    with pytest.raises(UserError, match="neither a workdir"):
        in_process(data, tmp_path / "run", init=str(tmp_path / "absent" / "7"))
    assert not (tmp_path / "run").exists()


def test_resuming_on_data_of_another_tokenizer_is_refused(data, undisturbed, in_process, tmp_path):
    """The weights would read other words; the shapes alone cannot tell."""
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    with pytest.raises(ValueError, match="tokenizer"):
        in_process(of_another_tokenizer(data, tmp_path / "other"), workdir)


def test_a_refused_run_leaves_the_workdir_as_it_was(data, undisturbed, in_process, tmp_path):
    """Else its configuration and tokenizer would be of another model than its checkpoints."""
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    with pytest.raises(ResumeError):
        in_process(data, workdir, size="80m")
    assert (workdir / "config.json").read_bytes() == (undisturbed / "config.json").read_bytes()


def of_older_code(workdir, group, field):
    """Makes a run look as if code that did not have this field had made it."""
    for path in (workdir / "checkpoints").glob("*/_CHECKPOINT_METADATA"):
        content = json.loads(path.read_text())
        recorded = files.unseal(content["custom_metadata"], path)
        del recorded["provenance"]["config"][group][field]
        path.write_text(json.dumps(content | {"custom_metadata": files.seal(recorded)}))


def test_a_field_that_the_checkpoint_does_not_record_counts_as_its_default(data, undisturbed, in_process, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    of_older_code(workdir, "objective", "hard_weight")
    with pytest.raises(ResumeError, match=r"is another run:\n  objective\.hard_weight: 1\.0 before, 0\.5 now\n"):
        in_process(data, workdir, **{"objective.hard_weight": 0.5})
    in_process(data, workdir)
    assert files.read_json(workdir / "config.json", sealed=True)["history"] == []
    in_process(data, workdir, resume=Resume(with_changes=True), **{"objective.hard_weight": 0.5})
    changed = {"objective.hard_weight": {"before": 1.0, "now": 0.5}}
    assert files.read_json(workdir / "config.json", sealed=True)["history"] == [{"step": STEPS, "changes": changed}]
