"""`prepare` killed again and again, or on several Beam workers, gives what it gives undisturbed in one process."""

import hashlib
import shutil
import subprocess
import sys
import time

import kills
import pytest
from small_raw import command, rows, write, write_tokenizer

from f2llm_jax.data import records

KILLS = 10


def digests(folder):
    """Of every file but the settings, which name the raw files' times, and TFDS's own description, which names its folder."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "dataset_info.json"
    }


@pytest.mark.slow
def test_ten_kills_change_nothing(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "bpe")
    for i in range(6):
        write(tmp_path / "raw", f"source{i}", rows(1_500, 4, start=10_000 * i))
    run = [sys.executable, "-m", "f2llm_jax.prepare", *command(tmp_path / "raw", tokenizer, tmp_path / "killed"), "--workers", "2"]
    whole = [part.replace(str(tmp_path / "killed"), str(tmp_path / "whole")) for part in run]
    begun = time.monotonic()
    assert subprocess.run(whole, capture_output=True, timeout=600).returncode == 0
    took = time.monotonic() - begun

    def killed(number):
        assert not (tmp_path / "killed").exists()
        if number < KILLS and number % 3 == 2:  # from nothing again, so that early moments are hit too
            shutil.rmtree(tmp_path / "killed.partial", ignore_errors=True)

    kills.at_random(run, KILLS, took, lambda: shutil.rmtree(tmp_path / "killed"), killed)
    done = subprocess.run(run, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    assert records.load_dataset(tmp_path / "killed").sources == records.load_dataset(tmp_path / "whole").sources


@pytest.mark.slow
def test_several_beam_workers_give_the_same(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "bpe")
    write(tmp_path / "raw", "source", rows(1_500, 4))
    for name, flags in {"one": [], "two": ["--beam", "--direct_num_workers=2 --direct_running_mode=multi_processing"]}.items():
        run = [sys.executable, "-m", "f2llm_jax.prepare", *command(tmp_path / "raw", tokenizer, tmp_path / name), *flags]
        done = subprocess.run(run, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
