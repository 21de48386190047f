"""A JAX that is newer than the tested ones, or that has lost what it never promised: warned of by name, and training goes on."""

import sys

import jax
import jax.numpy as jnp
import pytest

from f2llm_jax import jax_version
from f2llm_jax.compilation import collectives, cost
from f2llm_jax.errors import UserError
from f2llm_jax.jax_version import UntestedJaxWarning
from f2llm_jax.model.attention import choose_kernel
from f2llm_jax.training import cluster
from f2llm_jax.training.hosts import ALONE, find_place

CALLS = {
    "training.cluster": lambda: cluster.detect("here:1", 2, 0, 1),
    "compilation.cost": lambda: cost.trace(lambda x: x @ x, jnp.ones((2, 2))),
    "compilation.collectives": lambda: collectives.collectives("ENTRY %main (x: f32[]) -> f32[] {\n}", lambda scope: 1),
}
SHAPE = ("tpu", jnp.bfloat16, 1024, 128)


@pytest.fixture
def anew():
    """Warnings are given once a process; here once a test."""
    jax_version.warn_if_newer.cache_clear()
    yield
    jax_version.warn_if_newer.cache_clear()


def test_this_jax_is_a_tested_one():
    assert (0, 10) <= jax_version.version() <= jax_version.LAST_TESTED


@pytest.mark.parametrize("module", CALLS)
def test_a_newer_jax_is_warned_of_by_name(module, monkeypatch, anew):
    CALLS[module]()  # with this one there is no warning, which would be an error
    jax_version.warn_if_newer.cache_clear()
    monkeypatch.setattr(jax, "__version__", "0.99.1rc2")
    with pytest.warns(UntestedJaxWarning, match=rf"JAX 0\.99\.1rc2 is newer than 0\.12, the last that f2llm_jax\.{module} was tested"):
        CALLS[module]()


def test_without_its_cluster_detection_one_process_trains_and_several_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax._src.clusters", None)
    for name in cluster._SEVERAL:
        monkeypatch.delenv(name, raising=False)
    assert find_place(None, None, None, 1) == ALONE
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "one")
    assert find_place(None, None, None, 1) == ALONE
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "one,other")
    with pytest.raises(UserError, match=r"TPU_WORKER_HOSTNAMES says that there are several processes.*pass --coordinator_address"):
        find_place(None, None, None, 1)


def test_without_the_splash_kernel_auto_is_xla(monkeypatch):
    assert choose_kernel("auto", *SHAPE) == "splash"
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.ops.tpu", None)
    monkeypatch.delitem(sys.modules, "jax.experimental.pallas.ops.tpu.splash_attention", raising=False)
    assert choose_kernel("auto", *SHAPE) == "xla"
    with pytest.raises(UserError, match="does not have the kernel; take attention=auto or xla"):
        choose_kernel("splash", *SHAPE)
