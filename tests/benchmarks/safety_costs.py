"""What checksums, markers and locks cost: prepare, reading steps, saving a checkpoint; with and without, in turn.

`python tests/benchmarks/safety_costs.py [ROUNDS]` prints the median of each and the median of the paired ratios: seconds of processors,
of a save by the clock.
"""

import contextlib
import os
import pathlib
import resource
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
import pyarrow as pa
import pyarrow.parquet as pq
import small_data
import xxhash
from etils import epath

from f2llm_jax import prepare
from f2llm_jax.data import records
from f2llm_jax.data.pipeline import BatchConfig, Pipeline
from f2llm_jax.model.decoder import init_decoder
from f2llm_jax.model.sizes import SIZES
from f2llm_jax.preparation import writing
from f2llm_jax.storage import folders
from f2llm_jax.training import checkpoint
from f2llm_jax.training.optimizer import OptimizerConfig
from f2llm_jax.training.program import fresh_state

STEPS, ROWS = 20, 20_000


# Imported by every process that is started with its folder in PYTHONPATH, as the workers of `prepare` are.
WITHOUT_DIGESTS = """
import xxhash

class NoDigest:
    size = 16

    def __init__(self, *args):
        pass

    def update(self, data):
        pass

    def digest(self):
        return bytes(self.size)

    def hexdigest(self):
        return "00" * self.size

xxhash.xxh3_64 = type("NoDigest64", (NoDigest,), {"size": 8})
xxhash.xxh3_128 = NoDigest
"""


@contextlib.contextmanager
def without(folder):
    """Without digests, checksums, markers and locks; `folder` takes the file that does so in other processes."""
    (folder / "sitecustomize.py").write_text(WITHOUT_DIGESTS)
    paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    with contextlib.ExitStack() as stack:
        patch = lambda *what: stack.enter_context(mock.patch.object(*what))  # noqa: E731
        stack.enter_context(mock.patch.dict(os.environ, {"PYTHONPATH": paths}))
        patch(xxhash, "xxh3_64", xxhash.xxh3_64)  # put back at the end
        patch(xxhash, "xxh3_128", xxhash.xxh3_128)
        exec(WITHOUT_DIGESTS, {})
        patch(writing, "mark", lambda folder: None)
        patch(writing, "lock", lambda path: contextlib.nullcontext())
        patch(folders, "mark", lambda folder: None)
        patch(checkpoint, "_all_finite", lambda tree: True)
        patch(checkpoint.tensorstore_utils, "_build_zarr3_metadata", checkpoint._orbax_metadata)
        yield


def cpu_seconds():
    """Of this process and of those that it started and that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def write_raw(folder):
    """`ROWS` rows with nine negatives each, no text twice."""
    folder.mkdir()
    words = ["cat", "sat", "mat", "while", "dog", "slept", "and", "nobody", "said", "a", "word", "about", "it"]
    columns = ["query", "passage", *(f"negative_{n}" for n in range(1, 10))]
    texts = lambda column: [f"{column} {row} {' '.join(words[row % 7 :])}" for row in range(ROWS)]  # noqa: E731
    pq.write_table(pa.table({column: texts(column) for column in columns}), folder / "pairs.parquet")


def prepared(folder, source):
    flags = {
        "raw": source / "large",
        "tokenizer": source / "tokenizer",
        "out": folder / "data",
        "max-length": small_data.MAX_LENGTH,
        "workers": 1,
    }
    begun = cpu_seconds()
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(open(os.devnull, "w")):
        assert prepare.main([f"--{name}={value}" for name, value in flags.items()]) == 0
    return cpu_seconds() - begun


def read(data):
    config = BatchConfig(size=24, row_tokens=48, microbatch_rows=16, max_length=48, negatives={"retrieval": 7, "clustering": 2})
    begun = cpu_seconds()
    pipeline = Pipeline(records.load_dataset(data), "train", config, 0, None)
    for step in range(STEPS):
        pipeline.step(step)
    return cpu_seconds() - begun


def saved(folder, state):
    """By the clock, until the files are on the disk: that is what limits a save, which runs while the next steps do."""
    checkpoints = checkpoint.open_checkpoints(epath.Path(folder / "checkpoints"), checkpoint.CheckpointConfig(every=1, keep=1))
    begun = time.perf_counter()
    with checkpoints:
        checkpoint.save(checkpoints, 1, state, {"decoder": {}})
    for file in filter(pathlib.Path.is_file, (folder / "checkpoints").rglob("*")):
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    return time.perf_counter() - begun


def main(rounds):
    """Prints a line a job."""
    root = pathlib.Path(tempfile.mkdtemp())
    data = {True: small_data.write(root / "source").folder}
    with without(root):  # a dataset whose checksums are what is then expected of it
        data[False] = small_data.write(root / "unsafe").folder
    write_raw(root / "source" / "large")
    state = fresh_state(init_decoder(SIZES["80m"], 0), OptimizerConfig(learning_rate=1e-3, warmup_steps=0, total_steps=9))
    jobs = {
        "prepare": lambda folder, safe: prepared(folder, root / "source"),
        "opening a dataset and reading its steps": lambda folder, safe: read(data[safe]),
        "saving a checkpoint": lambda folder, safe: saved(folder, state),
    }
    for name, job in jobs.items():
        seconds = {True: [], False: []}
        for number in range(rounds + 1):
            for safe in (True, False) if number % 2 else (False, True):
                folder = root / "round"
                folder.mkdir()
                with contextlib.nullcontext() if safe else without(folder):
                    taken = job(folder, safe)
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
