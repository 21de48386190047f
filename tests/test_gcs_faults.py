"""A bucket as workdir behind a network that fails one request in ten: trained, killed, gone on with, exported, nothing lost."""

import os
import signal
import subprocess
import sys
import urllib.parse

import faults
import gcs
import kills
import pytest
from small_runs import TRAIN, assert_same_weights, environment, train_command

pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning", "ignore::ResourceWarning"),
    pytest.mark.slow,
]

STEPS, KILLED_AT = 8, (3, 6)
SHARE = 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def data(small_dataset):
    return small_dataset.folder


def run(folder, words, address=None):
    """A command of this project, which sees the bucket at `address`."""
    more = {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address} if address else {}
    runs_in = environment(1, folder / "compiled", GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false", **more)
    return subprocess.run(words, cwd=folder, env=runs_in, capture_output=True, text=True, timeout=600)


def training(data, workdir, python=TRAIN):
    return train_command(data, workdir, python=python, steps=STEPS, checkpoint__every=2, checkpoint__keep=2, eval__every=4)


def release(workdir, out):
    return [sys.executable, "-m", "f2llm_jax.convert", "to-hf", workdir, out]


def test_nothing_is_lost_in_a_bucket_behind_a_bad_network(data, folder):
    plain = run(folder, training(data, "undisturbed"))
    assert plain.returncode == 0, plain.stderr
    with gcs.emulator() as bucket:
        behind = urllib.parse.urlsplit(os.environ["STORAGE_EMULATOR_HOST"])
        with faults.between((behind.hostname, behind.port), SHARE) as (address, counts):
            for killed_at in KILLED_AT:
                done = run(folder, training(data, f"{bucket}/run", kills.at_step(killed_at)), address)
                assert done.returncode == -signal.SIGKILL, done.stderr
            done = run(folder, training(data, f"{bucket}/run"), address)
            assert done.returncode == 0 and "resumes at step" in done.stderr, done.stderr
            done = run(folder, release(f"{bucket}/run", "exported"), address)
            assert done.returncode == 0, done.stderr
        print(dict(counts))  # shown by pytest -s; noted in docs/log.md
        assert min(counts[fault] for fault in ("503", "cut before", "cut after")) >= 5
        kept = gcs.gcsfs.GCSFileSystem()
        for name in ("metrics.jsonl", "config.json", "dataset.json", "tokenizer/tokenizer.json"):
            assert kept.cat(f"{bucket}/run/{name}") == (folder / "undisturbed" / name).read_bytes(), name
        log = kept.cat(f"{bucket}/run/logs/host-0.log").decode()
        assert log.count(" started: ") == len(KILLED_AT) + 1 and log.rstrip().endswith("done")
        assert_same_weights(f"{bucket}/run", folder / "undisturbed")
    done = run(folder, release("undisturbed", "plain"))
    assert done.returncode == 0, done.stderr
    assert (folder / "exported" / "model.safetensors").read_bytes() == (folder / "plain" / "model.safetensors").read_bytes()
