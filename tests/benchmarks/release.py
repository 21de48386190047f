"""Random weights of a real size: folder to checkpoint to bfloat16 release, bit for bit, with time, rate and memory.

    python tests/benchmarks/release.py --size 8b --scratch /some/disk

Each conversion is the user's own command in a process of its own. Its memory is sampled from /proc: anonymous pages are what
the process holds; pages of mapped files are the files' own cache, which the kernel may drop. The tokenizer is a tiny one.
8b needs about 50 GB of disk; the folder is removed at the end.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import ml_dtypes
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import tiny

from f2llm_jax.model.sizes import SIZES
from f2llm_jax.release import hf_folder
from f2llm_jax.text import load_tokenizer
from f2llm_jax.weights.embedding_config import EmbeddingConfig
from f2llm_jax.weights.models import ModelSource
from f2llm_jax.weights.parameters import parameter_shapes

SAMPLE_SECONDS = 0.05


class RandomParameters:
    """Normal numbers that bfloat16 holds exactly, made as they are asked for."""

    def __init__(self, shapes):
        self._shapes = shapes
        self._pool = np.random.default_rng(0).normal(0, 0.02, 2**24 + 3).astype(ml_dtypes.bfloat16).astype(np.float32)

    def unit(self, entry):
        return 1

    def read(self, entry, start, stop):
        shape = (stop - start, *self._shapes[entry][1:])
        return np.resize(np.roll(self._pool, 7919 * start), shape)  # the pool's odd length keeps layers and rows apart


def write_random_folder(folder, size, scratch):
    config = SIZES[size]
    source = ModelSource(
        name="random",
        config=config,
        open_params=lambda: contextlib.nullcontext(RandomParameters(parameter_shapes(config))),
        tokenizer=load_tokenizer(tiny.write_tokenizer(scratch / "tokenizer")),
        embedding=EmbeddingConfig(max_length=1024),
    )
    hf_folder.export(source, folder, hf_folder.ReleaseForm(dtype="bfloat16", golden=False))
    return source


def measured(module, *arguments):
    """Runs a command; seconds, and the peak of anonymous and of all resident memory in GiB."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", module, *map(str, arguments)])
    peaks = {"RssAnon": 0, "VmRSS": 0}

    def sample():
        while process.poll() is None:
            try:
                status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            for line in status.splitlines():
                name, _, value = line.partition(":")
                if name in peaks:
                    peaks[name] = max(peaks[name], int(value.split()[0]) * 1024)
            time.sleep(SAMPLE_SECONDS)

    sampler = threading.Thread(target=sample)
    sampler.start()
    code = process.wait()
    sampler.join()
    if code:
        raise SystemExit(f"{arguments} failed with {code}")
    return time.perf_counter() - start, peaks["RssAnon"] / 2**30, peaks["VmRSS"] / 2**30


def folder_bytes(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def digests(folder):
    """By file of weights."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors*")):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def report(what, seconds, anonymous, resident, size, tensors):
    line = {"what": what, "size": size, "seconds": round(seconds, 1), "MB/s of bfloat16": round(tensors / 1e6 / seconds)}
    print(json.dumps({**line, "anonymous GiB": round(anonymous, 2), "resident GiB": round(resident, 2)}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="80m")
    parser.add_argument("--scratch", type=pathlib.Path, required=True, help="folder to make and to remove")
    flags = parser.parse_args()
    flags.scratch.mkdir(parents=True)
    try:
        first, run, second = flags.scratch / "first", flags.scratch / "run", flags.scratch / "second"
        source = write_random_folder(first, flags.size, flags.scratch)
        tensors = folder_bytes(first)
        print(json.dumps(dataclasses.asdict(source.config)), flush=True)
        report("from-hf", *measured("f2llm_jax.convert", "from-hf", first, run), flags.size, tensors)
        wanted = digests(first)
        shutil.rmtree(first)  # the disk need not hold both folders
        report("to-hf", *measured("f2llm_jax.convert", "to-hf", run, second, "--dtype", "bfloat16", "--no-golden"), flags.size, tensors)
        print(json.dumps({"checkpoint GB": folder_bytes(run) / 1e9, "release GB": tensors / 1e9, "equal bits": digests(second) == wanted}))
    finally:
        shutil.rmtree(flags.scratch)


if __name__ == "__main__":
    main()
