"""What may come between a run and its end: infinite gradients, an object store as its workdir. Kills: test_training, test_kills."""

import json
import pathlib

import gcs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from small_batches import B, N, encode_chunk, packed
from small_runs import OVERRIDES, assert_same_weights

from f2llm_jax.batch import Batch, Samples
from f2llm_jax.configs import stage2
from f2llm_jax.errors import DivergedError
from f2llm_jax.model.decoder import init_decoder
from f2llm_jax.objectives import Mean, Objective
from f2llm_jax.training.metrics import Recorder, StepWork
from f2llm_jax.training.optimizer import OptimizerConfig, make_optimizer
from f2llm_jax.training.run import run
from f2llm_jax.training.step import TrainState, make_train_step
from f2llm_jax.weights.checkpoint_reader import find_checkpoint, steps_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning", "ignore::ResourceWarning"),
    pytest.mark.usefixtures("quick_compilation"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("interruptions")


@pytest.fixture(scope="module")
def data(small_dataset):
    return small_dataset.folder


OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, total_steps=9)


@pytest.fixture(scope="module")
def train_step():
    return jax.jit(make_train_step(encode_chunk(), Objective(), OPTIMIZER))


@pytest.mark.parametrize("broken", [False, True])
def test_a_step_without_finite_gradients_changes_nothing(train_step, broken):
    params = init_decoder(tiny.CONFIG, 0)
    if broken:  # one weight that is infinite makes every gradient undefined
        params["norm"].set_value(params["norm"].get_value().at[0].set(jnp.inf))
    state = TrainState(jnp.int32(3), params, make_optimizer(OPTIMIZER).init(params))
    ids = jnp.arange(B), jnp.arange(B, B + B * N).reshape(B, N)
    batch = Batch(packed(2), Samples(jnp.ones(B).at[3].set(0), jnp.ones((B, N)).at[3].set(0), jnp.float32(1), *ids))
    after, metrics = train_step(state, None, jax.device_put(batch))
    assert float(metrics["skipped"].value) == float(broken) and int(after.step) == 4
    for old, new in zip(jax.tree.leaves((state.params, state.opt_state)), jax.tree.leaves((after.params, after.opt_state)), strict=True):
        if old.ndim:
            assert np.array_equal(old, new) == broken
        else:
            assert int(new) == int(old) + 1  # counters go on, and with them the schedule


def test_a_run_gives_up_after_too_many_skipped_steps(tmp_path):
    def step(recorder, number, skipped):
        means = {"loss": Mean(np.float32(np.nan if skipped else 1), np.float32(1)), "skipped": Mean(np.float32(skipped), np.float32(1))}
        recorder.step(number, means, {"source": "bad one", "epoch": 2}, StepWork(10, 20, 30.0, 0.0))

    with (
        pytest.raises(DivergedError, match=r"update 7 on a batch of source 'bad one' \(epoch 2\) and 2 before it"),
        Recorder(tmp_path, 0, 99, 1, max_skipped=2) as recorder,
    ):
        for number, skipped in enumerate([0, 1, 1, 0, 1, 1, 1, 0, 0], start=1):  # two in a row are borne
            step(recorder, number, skipped)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    assert [line.get("skipped", 0) for line in lines] == [0, 1, 1, 0, 1, 1, 1]
    assert all(("loss" in line) != ("skipped" in line) for line in lines)


def test_what_is_left_out_of_the_metrics_is_said(tmp_path, capsys):
    """A metric that is not finite, once by name; a gradient of zero at the first step."""
    one = np.float32(1)
    with Recorder(tmp_path, 0, 99, 1, max_skipped=2) as recorder:
        for number in (1, 2):
            means = {
                name: Mean(np.float32(value), one) for name, value in {"loss": 1, "mine": np.nan, "skipped": 0, "grad_norm": 0}.items()
            }
            recorder.step(number, means, {}, StepWork(10, 20, 30.0, 0.0))
    said = capsys.readouterr().err
    assert said.count("not finite, so not in metrics.jsonl: mine") == 1 and said.count("the gradient is zero") == 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [{"step", "loss", "grad_norm"}] * 2


def test_metrics_of_before_stay_as_far_as_the_checkpoint_goes(tmp_path):
    """A run killed between its first validation and its first checkpoint begins anew; one with a checkpoint of step 0 does not."""

    def steps(resumed, start):
        with Recorder(tmp_path, start, 99, 1, max_skipped=2, resumed=resumed) as recorder:
            if not resumed:
                recorder.write(0, {"validation/loss": 1.0})
            recorder.write(start + 1, {"loss": 1.0})
        return [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    assert steps(False, 0) == [0, 1]
    assert steps(False, 0) == [0, 1]
    assert steps(True, 0) == [0, 1]
    assert steps(True, 1) == [0, 1, 2]
    assert steps(True, 1) == [0, 1, 2]


@pytest.mark.slow
def test_a_bucket_as_workdir(data, folder):
    """Trained, stopped, gone on with: the metrics are those of a run on a disk, and nothing but them and checkpoints is needed."""

    def go_on(workdir, steps):
        config = stage2.get_config("runlocal")
        config.update_from_flattened_dict({**OVERRIDES, "data.folder": str(data), "steps": steps, "checkpoint.keep": 2})
        config.optimizer.warmup_steps = 0
        run(config, workdir)

    with gcs.emulator() as bucket:
        go_on(f"{bucket}/training", 6)
        text = find_checkpoint(f"{bucket}/training").run_folder.joinpath("metrics.jsonl").read_text()
        assert [line["step"] for line in map(json.loads, text.splitlines()) if "loss" in line] == [1, 2, 3, 4, 5, 6]
        go_on(f"{bucket}/training", 6)  # complete: nothing happens
        again = find_checkpoint(f"{bucket}/training")
        assert again.run_folder.joinpath("metrics.jsonl").read_text() == text and steps_of(f"{bucket}/training") == [5, 6]
        go_on(folder / "on_disk", 6)
        assert (pathlib.Path(folder) / "on_disk" / "metrics.jsonl").read_text() == text
        assert_same_weights(f"{bucket}/training", folder / "on_disk")
