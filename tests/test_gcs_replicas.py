"""A checkpoint in a bucket is read by one data replica, which gives it to the others: two hosts, a replica each, bytes counted."""

import contextlib
import os
import socket
import subprocess
import sys
import urllib.parse

import faults
import gcs
import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4 // int(sys.argv[4]))
url, port, process, processes, action = sys.argv[1:]
if int(processes) > 1:
    jax.distributed.initialize(f"localhost:{port}", int(processes), int(process))
import jax.numpy as jnp
import numpy as np
from f2llm_jax import sharding
from f2llm_jax.model.decoder import abstract_decoder, init_decoder
from f2llm_jax.model.sizes import DecoderConfig
from f2llm_jax.training import checkpoint
from f2llm_jax.training.step import TrainState
shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
config = DecoderConfig(vocab_size=32_768, head_dim=32, **shape)
mesh = sharding.make_mesh(2, 2, 1)
with jax.set_mesh(mesh):
    params = init_decoder(config, 0, mesh)
    state = TrainState(jnp.int32(0), params, {"count": jnp.int32(3), "mu": params})
    with checkpoint.open_checkpoints(f"{url}/checkpoints", checkpoint.CheckpointConfig(every=1, keep=1)) as checkpoints:
        if action == "save":
            checkpoint.save(checkpoints, 1, state, {})
        else:
            count = jax.ShapeDtypeStruct((), jnp.int32, sharding=jax.NamedSharding(mesh, sharding.P()))
            _, abstract = abstract_decoder(config, mesh)
            back = checkpoint.restore(checkpoints, 1, TrainState(count, abstract, {"count": count, "mu": abstract}))
            for got, want in zip(jax.tree.leaves(back.params), jax.tree.leaves(params), strict=True):
                assert got.sharding == want.sharding
                for one, other in zip(got.addressable_shards, want.addressable_shards, strict=True):
                    np.testing.assert_array_equal(one.data, other.data)
"""


def run(url, action, addresses):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    started = []
    for process, address in enumerate(addresses):
        environment = os.environ | {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address, "JAX_PLATFORMS": "cpu"}
        words = [sys.executable, "-c", PROGRAM, url, str(port), str(process), str(len(addresses)), action]
        started.append(subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True))
    printed = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0] * len(addresses), printed


@pytest.mark.filterwarnings("default")
def test_one_replica_reads():
    with gcs.emulator() as url:
        behind = urllib.parse.urlsplit(os.environ["STORAGE_EMULATOR_HOST"])
        run(url, "save", [os.environ["STORAGE_EMULATOR_HOST"]])
        with contextlib.ExitStack() as stack:
            proxies = [stack.enter_context(faults.between((behind.hostname, behind.port), 0)) for _ in range(2)]
            run(url, "restore", [address for address, _ in proxies])
            read = [counts["bytes"] for _, counts in proxies]
    stored = 2 * 4 * 32_768 * 64
    assert read[0] >= stored and read[1] < 0.1 * stored, read
