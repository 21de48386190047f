"""Metrics go to every logger as they are written; each logger of the field takes them offline and continues when a run resumes."""

import importlib.util
import json
import pathlib
import struct

import ml_collections
import pytest
from etils import epath
from tensorboardX.proto import event_pb2

from f2llm_jax.errors import UserError
from f2llm_jax.training import loggers
from f2llm_jax.training.metrics import Recorder

CONFIG = ml_collections.ConfigDict({"seed": 0, "batch": {"size": 8}, "loggers": ("tensorboard",)})


def stream(name, workdir, first=0, steps=3):
    with loggers.opened([name], epath.Path(workdir), CONFIG, first) as (log,):
        for step in range(first, first + steps):
            log(step, {"loss": 1.0 / (1 + step), "source": "squad", "validation/accuracy/language/zh-Hans": 0.5})
            log(step, {"timing/steps_per_second": 2.0})


def test_a_logger_takes_every_line_and_only_what_is_new(tmp_path):
    seen = []
    with Recorder(tmp_path, 0, 9, 1, 2, loggers=[lambda step, values: seen.append((step, dict(values)))]) as recorder:
        recorder.write(0, {"validation/loss": 1.0, "validation/accuracy": 0.5})
        recorder.write(1, {"loss": 2.0, "source": "squad"})
    assert seen == [(0, {"validation/loss": 1.0, "validation/accuracy": 0.5}), (1, {"loss": 2.0, "source": "squad"})]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [{"step": step, **values} for step, values in seen] == lines


def test_an_unknown_logger_and_one_that_is_not_installed_are_named_before_any_work():
    with pytest.raises(UserError, match="there is no 'wandbb'; choose of tensorboard, wandb, mlflow, trackio"):
        loggers.check(["tensorboard", "wandbb"])
    for name, (package, _) in loggers.LOGGERS.items():
        if not importlib.util.find_spec(package):
            with pytest.raises(ModuleNotFoundError) as missing:
                loggers.check([name])
            assert missing.value.name == package


def scalars(folder):
    """`(name, step, value)` of event files: records of length, checksum, content, checksum."""
    found = []
    for file in sorted(pathlib.Path(folder).iterdir()):
        content, at = file.read_bytes(), 0
        while at < len(content):
            length = int.from_bytes(content[at : at + 8], "little")
            event = event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
            found += [(value.tag, event.step, round(value.simple_value, 6)) for value in event.summary.value]
            at += length + 16
    return found


def test_tensorboard(tmp_path):
    stream("tensorboard", tmp_path)
    found = scalars(tmp_path / "tensorboard")
    assert [entry for entry in found if entry[0] == "loss"] == [("loss", 0, 1.0), ("loss", 1, 0.5), ("loss", 2, 0.333333)]
    assert {name for name, _, _ in found} == {"loss", "validation/accuracy/language/zh-Hans", "timing/steps_per_second"}


def wandb_records(path):
    """Of a run's file, which is a LevelDB log: blocks of 32 KiB, over whose bounds records are split."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""  # seven bytes say what the file is
    while at + 7 <= len(data):
        if (left := -at % 32768) and left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_weights_and_biases_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    stream("wandb", tmp_path)
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert run.name.endswith(loggers._id(tmp_path))
    seen = [
        {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
        for record in wandb_records(next(run.glob("*.wandb")))
        if record.WhichOneof("record_type") == "history"
    ]
    assert [row["loss"] for row in seen] == [1.0, 0.5, 1 / 3]
    assert all(row["validation/accuracy/language/zh-Hans"] == 0.5 and row["timing/steps_per_second"] == 2.0 for row in seen)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_mlflow_continues_its_run(tmp_path, monkeypatch):
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    workdir = tmp_path / "run"
    workdir.mkdir()
    stream("mlflow", workdir)
    stream("mlflow", workdir, first=3)
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert [(point.step, round(point.value, 6)) for point in history] == [(step, round(1 / (1 + step), 6)) for step in range(6)]
    assert run.data.params["batch.size"] == "8" and run.info.run_name == "run"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_trackio_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("TRACKIO_PROJECT", "first")
    stream("trackio", tmp_path / "run")
    assert any((tmp_path / "trackio").iterdir())
