"""Eight fake CPU devices for every test, decided before JAX is first used; and what several files need."""

import fcntl
import os
import pathlib
import shutil

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # with libtpu installed JAX would otherwise look for a TPU

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module")
def quick_compilation():
    """For programs that take XLA long to optimise and no time to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory):
    """The dataset of `small_data`, for reading: made once a test run, by the first of its processes that needs it."""
    import small_data  # here, because a GPU image has neither TFDS nor Beam, and its tests need neither

    from f2llm_jax.data import records

    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder of its own in the run's
        root = root.parent
    folder = root / "small_data"
    with (root / "small_data.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            small_data.write(folder)
            (folder / "complete").touch()
    return records.load_dataset(folder / "data")


@pytest.fixture(scope="session")
def parity_kit() -> pathlib.Path:
    """A copy of the referee: two tiny Qwen3 checkpoints, twelve batches, and what the published recipe computes on them."""
    return pathlib.Path(__file__).parent / "fixtures" / "parity"
