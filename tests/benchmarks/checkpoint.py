"""Seconds to save and to restore a checkpoint of parameters and both moments, of random weights of a real size or of a toy.

    python tests/benchmarks/checkpoint.py --size toy --vocabulary 151669 --folder /some/disk/new

Reading the checkpoint's bytes from the same disk is measured next to it. The folder is left; give it again with --restore-only.
"""

import argparse
import dataclasses
import json
import pathlib
import resource
import time

import jax

from f2llm_jax import sharding
from f2llm_jax.model.decoder import init_decoder
from f2llm_jax.model.sizes import SIZES
from f2llm_jax.training import checkpoint
from f2llm_jax.training.optimizer import OptimizerConfig
from f2llm_jax.training.program import abstract_state, fresh_state

OPTIMIZER = OptimizerConfig(
    total_steps=10, learning_rate=1e-3, warmup_steps=1, min_learning_rate=0, beta1=0.9, beta2=0.9, weight_decay=0, clip_norm=1
)
KEPT = checkpoint.CheckpointConfig(every=1, keep=1)


def read_bytes(folder):
    """Seconds to read every file of a folder, and their bytes."""
    begun, total = time.perf_counter(), 0
    for file in folder.rglob("*"):
        if file.is_file():
            total += len(file.read_bytes())
    return time.perf_counter() - begun, total


def timed(what, call):
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, {f"{what} s": round(time.perf_counter() - wall, 2), f"{what} cpu s": round(time.process_time() - cpu, 2)}


def _moment(x):
    """Not the zeros of a new run, which compress to nothing."""
    return jax.random.normal(jax.random.key(x.size), x.shape, x.dtype, out_sharding=x.sharding) if x.ndim else x


def save(folder, state):
    with checkpoint.open_checkpoints(folder, KEPT) as checkpoints:
        checkpoint.save(checkpoints, 1, state, {})


def restore(folder, abstract):
    with checkpoint.open_checkpoints(folder, KEPT) as checkpoints:
        return jax.block_until_ready(checkpoint.restore(checkpoints, 1, abstract))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="toy")
    parser.add_argument("--vocabulary", type=int, help="rows of the embedding table (default: of the size)")
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--devices", type=int, default=1, help="of an fsdp mesh, on this CPU")
    parser.add_argument("--restore-only", action="store_true")
    flags = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", flags.devices)
    mesh = sharding.make_mesh(1, -1, 1)
    with jax.set_mesh(mesh):
        measure(flags, mesh)


def measure(flags, mesh):
    config = dataclasses.replace(SIZES[flags.size], vocab_size=flags.vocabulary or SIZES[flags.size].vocab_size)
    figures = {"size": flags.size, "vocabulary": config.vocab_size, "devices": flags.devices}
    if not flags.restore_only:
        state = fresh_state(init_decoder(config, 0, mesh), OPTIMIZER)
        state = dataclasses.replace(state, opt_state=jax.tree.map(_moment, state.opt_state))
        _, seconds = timed("save", lambda: save(flags.folder, state))
        figures |= seconds
        del state
    seconds, size = read_bytes(flags.folder)
    figures |= {"GB": round(size / 1e9, 3), "reading bytes s": round(seconds, 2), "files": sum(1 for _ in flags.folder.rglob("*"))}
    _, seconds = timed("restore", lambda: restore(flags.folder, abstract_state(config, OPTIMIZER, mesh)))
    print(json.dumps(figures | seconds | {"peak GiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)}))


if __name__ == "__main__":
    main()
