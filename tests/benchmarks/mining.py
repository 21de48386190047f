"""Exact search by blocks against faiss's exact flat search: memory and time.

    python tests/benchmarks/mining.py --scratch DIR [--documents 1000000 --queries 20000 --dim 256 --k 100 --threads 2]

Both search the same random unit vectors in one sitting, each in a process of its own, faiss (`pip install faiss-cpu`) before and
after. Memory is the peak of a process's resident set, its vectors included; ours reads them from the shards of a store.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import time

import numpy as np


def make(folder: pathlib.Path, flags: argparse.Namespace) -> None:
    """Shards as a store has them, of clustered unit vectors: cosines between 0 and 1, not all near 0."""
    from f2llm_jax.mining.vectors import SHARD_TEXTS

    draw = np.random.default_rng(0)
    centres = draw.standard_normal((1000, flags.dim), np.float32)
    folder.mkdir(parents=True)
    for name, count in (("documents", flags.documents), ("queries", flags.queries)):
        for start in range(0, count, SHARD_TEXTS):
            size = min(SHARD_TEXTS, count - start)
            vectors = centres[draw.integers(0, len(centres), size)] + draw.standard_normal((size, flags.dim), np.float32)
            np.save(folder / f"{name}-{start:08d}.npy", vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def load(folder: pathlib.Path, name: str) -> np.ndarray:
    return np.concatenate([np.load(path) for path in sorted(folder.glob(f"{name}-*.npy"))])


def ours(folder: pathlib.Path, flags: argparse.Namespace) -> tuple[float, np.ndarray]:
    """The search of `python -m f2llm_jax.mine`, vectors read from disk as often as it does."""
    import jax

    from f2llm_jax import sharding
    from f2llm_jax.mining.nearest import BLOCK_DOCUMENTS, nearest
    from f2llm_jax.mining.search import QUERY_SHARDS
    from f2llm_jax.mining.vectors import SHARD_TEXTS, VectorShard, VectorStore

    store = VectorStore(folder, [], flags.dim, "float32", load=lambda: None)
    shards = {
        name: [VectorShard(f"{name}-{a:08d}", a, min(a + SHARD_TEXTS, count)) for a in range(0, count, SHARD_TEXTS)]
        for name, count in (("documents", flags.documents), ("queries", flags.queries))
    }
    mesh = sharding.make_mesh(devices=jax.local_devices())
    found, begun = [], time.monotonic()
    for start in range(0, len(shards["queries"]), QUERY_SHARDS):
        queries = store.read(shards["queries"][start : start + QUERY_SHARDS])
        excluded = np.full((len(queries), 1), -1, np.int32)
        found.append(nearest(queries, store.blocks(shards["documents"], BLOCK_DOCUMENTS), flags.k, excluded, mesh)[1])
    return time.monotonic() - begun, np.concatenate(found)


def faiss(folder: pathlib.Path, flags: argparse.Namespace) -> tuple[float, np.ndarray]:
    import faiss

    faiss.omp_set_num_threads(flags.threads)
    documents, queries = load(folder, "documents"), load(folder, "queries")
    index = faiss.IndexFlatIP(flags.dim)
    index.add(documents)
    del documents
    begun = time.monotonic()
    _, found = index.search(queries, flags.k)
    return time.monotonic() - begun, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", required=True, type=pathlib.Path)
    for name, value in (("documents", 1_000_000), ("queries", 20_000), ("dim", 256), ("k", 100), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only", choices=("ours", "faiss"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    folder = flags.scratch / "vectors"
    if flags.only:
        seconds, index = {"ours": ours, "faiss": faiss}[flags.only](folder, flags)
        np.save(flags.scratch / f"{flags.only}.npy", index)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"who": flags.only, "seconds": round(seconds, 1), "peak_gib": round(peak, 2)}), flush=True)
        return
    if not folder.exists():
        make(folder, flags)
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: flags.threads]))
    for who in ("faiss", "ours", "faiss"):
        subprocess.run([sys.executable, *sys.argv, "--only", who], check=True)
    a, b = (np.load(flags.scratch / f"{who}.npy") for who in ("ours", "faiss"))
    print(
        json.dumps(
            {
                "equal_neighbours": float((a == b).mean()),
                "equal_sets": float(np.mean([len(set(x) & set(y)) / len(x) for x, y in zip(a, b, strict=True)])),
            }
        )
    )


if __name__ == "__main__":
    main()
