"""Both configurations at every size: published values, typos that fail with the nearest name, overrides, runlocal."""

import re
import subprocess
import sys
from pathlib import Path

import ml_collections
import pytest

from configs import common, stage1, stage2
from f2llm_jax.data.pipeline import BatchConfig
from f2llm_jax.model.sizes import SIZES
from f2llm_jax.training.optimizer import OptimizerConfig

# Paper, table 1: peak learning rate and epochs.
PUBLISHED = {
    "80m": (4e-5, 4),
    "160m": (3e-5, 3),
    "330m": (2e-5, 3),
    "0.6b": (1e-5, 2),
    "1.7b": (9e-6, 2),
    "4b": (7e-6, 2),
    "8b": (6e-6, 2),
    "14b": (5e-6, 2),
}
STAGES = pytest.mark.parametrize("stage", [stage1, stage2], ids=["stage1", "stage2"])


@STAGES
@pytest.mark.parametrize("size", PUBLISHED)
def test_hyper_parameters_are_the_published_ones(stage, size):
    config = stage.get_config(f"size={size}")
    assert (config.size, config.optimizer.learning_rate, config.epochs, config.steps) == (size, *PUBLISHED[size], 0)
    assert size in SIZES
    assert (config.batch.size, config.batch.max_length) == (512, 1024)
    assert config.batch.negatives.to_dict() == {"retrieval": 7, "clustering": 9, "classification": 1}
    assert config.batch.negatives_per_sample == "batch"
    optimizer = config.optimizer
    assert (optimizer.warmup_steps, optimizer.min_learning_rate, optimizer.weight_decay) == (500, 1e-7, 0.01)
    assert (optimizer.beta1, optimizer.beta2, optimizer.clip_norm) == (0.9, 0.98, 1.0)
    objective = config.objective
    assert (objective.temperature, objective.matryoshka, objective.matryoshka_minimum) == (0.05, True, 8)
    assert objective.in_batch_passage_grad == "full"
    assert config.dtype == "bfloat16"


@STAGES
@pytest.mark.parametrize("arg", ["", "size=80m", "runlocal"])
def test_groups_that_are_handed_on_by_name_fit(stage, arg):
    config = stage.get_config(arg)
    BatchConfig(**config.batch.to_dict())
    OptimizerConfig(total_steps=1000, **config.optimizer)


@pytest.mark.parametrize(("stage", "number"), [(stage1, 1), (stage2, 2)])
def test_runlocal_is_a_toy_on_the_embedded_corpus(stage, number):
    config = stage.get_config("runlocal")
    assert (config.size, config.data.embedded_stage, config.data.folder, config.dtype) == ("toy", number, "", "float32")
    assert config.batch.size < 512 and config.batch.max_length < 1024
    assert stage.get_config().data.embedded_stage == 0 and stage.get_config().size == "0.6b"
    # It changes values only: what overrides one overrides the other.
    assert names(config) == names(stage.get_config())


def names(config):
    return {name: names(value) if isinstance(value, ml_collections.ConfigDict) else None for name, value in config.items()}


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("siz=4b", "unknown configuration argument 'siz'; did you mean 'size'?"),
        ("runlocl", "unknown configuration argument 'runlocl'; did you mean 'runlocal'?"),
        ("zzz=1", "unknown configuration argument 'zzz'; there are: size, runlocal"),
        ("size=5b", "unknown size '5b'; there are: 80m, 160m, 330m, 0.6b, 1.7b, 4b, 8b, 14b"),
    ],
)
@STAGES
def test_a_wrong_argument_names_the_right_one(stage, arg, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        stage.get_config(arg)


def test_arguments_have_the_types_of_their_defaults():
    parsed = common.parse_arg("size=4b,runlocal", size="0.6b", runlocal=False)
    assert (parsed.size, parsed.runlocal) == ("4b", True)
    assert common.parse_arg("runlocal=false", runlocal=True).runlocal is False
    assert common.parse_arg(None, size="0.6b").size == "0.6b"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.optimizer.learning_rat=1"], 'Did you mean "learning_rate"'),
        (["--config.batch.sise=8"], 'Did you mean "size"'),
        (["--config.batch.size=many"], "flag --config.batch.size=many"),
        (["--config.batch.size=8"], "config.data.folder is empty"),  # a right name gets as far as the run
    ],
)
def test_the_command_line_refuses_a_typo_and_names_the_nearest(flags, message, tmp_path):
    command = [sys.executable, "-m", "f2llm_jax.main", "--config", "configs/stage2.py:size=80m", "--workdir", str(tmp_path / "run")]
    done = subprocess.run([*command, *flags], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr[-400:], done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()
