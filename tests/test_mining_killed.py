"""`mine` killed again and again, or on two hosts, gives what it gives undisturbed on one, and encodes no shard twice."""

import shutil
import socket
import subprocess
import sys
import time

import kills
import pytest
from small_mining import assert_same, export_model, write_pairs

KILLS = 10
# The command with small shards, on two devices, as a process of its own or as one of two.
PROGRAM = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
port, process, *flags = sys.argv[1:]
if port != "0":
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
from f2llm_jax import mine
from f2llm_jax.mining import nearest, search, vectors
vectors.SHARD_TEXTS = search.SHARD_TEXTS = 64
nearest.TILE_QUERIES = 16
sys.exit(mine.main(flags))
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    export_model(folder)
    write_pairs(folder / "pairs.parquet", rows=1500)
    return folder


def command(prepared, out, port=0, process=0):
    flags = ["--model", prepared / "model", "--queries", prepared / "pairs.parquet", "--out", out, "--cache", f"{out}.cache"]
    rules = ["--negatives", "8", "--max-score", "none", "--max-relative", "none"]
    return [sys.executable, "-c", PROGRAM, str(port), str(process), *map(str, flags), *rules]


@pytest.fixture(scope="module")
def whole(prepared):
    begun = time.monotonic()
    done = subprocess.run(command(prepared, prepared / "whole"), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return prepared / "whole", time.monotonic() - begun


def complete(cache):
    """Every complete shard, and which file it is."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in cache.rglob("*.np?")}


@pytest.mark.slow
def test_ten_kills_change_nothing(prepared, whole):
    folder, took = whole
    run, out, cache = command(prepared, prepared / "killed"), prepared / "killed", prepared / "killed.cache"
    seen, added = {}, []

    def killed(number):
        now = complete(cache)
        assert now.items() >= seen.items()  # what was complete is the very same file
        added.append(len(now) > len(seen))
        seen.update(now)

    def finished():
        assert_same(out, folder)
        shutil.rmtree(out)
        shutil.rmtree(cache)
        seen.clear()

    kills.at_random(run, KILLS, 0.9 * took, finished, killed)
    done = subprocess.run(run, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert complete(cache).items() >= seen.items() and sum(added) > 2
    assert_same(out, folder)


@pytest.mark.slow
def test_two_hosts_give_the_files_of_one(prepared, whole):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(command(prepared, prepared / "two", port, i), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for i in range(2)
    ]
    told = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert_same(prepared / "two", whole[0])
    a, b = (
        {path.relative_to(f): path.read_bytes() for path in f.rglob("*.np?")} for f in (prepared / "two.cache", prepared / "whole.cache")
    )
    assert a == b and len(a) > 40  # vectors and neighbours too, bit for bit
