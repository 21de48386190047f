"""Commands on all devices of a host, and of two hosts: the vectors of one device, the work dealt evenly, nothing twice after a kill."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_data
import tiny

from f2llm_jax.data import teacher_cache
from f2llm_jax.release import hf_folder

# TFDS and Beam use what protobuf, asyncio and Python are about to drop; none of it is ours.
pytestmark = [pytest.mark.filterwarnings(f"ignore:::{module}") for module in ("tensorflow_datasets", "apache_beam")]

# A command on so many devices, as one of several processes. It writes to a file of its own how many texts it has encoded (standard
# output is shared with Gloo, which prints when it likes), and is killed by itself after so many batches of them if asked.
PROGRAM = """
import json, os, signal, sys
import jax
result, devices, port, process, processes, kill_after, name, *flags = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", int(devices))
if int(processes) > 1:
    jax.distributed.initialize(f"localhost:{port}", int(processes), int(process))
from f2llm_jax.data import teacher_cache
from f2llm_jax.inference import encode
teacher_cache.SHARD_TEXTS, encode.BLOCK_TEXTS = 128, 64
original, texts, calls = encode.TextEncoder.encode_ids, [], []
def counted(self, ids):
    if int(kill_after) and len(calls) == int(kill_after):
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(1)
    texts.append(len(ids))
    assert int(devices) == 1 or self._mesh.size == int(devices)
    return original(self, ids)
encode.TextEncoder.encode_ids = counted
import importlib
code = importlib.import_module(f"f2llm_jax.{name}").main(flags)
with open(result, "w") as file:
    json.dump({"code": code, "texts": sum(texts)}, file)
"""
LINES = [
    f"{text} {i}" for i in range(40) for text in ("the cat sat", "die Katze saß auf der Matte " * (i % 5), "猫", "a dog", "on the mat")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("share")
    hf_folder.export(tiny.origin(folder / "tokenizer", max_length=48), folder / "model", hf_folder.ReleaseForm(golden=False))
    (folder / "lines.txt").write_text("".join(f"{line}\n" for line in LINES))
    return folder


@pytest.fixture(scope="module")
def data(folder):
    return small_data.write(folder / "prepared").folder


def run(name, *flags, devices=1, processes=1, kill_after=0, environments=None):
    """What each process wrote at its end; None for one that was killed.

    Args:
      environments: variables of each process besides this one's.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as results:
        files = [pathlib.Path(results, f"{i}.json") for i in range(processes)]
        words = [
            [sys.executable, "-c", PROGRAM, file, devices, port, i, processes, kill_after, name, *flags] for i, file in enumerate(files)
        ]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        running = [
            subprocess.Popen([str(w) for w in one], env={**os.environ, **own}, **pipes)
            for one, own in zip(words, environments or [{}] * processes, strict=True)
        ]
        for process in running:
            _, err = process.communicate(timeout=400)
            # Of two, the second may be ended by JAX before it kills itself.
            assert process.returncode in ((-signal.SIGKILL, -signal.SIGABRT) if kill_after else (0,)), err
        return [None if kill_after else json.loads(file.read_text()) for file in files]


def test_embed(folder):
    flags = ["--model", folder / "model", "--input", folder / "lines.txt"]
    alone = run("embed", *flags, "--output", folder / "one.npy")
    assert alone == [{"code": 0, "texts": len(set(LINES))}]
    want = np.load(folder / "one.npy")
    run("embed", *flags, "--output", folder / "eight.npy", devices=8)
    np.testing.assert_allclose(np.load(folder / "eight.npy"), want, atol=1e-5)
    both = run("embed", *flags, "--output", folder / "two.npy", devices=2, processes=2)
    np.testing.assert_allclose(np.load(folder / "two.npy"), want, atol=1e-5)
    texts = [one["texts"] for one in both]
    assert sum(texts) == len(set(LINES)) and min(texts) > 0.4 * len(set(LINES))
    assert not list(folder.glob("*.vectors"))


@pytest.mark.slow
def test_a_hub_model_is_downloaded_by_one_host_for_all(folder, data):
    """Only the first host's cache of the Hub, offline, has the model."""
    hub = folder / "hub/models--owner--name"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs/main").write_text("0" * 40)
    shutil.copytree(folder / "model", hub / "snapshots" / ("0" * 40))
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "nothing")}
    hosts = {"processes": 2, "environments": [offline | {"HF_HUB_CACHE": str(folder / "hub")}, offline]}
    (folder / "some.jsonl").write_text("".join(json.dumps({"query": line, "passage": f"{line} here"}) + "\n" for line in LINES[:60]))
    lines, pairs, model = folder / "lines.txt", folder / "some.jsonl", ("--model", "owner/name")
    run("embed", *model, "--input", lines, "--output", folder / "hub.npy", **hosts)
    run("embed", "--model", folder / "model", "--input", lines, "--output", folder / "disk.npy")
    np.testing.assert_allclose(np.load(folder / "hub.npy"), np.load(folder / "disk.npy"), atol=1e-5)
    run("cache_teacher", *model, "--data", data, "--dims", 32, "--max-length", 48, "--out", folder / "hub-cache", **hosts)
    loose = ("--negatives", 2, "--skip", 0, "--max-score", "none", "--max-relative", "none", "--near-duplicate", 2)
    run("mine", *model, "--queries", pairs, "--out", folder / "hub-mined", *loose, **hosts)
    run("recall", *model, "--pairs", pairs, "--cache", folder / "hub-recall", **hosts)
    assert (folder / "hub-mined/some.parquet").exists()


