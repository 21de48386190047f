"""Both configurations at every size: published values, typos that fail with the nearest name, overrides, runlocal."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import ml_collections
import pytest

import f2llm_jax
from f2llm_jax import __main__
from f2llm_jax.__main__ import COMMANDS
from f2llm_jax.cli import configuration
from f2llm_jax.configs import common, ml_embed, stage1, stage2
from f2llm_jax.data.pipeline import BatchConfig
from f2llm_jax.errors import UserError
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


@STAGES
def test_the_published_recipe_is_set_as_a_whole(stage):
    """The choices of F2LLM's code that the defaults leave (docs/recipe.md); nothing else changes."""
    ours, published = (stage.get_config(arg).to_dict() for arg in ("size=4b", "size=4b,recipe=published"))
    changed = {
        "data": {"order": "published"},
        "batch": {"tail": "repeated", "single_negative": "first"},
        "objective": {"in_batch_passage_grad": "none", "loss_dtype": "bfloat16"},
        "checkpoint": {"every": 5000},
    }
    for group, values in changed.items():
        assert all(ours[group][name] != value for name, value in values.items())
        ours[group] |= values
    assert published == ours


def test_ml_embed_is_the_released_configuration():
    config = ml_embed.get_config("size=0.6b")
    assert (config.table_rank, config.table_rank_sampled, config.objective.layer_matryoshka) == (512, False, True)
    assert (config.optimizer.learning_rate, config.optimizer.warmup_steps, config.epochs) == (1e-5, 100, 2)


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
        ("zzz=1", "unknown configuration argument 'zzz'; there are: size, runlocal, recipe"),
        ("recipe=publishd", "unknown recipe 'publishd'; recipe=published takes every choice of the published code"),
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
    ("field", "value", "message"),
    [
        ("optimizer.learning_rat", "1", "did you mean config.optimizer.learning_rate"),
        ("lr", "1", "did you mean config.optimizer.learning_rate"),
        ("batch.sise", "8", "did you mean config.batch.size"),
        ("batch_size", "8", "config.batch.size"),
        ("batch", "8", "is a group; set one of its fields: config.batch."),
        ("batch.size.x", "8", "there is no such field"),
        ("batch.size", "many", "config.batch.size=many: must be of type int, as the default 512"),
        ("batch.size", "8.5", "must be of type int"),
        ("objective.matryoshka", "maybe", "must be of type bool"),
        ("objective.matryoshka_dims", "8,x", "must be of type tuple"),
    ],
)
def test_an_override_that_cannot_be_names_field_and_remedy(field, value, message):
    with pytest.raises(UserError, match=re.escape(message)):
        configuration.load("configs/stage2.py:size=80m", [(field, value)])


def test_overrides_have_the_types_of_their_fields():
    typed = {
        "batch.size": ("8", 8),
        "optimizer.learning_rate": ("1e-3", 1e-3),
        "optimizer.clip_norm": ("2", 2.0),
        "objective.matryoshka": ("false", False),
        "objective.matryoshka_dims": ("(8, 16)", (8, 16)),
        "objective.matryoshka_weights": ("0.5", (0.5,)),
        "data.folder": ("a=b", "a=b"),
        "loggers": ("tensorboard,wandb", ("tensorboard", "wandb")),
        "teacher": ("", ""),
    }
    config = configuration.load("stage2", [(field, text) for field, (text, _) in typed.items()])
    found = {field: functools.reduce(lambda group, name: group[name], field.split("."), config) for field in typed}
    assert found == {field: value for field, (_, value) in typed.items()}
    assert all(type(found[field]) is type(value) for field, (_, value) in typed.items())


@pytest.mark.parametrize("name", ["stage2", "stage2.py", "configs/stage2.py"])
def test_the_configurations_of_the_package_are_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configuration.load(f"{name}:size=4b").to_dict() == stage2.get_config("size=4b").to_dict()


def test_a_configuration_of_ones_own_builds_on_those_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    own = "from f2llm_jax.configs import common\n\n\ndef get_config(arg=None):\n    return common.base('80m', arg == 'toy', 2)\n"
    (tmp_path / "configs" / "stage2.py").write_text(own)  # goes before the one of that name in the package
    assert configuration.load("configs/stage2.py:toy").size == "toy"
    with pytest.raises(UserError, match=r"give a path or one of configs/ablation.py"):
        configuration.load("configs/stage3.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match="defines no get_config"):
        configuration.load("empty.py")


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--config.batch.sise=8"], 1, "did you mean config.batch.size"),
        (["--config.batch.size", "8"], 1, "config.data.folder is empty"),  # a right name gets as far as the run
        (["--batch.size=8"], 2, "fields of the configuration are written --config.FIELD=VALUE"),
        (["--config.batch.size"], 2, "fields of the configuration are written --config.FIELD=VALUE"),
    ],
)
def test_the_command_line(flags, code, message, tmp_path):
    command = [sys.executable, "-m", "f2llm_jax", "main", "--config", "configs/stage2.py:size=80m", "--workdir", str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([*command, *flags], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == code
    assert message in done.stderr[-400:], done.stderr
    assert not (tmp_path / "run").exists()


def test_every_command_is_listed_and_says_how_it_is_used(capsys, monkeypatch):
    package = Path(f2llm_jax.__file__).parent
    commands = {file.stem for file in package.glob("*.py") if re.search(r"^def main\(arguments", file.read_text(), re.MULTILINE)}
    assert commands == set(COMMANDS)
    monkeypatch.setattr(sys, "argv", ["f2llm-jax", "--help"])
    assert __main__.main() == 0
    printed = capsys.readouterr().out
    assert [name for name in COMMANDS if f"  {name} " not in printed] == []
