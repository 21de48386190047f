"""A prepared dataset in a bucket: copied once, in few requests, whole or refused, and read from the copy by every command."""

import os
import pathlib
import signal
import subprocess
import sys
import types
import urllib.parse

import faults
import gcs
import numpy as np
import pytest
import small_data

from f2llm_jax.data import local_copy as copies
from f2llm_jax.data import records
from f2llm_jax.data.local_copy import CopyError, local_copy, local_dataset
from f2llm_jax.data.pipeline import BatchConfig, Pipeline

# TFDS and Beam use what protobuf, asyncio and Python are about to drop; none of it is ours.
pytestmark = [pytest.mark.filterwarnings(f"ignore:::{module}") for module in ("tensorflow_datasets", "apache_beam")]

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_data.write(tmp_path_factory.mktemp("data")).folder


@pytest.fixture(scope="module")
def bucket(data):
    """The dataset in a bucket, 60 ms away; yields its URL, the counts of requests and bytes, and a client without the delay."""
    with gcs.emulator() as url:
        near = gcs.gcsfs.GCSFileSystem()
        near.put(str(data), f"{url}/data", recursive=True)
        behind = urllib.parse.urlsplit(os.environ["STORAGE_EMULATOR_HOST"])
        with faults.between((behind.hostname, behind.port), 0, delay=0.06) as (address, counts):
            direct, os.environ["STORAGE_EMULATOR_HOST"] = os.environ["STORAGE_EMULATOR_HOST"], address
            gcs.gcsfs.GCSFileSystem.clear_instance_cache()
            yield f"{url}/data", counts, near
            os.environ["STORAGE_EMULATOR_HOST"] = direct
    gcs.gcsfs.GCSFileSystem.clear_instance_cache()


def files(folder):
    kept = {str(path.relative_to(folder)): path.read_bytes() for path in pathlib.Path(folder).rglob("*") if path.is_file()}
    kept.pop(copies.LISTED, None)
    return kept


def test_one_request_a_file_and_no_byte_twice(bucket, data, tmp_path):
    url, counts, _ = bucket
    counts.clear()
    copy = local_dataset(url, tmp_path)
    held = files(data)
    assert files(copy.folder) == held
    assert counts["none"] <= len(held) + 3  # the files, and what lists them
    assert counts["bytes"] <= 1.1 * sum(map(len, held.values())) + 800 * len(held)  # a listing says 800 bytes of a file
    counts.clear()
    assert local_dataset(url, tmp_path).folder == copy.folder
    assert counts["none"] <= 3  # nothing but a listing


def test_a_step_of_a_bucket_is_the_step_of_a_disk_and_asks_the_bucket_nothing(bucket, data, tmp_path):
    url, counts, _ = bucket
    config = BatchConfig(size=24, row_tokens=48, microbatch_rows=16, max_length=48, row_texts=8)
    copy = local_dataset(url, tmp_path)
    counts.clear()
    there, here = (Pipeline(dataset, "train", config, 0, None) for dataset in (copy, records.load_dataset(data)))
    for one, other in zip(there.steps(0, 9), here.steps(0, 9), strict=True):
        np.testing.assert_array_equal(one.batch.texts.token_ids, other.batch.texts.token_ids)
    assert not counts["none"]
    assert isinstance(copy.tables("pairs", "train").documents, np.memmap)


def test_what_changed_in_the_bucket_is_copied_again_and_nothing_else(bucket, tmp_path):
    url, counts, near = bucket
    before = files(local_copy(url, tmp_path, last=records.COMPLETE))
    near.pipe(f"{url}/summary.json", b"{}")
    near.pipe(f"{url}/more.txt", b"new")
    near.rm(f"{url}/summary.png")
    counts.clear()
    after = files(local_copy(url, tmp_path, last=records.COMPLETE))
    assert after == {name: content for name, content in before.items() if name != "summary.png"} | {
        "summary.json": b"{}",
        "more.txt": b"new",
    }
    assert counts["none"] <= 6  # a listing, two files and dataset.json
    near.pipe(f"{url}/summary.json", before["summary.json"])
    near.pipe(f"{url}/summary.png", before["summary.png"])
    near.rm(f"{url}/more.txt")
    assert files(local_copy(url, tmp_path, last=records.COMPLETE)) == before


def test_a_dataset_that_is_not_complete_is_refused(bucket, tmp_path):
    url, _, _ = bucket
    with pytest.raises(CopyError, match=r"gs://bucket/data/tables holds no dataset.json: it is incomplete"):
        local_dataset(f"{url}/tables", tmp_path)
    assert not list(tmp_path.glob("tables*/*"))


def test_a_disk_that_is_too_small_is_refused_before_anything_is_copied(bucket, tmp_path, monkeypatch):
    url, _, _ = bucket
    monkeypatch.setattr(copies.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(CopyError, match=r"0\.0 GB free, and 0\.\d GB are to be copied there; point config\.data\.copy_to"):
        local_dataset(url, tmp_path)
    assert not any(path.is_file() and path.suffix != ".lock" for path in tmp_path.rglob("*"))


def test_a_file_that_arrives_damaged_is_refused(bucket, tmp_path, monkeypatch):
    url, _, _ = bucket
    original = gcs.gcsfs.GCSFileSystem._cat_file

    async def damaged(self, path, **range_of):
        content = await original(self, path, **range_of)
        return content.replace(b"retrieval", b"retrievel") if path.endswith("settings.json") or path.endswith("source.json") else content

    monkeypatch.setattr(gcs.gcsfs.GCSFileSystem, "_cat_file", damaged)
    gcs.gcsfs.GCSFileSystem.clear_instance_cache()  # a client keeps the methods that it was made with
    with pytest.raises(CopyError, match="changed or was damaged while it was copied"):
        local_dataset(url, tmp_path)
    monkeypatch.undo()
    gcs.gcsfs.GCSFileSystem.clear_instance_cache()
    assert local_dataset(url, tmp_path).sources  # what was whole is kept, the rest is copied


COPY = """
import os, signal, sys
from f2llm_jax.data import local_copy
finish, left = local_copy._Copy._finish, [int(sys.argv[3])]
def killed(self, *file):
    finish(self, *file)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
local_copy._Copy._finish = killed
local_copy.NOTED_EVERY, local_copy.THREADS = 0, 4
print(local_copy.local_dataset(sys.argv[1], sys.argv[2]).folder)
"""


def copying(url, folder, files_left):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COPY, url, str(folder), str(files_left)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_and_resumed_by_two_processes(bucket, data, tmp_path):
    """Killed after half of the files; then two processes of a host at once: one copies the rest, once."""
    url, counts, _ = bucket
    process = copying(url, tmp_path, len(files(data)) // 2)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob(f"*/{records.COMPLETE}"))
    counts.clear()
    both = [copying(url, tmp_path, 10**6) for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert counts["none"] < len(files(data)) // 2 + 12
    assert files(outputs[0][0].strip()) == files(data)
