"""From `gs://` to `gs://`: complete, identical, and never a folder that looks complete but is not."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import gcs
import kills
import pytest
import tiny
from etils import epath

from f2llm_jax import convert, prune
from f2llm_jax.release import hf_folder
from f2llm_jax.storage.folders import INCOMPLETE, MADE

SHARDS = ("--max-shard-size", "100KB", "--no-golden")

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def bucket():
    with gcs.emulator() as address:
        yield address


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("release") / "model"
    hf_folder.export(tiny.origin(tmp_path_factory.mktemp("tokenizer")), out, hf_folder.ReleaseForm(max_shard_bytes=100_000, golden=False))
    return out


def held(folder):
    """Every file of a folder but the marker, which holds checksums on a disk and sizes in a bucket: name to bytes."""
    found = {}
    for path in epath.Path(folder).iterdir():
        inner = path.iterdir() if path.is_dir() else [path]
        found |= {str(file).removeprefix(f"{folder}/"): file.read_bytes() for file in inner if file.name != MADE}
    return found


def test_a_bucket_holds_what_a_disk_holds(bucket, folder):
    assert convert.main(["from-hf", str(folder), f"{bucket}/run"]) == 0
    assert convert.main(["to-hf", f"{bucket}/run", f"{bucket}/out", *SHARDS]) == 0
    assert held(f"{bucket}/out") == held(folder)
    assert convert.main(["to-hf", f"{bucket}/run", f"{bucket}/out"]) == 1  # without --overwrite
    assert convert.main(["to-hf", f"{bucket}/run", f"{bucket}/out", "--overwrite", *SHARDS]) == 0
    assert held(f"{bucket}/out") == held(folder)


@pytest.mark.slow  # torch reads it
def test_a_release_in_a_bucket_is_verified(bucket, folder, capsys):
    assert convert.main(["to-hf", str(folder), f"{bucket}/verified"]) == 0
    assert convert.main(["verify", f"{bucket}/verified"]) == 0
    assert "sentence-transformers   as documents" in capsys.readouterr().out


@pytest.mark.slow
def test_a_pruned_model_in_a_bucket(bucket, folder, tmp_path, small_dataset):
    flags = ["--model", folder, "--data", small_dataset.folder, "--target", "hidden=32,layers=2", "--calibration-rows", 16, *SHARDS]
    for out in (f"{bucket}/pruned", tmp_path / "pruned"):
        assert prune.main([str(flag) for flag in (*flags, "--out", out)]) == 0
    assert held(f"{bucket}/pruned/model") == held(tmp_path / "pruned" / "model")
    assert convert.main(["to-hf", f"{bucket}/pruned", str(tmp_path / "again"), *SHARDS]) == 0
    weights = {name: content for name, content in held(tmp_path / "again").items() if "safetensors" in name}
    assert weights and weights.items() <= held(tmp_path / "pruned" / "model").items()


def test_killed_and_run_again(bucket, folder):
    """SIGKILL after the second of many shards, over an older release: no reader loads what is there; the next run mends it."""
    assert convert.main(["from-hf", str(folder), f"{bucket}/run", "--overwrite"]) == 0
    command = ["to-hf", f"{bucket}/run", f"{bucket}/again", *SHARDS]
    assert convert.main(command) == 0
    root = pathlib.Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    killed = subprocess.run(
        [sys.executable, *kills.at_call("convert", "release.safetensors:_write_file", 3), *command, "--overwrite"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = held(f"{bucket}/again")
    assert INCOMPLETE in left and "config.json" not in left and "modules.json" not in left
    assert len([name for name in left if name.endswith(".safetensors")]) == 2
    assert convert.main(command) == 0  # what was killed is replaced without --overwrite
    assert held(f"{bucket}/again") == held(folder)


def test_a_failure_leaves_nothing(bucket, folder, monkeypatch):
    monkeypatch.setattr("f2llm_jax.release.card.write_card", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    assert convert.main(["to-hf", str(folder), f"{bucket}/failed"]) == 1
    assert not epath.Path(f"{bucket}/failed").exists()  # an empty folder is no object


def test_an_imported_bucket_checkpoint_is_one_that_training_restores(bucket, folder):
    from f2llm_jax.weights.models import find_model

    assert convert.main(["from-hf", str(folder), f"{bucket}/train", "--overwrite"]) == 0
    origin = find_model(f"{bucket}/train")
    assert origin.load(None) is not None  # Orbax's own restore
    assert origin.config.hidden_size == json.loads((folder / "config.json").read_text())["hidden_size"]