@pytest.mark.slow
def test_embed_killed_and_run_again_encodes_nothing_twice(folder):
    flags = ["--model", folder / "model", "--input", folder / "lines.txt", "--output", folder / "killed.npy"]
    run("embed", *flags, kill_after=1)  # after the first of three blocks
    assert not (folder / "killed.npy").exists()
    [again] = run("embed", *flags)
    assert again == {"code": 0, "texts": len(set(LINES)) - 64}
    run("embed", *flags[:-1], folder / "undisturbed.npy")
    np.testing.assert_allclose(np.load(folder / "killed.npy"), np.load(folder / "undisturbed.npy"), atol=1e-5)


def vectors(cache):
    """Every shard of a complete cache, by its name."""
    assert (cache / teacher_cache.COMPLETE).exists()
    return {"/".join(path.relative_to(cache).parts[1:]): np.load(path) for path in sorted(cache.glob("*/*/*/*.npy"))}


@pytest.mark.slow
def test_cache_teacher(folder, data):
    flags = ["--model", folder / "model", "--data", data, "--dims", 32, "--max-length", 48, "--dtype", "float32"]
    [alone] = run("cache_teacher", *flags, "--out", folder / "cache1")
    want = vectors(folder / "cache1")
    run("cache_teacher", *flags, "--out", folder / "cache8", devices=8)
    run("cache_teacher", *flags, "--out", folder / "cache2", devices=2, processes=2, kill_after=9)
    both = run("cache_teacher", *flags, "--out", folder / "cache2", devices=2, processes=2)
    for name in ("cache8", "cache2"):
        got = vectors(folder / name)
        assert got.keys() == want.keys()
        for shard in want:
            np.testing.assert_allclose(got[shard], want[shard], atol=1e-5)
    total = alone["texts"]
    texts = [one["texts"] for one in both]
    assert sum(texts) <= total - 9 * 100  # some shards were there already
    assert abs(texts[0] - texts[1]) <= 10 * 128


@pytest.mark.slow
def test_cache_teacher_in_bfloat16_is_another_cache(folder, data):
    flags = ["--model", folder / "model", "--data", data, "--dims", 32, "--max-length", 48, "--dtype", "float32"]
    run("cache_teacher", *flags, "--out", folder / "cache-bf16", "--compute", "bfloat16")
    plain = folder / "cache-f32"
    run("cache_teacher", *flags, "--out", plain)
    half, full = (np.concatenate(list(vectors(path).values())) for path in (folder / "cache-bf16", plain))
    assert 1e-4 < np.abs(half - full).max() / np.abs(full).max() < 0.1


@pytest.mark.slow
def test_recall(folder):
    table = {
        "query": LINES[:100],
        "instruction": [""] * 100,
        "document": [f"{line} here" for line in LINES[:100]],
        "language": ["en"] * 100,
    }
    pq.write_table(pa.table(table), folder / "pairs.parquet")
    flags = ["--model", folder / "model", "--pairs", folder / "pairs.parquet", "--json"]
    run("recall", *flags, folder / "one.json")
    run("recall", *flags, folder / "eight.json", devices=8)
    both = run("recall", *flags, folder / "two.json", "--cache", folder / "recall-vectors", processes=2)
    assert (folder / "one.json").read_text() == (folder / "eight.json").read_text() == (folder / "two.json").read_text()
    assert min(one["texts"] for one in both) > 0.3 * sum(one["texts"] for one in both)


@pytest.mark.slow
def test_evaluate(folder):
    """Two hosts run every task, encode half of the texts each, and one of them writes."""
    rows = {"sentence1": LINES[:60], "sentence2": LINES[60:120], "score": [float(i % 6) for i in range(60)]}
    pq.write_table(pa.table(rows), folder / "sts.parquet")
    manifest = {"tasks": [{"name": "Similar", "type": "STS", "file": "sts.parquet", "languages": ["eng-Latn"]}]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    flags = ["--model", folder / "model", "--manifest", folder / "manifest.json", "--dims", "16,full", "--out"]
    [alone] = run("evaluate", *flags, folder / "eval1")
    both = run("evaluate", *flags, folder / "eval2", processes=2, devices=2)
    assert sum(one["texts"] for one in both) == alone["texts"]

    def scores(out):
        return {
            str(path.relative_to(out)): json.loads(path.read_text())["scores"]["test"][0]["main_score"]
            for path in out.rglob("Similar.json")
        }

    one, two = scores(folder / "eval1"), scores(folder / "eval2")
    assert one.keys() == two.keys() and len(one) == 2
    np.testing.assert_allclose(list(one.values()), list(two.values()), atol=1e-4)
