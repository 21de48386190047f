"""What a run writes beside its checkpoints once, so that a release, a report or a reader can tell what made them."""

import importlib.metadata
import json
import pathlib
import platform
import subprocess

import jax
import ml_collections
from etils import epath

from f2llm_jax.data.records import Dataset

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")


def write_facts(workdir: epath.Path, config: ml_collections.ConfigDict, dataset: Dataset) -> None:
    """`config.json`, `dataset.json`, `environment.json` and `tokenizer/`."""
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(json.loads(config.to_json_best_effort()), indent=2) + "\n")
    (workdir / "dataset.json").write_text((epath.Path(dataset.folder) / "dataset.json").read_text())
    (workdir / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
    dataset.tokenizer().save(workdir / "tokenizer")


def environment() -> dict[str, str | int | None]:
    """Versions, devices, and the commit of this project if it runs from a checkout."""
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    devices = {"device": jax.devices()[0].device_kind, "devices": jax.device_count(), "hosts": jax.process_count()}
    return {"python": platform.python_version(), **versions, **devices, "commit": _commit()}


def _commit() -> str | None:
    here = pathlib.Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
