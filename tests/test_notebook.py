"""The example notebook, executed as Jupyter executes it: an objective and a metric of one's own, no flags, no process that ends."""

import os
import pathlib
import re
import sys

import nbclient
import nbformat
import numpy as np
import pytest
import tiny

from f2llm_jax.release import hf_folder

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 12


@pytest.mark.filterwarnings("default")
@pytest.mark.slow
def test_an_objective_and_a_metric_of_ones_own_in_a_notebook(tmp_path, monkeypatch):
    hf_folder.export(tiny.origin(tmp_path / "tiny"), tmp_path / "base", hf_folder.ReleaseForm())
    settings = {"BASE": str(tmp_path / "base"), "STEPS": str(STEPS), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    for name, value in (settings | {"IPYTHONDIR": str(tmp_path / "ipython"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    notebook = nbformat.read(ROOT / "examples" / "own_objective.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs)
    first, last = map(float, re.search(r"first and last update: (\S+) (\S+)", printed).groups())
    assert last < first
    assert re.search(r"held out, by a margin: \S+ -> \S+", printed)
    assert "step/s" in printed or "s/step" in printed or f"{STEPS}/{STEPS}" in printed  # a bar, as somebody watches
    assert os.path.exists(tmp_path / "model" / "config.json")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_training_and_release_on_a_free_tpu_here_without_one(tmp_path, monkeypatch):
    """On the embedded corpus, twice: the second time everything is there already."""
    settings = {"SOURCE": "", "DATA": "", "STEPS": "6", "WORK": str(tmp_path / "work"), "JAX_PLATFORMS": "cpu"}
    settings |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "IPYTHONDIR": str(tmp_path / "ipython")}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    for _ in range(2):
        notebook = nbformat.read(ROOT / "examples" / "free_tpu.ipynb", as_version=4)
        nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    vectors = np.load(tmp_path / "work" / "vectors.npy")
    assert vectors.shape[0] == 3 and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    written = {path.name for path in (tmp_path / "work" / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "modules.json"} <= written
