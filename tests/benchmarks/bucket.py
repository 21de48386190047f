"""Training input from a bucket 60 ms away: requests, bytes and seconds of a step by reading in place, by ranges, and from a local copy.

    python tests/benchmarks/bucket.py --prepared DIR [--batch 512]

The bucket is an emulator in another process, behind a proxy that delays each request by 60 ms and counts requests and bytes.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import sys
import tempfile
import time
import urllib.parse

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import faults
import gcs
import numpy as np

from f2llm_jax.data.local_copy import local_dataset
from f2llm_jax.data.pipeline import BatchConfig, Pipeline
from f2llm_jax.data.records import load_dataset

DELAY = 0.06


def serve(folder, connection):
    """The bucket with the dataset in it; ends when the other side does."""
    with gcs.emulator() as url:
        gcs.gcsfs.GCSFileSystem().put(str(folder), f"{url}/data", recursive=True)
        behind = urllib.parse.urlsplit(os.environ["STORAGE_EMULATOR_HOST"])
        with faults.between((behind.hostname, behind.port), 0, delay=DELAY) as (address, counts):
            connection.send((f"{url}/data", address))
            while connection.recv():
                connection.send(dict(counts))
                counts.clear()


def wanted(pipeline, steps):
    """Bytes of the token ids of the distinct texts of each step."""
    total, texts = 0, 0
    for step in steps:
        planned = pipeline.planned(step)
        documents = np.unique(planned.documents[planned.documents >= 0])
        tables = pipeline._tables(planned.plan.source, "train")
        total += 4 * int(tables.document_length[documents].sum() + tables.query_length[planned.plan.rows].sum())
        texts += len(documents) + len(planned.plan.rows)
    return total, texts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepared", type=pathlib.Path, required=True)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    flags = parser.parse_args()
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(flags.prepared, theirs))
    process.start()
    url, os.environ["STORAGE_EMULATOR_HOST"] = ours.recv()

    def counted():
        ours.send(True)
        return ours.recv()

    config = BatchConfig(size=flags.batch, row_tokens=1024, microbatch_rows=64, max_length=1024, row_texts=128)

    def steps(dataset, count):
        pipeline = Pipeline(dataset, "train", config, 0, None)
        seconds = []
        for step in range(count):
            begun = time.perf_counter()
            pipeline._host_arrays(step)
            seconds.append(time.perf_counter() - begun)
        size, texts = wanted(pipeline, range(count))
        figures = counted()
        return {
            "s a step": [round(value, 2) for value in seconds],
            "distinct texts a step": texts // count,
            "wanted kB a step": size // count // 1000,
            "requests": figures.get("none", 0),
            "MB": round(figures.get("bytes", 0) / 1e6, 2),
        }

    counted()
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        dataset = local_dataset(url, folder)
        seconds, figures = time.perf_counter() - begun, counted()
        size = sum(file.stat().st_size for file in flags.prepared.rglob("*") if file.is_file())
        print(
            json.dumps(
                {
                    "copy s": round(seconds, 1),
                    "requests": figures["none"],
                    "MB": round(figures["bytes"] / 1e6, 1),
                    "dataset MB": round(size / 1e6, 1),
                }
            )
        )
        print(json.dumps({"from": "copy", **steps(dataset, 10 * flags.steps)}), flush=True)
    store, file = gcs.gcsfs.GCSFileSystem(), None
    file = max(store.find(url, detail=True).values(), key=lambda info: info["size"])
    counted()
    for threads in (32, 256):
        ranges = np.random.default_rng(0).integers(0, file["size"] - 600, 4608)
        begun = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda start: store.cat_file(file["name"], start=int(start), end=int(start) + 600), ranges))
        print(
            json.dumps({"from": f"4,608 ranges, {threads} at once", "s a step": round(time.perf_counter() - begun, 2), **counted()}),
            flush=True,
        )
    print(json.dumps({"from": "records in place", **steps(load_dataset(url), 1)}), flush=True)
    ours.send(False)
    process.join()


if __name__ == "__main__":
    main()
