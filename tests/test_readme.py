"""The commands of README.md are run as they are written there, one after the other, with toy data and a toy model in the place of paths."""

import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_raw import INSTRUCTION, rows, write, write_tokenizer
from small_runs import OVERRIDES, environment

from f2llm_jax.__main__ import COMMANDS

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
WRITTEN = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.startswith("python -m f2llm_jax.")]
# In a toy's place of what a laptop has not.
TOY = {
    r"size=\w[\w.]*": "runlocal",
    r"--config\.init=Qwen/\S+": "",
    r"Qwen3-0\.6B/": "tokenizer",
    r"RUNS/stage2-1\.7b": "RUNS/stage1",
    r"--target 330m": "--target hidden=64,ffn=128",
    r"--calibration-rows 1024": "--calibration-rows 64",
    r"--dims 1024 --max-length 1024": "--dims 128 --max-length 48",
    r"--(out|workdir) RAW\b": r"--\1 MINED",
}
# Why a command cannot run here at all.
ELSEWHERE = {
    "gs://": "a bucket",
    "--benchmark": "mteb's own data",
    "--topology": "libtpu; see `make tpu-check`",
    "finetune": "a model; see tests/test_finetune.py",
}
TRAINING = {name: value for name, value in OVERRIDES.items() if not name.startswith("checkpoint")} | {"steps": 4, "eval.every": 2}


def in_small(command):
    """The words of a command of the README for the toy."""
    for written, toy in TOY.items():
        command = re.sub(written, toy, command)
    words = shlex.split(command)
    if words[2] == "f2llm_jax.main":
        words += [f"--config.{name}={value}" for name, value in TRAINING.items()]
    if words[2] == "f2llm_jax.mine":  # after four steps all texts are about as near as the positive
        words += ["--max-relative", "none", "--max-score", "none"]
    return [sys.executable, *words[1:]]


@pytest.fixture
def folder(tmp_path):
    """The files that the README speaks of."""
    write_tokenizer(tmp_path / "tokenizer")
    write(tmp_path / "RAW", "pairs", rows(300, 3), {"pairs": "retrieval", "topics": "clustering"})
    write(tmp_path / "RAW", "topics", rows(120, 2, start=1000))
    (tmp_path / "PAIRS").mkdir()
    for name, start in (("one", 2000), ("two", 3000)):
        table = {key: column for key, column in rows(300, 1, start).items() if key in ("query", "passage")}
        pq.write_table(pa.table(table), tmp_path / "PAIRS" / f"{name}.parquet")
    (tmp_path / "texts.txt").write_text("the cat\nthe dog\n")
    pairs = [{"sentence1": f"cat {i}", "sentence2": f"{INSTRUCTION}{i}"} for i in range(30)]
    (tmp_path / "bitext.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (tmp_path / "my_tasks.json").write_text(json.dumps({"tasks": [{"name": "Own", "type": "BitextMining", "file": "bitext.jsonl"}]}))
    return tmp_path


def test_every_command_is_one():
    assert {line.split()[2].removeprefix("f2llm_jax.") for line in WRITTEN} <= set(COMMANDS)
    assert len(WRITTEN) >= 15


@pytest.mark.slow
def test_the_commands_run_in_their_order(folder):
    ran = 0
    for command in WRITTEN:
        if any(part in command for part in ELSEWHERE):
            continue
        words = in_small(command)
        words = [file for word in words for file in (sorted(map(str, folder.glob(word))) if "*" in word else [word])]
        runs_in = environment(1, folder / "compiled")
        done = subprocess.run(words, cwd=folder, env=runs_in, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr}"
        ran += 1
    assert ran == len(WRITTEN) - sum(any(part in command for part in ELSEWHERE) for command in WRITTEN)
    made = ("MODEL/model.safetensors", "vectors.npy", "MINED/summary.json", "EVAL/results", "REPORT/report.html", "RUNS/pruned-330m/model")
    for name in made:
        assert (folder / name).exists(), name
    shutil.rmtree(folder / "compiled", ignore_errors=True)
