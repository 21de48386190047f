"""What checksums, markers and locks cost: prepare, reading a step, saving a checkpoint; with and without, in turn, CPU seconds.

`python tests/benchmarks/safety_costs.py [ROUNDS]` prints the median of each and the median of the paired ratios.
"""

import contextlib
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import time
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import numpy as np
import small_data
from etils import epath

from f2llm_jax import prepare
from f2llm_jax.data import records
from f2llm_jax.data.pipeline import BatchConfig, Pipeline
from f2llm_jax.model.decoder import init_decoder
from f2llm_jax.model.sizes import SIZES
from f2llm_jax.preparation import shards, writing
from f2llm_jax.storage import files, folders
from f2llm_jax.training import checkpoint
from f2llm_jax.training.optimizer import OptimizerConfig
from f2llm_jax.training.program import fresh_state

STEPS = 20


class NoDigest:
    """In place of a checksum: costs nothing, says nothing."""

    def __init__(self, *args):
        pass

    def update(self, data):
        pass

    def digest(self):
        return bytes(8)

    def hexdigest(self):
        return "0" * 32


@contextlib.contextmanager
def without():
    """Without digests, checksums, markers and locks."""
    with contextlib.ExitStack() as stack:
        patch = lambda *what: stack.enter_context(mock.patch.object(*what))  # noqa: E731
        patch(files.xxhash, "xxh3_64", NoDigest)
        patch(shards.xxhash, "xxh3_128", NoDigest)
        patch(writing, "mark", lambda folder: None)
        patch(writing, "lock", lambda path: contextlib.nullcontext())
        patch(folders, "mark", lambda folder: None)
        patch(checkpoint, "_all_finite", lambda tree: True)
        patch(checkpoint.tensorstore_utils, "_build_zarr3_metadata", checkpoint._orbax_metadata)
        yield


def prepared(folder, source):
    out = folder / "data"
    flags = [
        "--raw",
        source / "raw",
        "--tokenizer",
        source / "tokenizer",
        "--out",
        out,
        "--max-length",
        small_data.MAX_LENGTH,
        "--workers",
        1,
    ]
    begun = time.process_time()
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(open(os.devnull, "w")):
        assert prepare.main([str(flag) for flag in flags]) == 0
    return time.process_time() - begun


def read(data):
    config = BatchConfig(size=24, row_tokens=48, microbatch_rows=16, max_length=48, negatives={"retrieval": 7, "clustering": 2})
    pipeline = Pipeline(records.load_dataset(data), "train", config, 0, None)
    begun = time.process_time()
    for step in range(STEPS):
        pipeline.step(step)
    return time.process_time() - begun


def saved(folder, state):
    checkpoints = checkpoint.open_checkpoints(epath.Path(folder / "checkpoints"), checkpoint.CheckpointConfig(every=1, keep=1))
    begun = time.process_time()
    with checkpoints:
        checkpoint.save(checkpoints, 1, state, {"decoder": {}})
    return time.process_time() - begun


def main(rounds):
    """Prints a line a job."""
    root = pathlib.Path(tempfile.mkdtemp())
    data = small_data.write(root / "source").folder
    state = fresh_state(init_decoder(SIZES["80m"], 0), OptimizerConfig(learning_rate=1e-3, warmup_steps=0, total_steps=9))
    jobs = {
        "prepare": lambda folder: prepared(folder, root / "source"),
        "reading a step": lambda folder: read(data),
        "saving a checkpoint": lambda folder: saved(folder, state),
    }
    for name, job in jobs.items():
        seconds = {True: [], False: []}
        for number in range(rounds + 1):
            for safe in (True, False) if number % 2 else (False, True):
                folder = root / "round"
                folder.mkdir()
                with contextlib.nullcontext() if safe else without():
                    taken = job(folder)
                shutil.rmtree(folder)
                if number:  # the first warms up
                    seconds[safe].append(taken)
        ratios = np.divide(seconds[True], seconds[False])
        medians = ", ".join(f"{statistics.median(seconds[safe]):.3f} s {'with' if safe else 'without'}" for safe in (True, False))
        print(f"{name}: {medians}; ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})", flush=True)
    shutil.rmtree(root)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
