"""Eight fake CPU devices for every test, decided before JAX is first used; and what several files need."""

import os
import pathlib

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
def parity_kit() -> pathlib.Path:
    """A copy of the referee: two tiny Qwen3 checkpoints, twelve batches, and what the published recipe computes on them."""
    return pathlib.Path(__file__).parent / "fixtures" / "parity"
