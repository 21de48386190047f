"""`tests/benchmarks/gpu.py` needs nothing that a GPU image with JAX and PyTorch lacks: its parts run on the CPU without the rest."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LACKING = (
    *("apache_beam", "array_record", "babel", "gcsfs", "grain", "importlib_resources", "matplotlib", "mteb", "tensorboardX"),
    "tensorflow_datasets",
)
SMALL = ("--hidden", "32", "--layers", "1", "--head-dim", "16", "--ffn", "32", "--vocab", "64", "--steps", "1", "--row-tokens", "512")
PARTS = {
    "its flags": (["tests/benchmarks/gpu.py", "--help"], "parity kit"),
    "the parity kit": (["tests/parity.py", "tests/fixtures/parity"], "max_rel_loss"),
    "the step": (["tests/benchmarks/step.py", *SMALL, "--chunk-rows", "8"], "useful_tokens_per_s"),
    "the kernels": (["-m", "pytest", "-q", "-m", "gpu", "--collect-only", "tests/test_attention.py"], "test_attention.py"),
}
SLOW = ("the parity kit", "the step")


@pytest.fixture
def lacking(tmp_path):
    """An environment in which no process finds the packages of `LACKING`."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({LACKING!r}))\n")
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    }


def test_the_packages_are_really_out_of_reach(lacking):
    code = f"import importlib.util as u; print([u.find_spec(name) for name in {LACKING!r}])"
    done = subprocess.run([sys.executable, "-c", code], env=lacking, capture_output=True, text=True)
    assert json.loads(done.stdout.replace("None", "null")) == [None] * len(LACKING)


@pytest.mark.parametrize("part", [pytest.param(part, marks=pytest.mark.slow) if part in SLOW else part for part in PARTS])
def test_a_gpu_image_has_all_it_needs(part, lacking):
    command, expected = PARTS[part]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=lacking, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
