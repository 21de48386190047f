"""Training runs small enough for tests: their settings, and the real commands in processes of their own."""

import json
import os
import pathlib
import sys

import jax
import numpy as np
import small_data

from f2llm_jax.weights.checkpoint_reader import find_checkpoint

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 30
OVERRIDES = {
    "steps": STEPS,
    "remat": "none",
    "log_every": 10,
    "batch.size": 24,
    "batch.max_length": small_data.MAX_LENGTH,
    "batch.row_tokens": small_data.MAX_LENGTH,
    "batch.row_texts": 8,
    "batch.microbatch_rows": 16,
    "batch.negatives.clustering": 2,
    "objective.matryoshka_minimum": 64,
    "optimizer.learning_rate": 4e-3,
    "optimizer.warmup_steps": 5,
    "eval.every": 15,
    "checkpoint.every": 5,
    "checkpoint.keep": 9,
}
TRAIN = ("-m", "f2llm_jax.main")


def train_command(data, workdir, *flags, python=TRAIN, **overrides):
    """To train on `data`; overrides of fields have `__` for a dot."""
    fields = {"data.folder": data} | OVERRIDES | {name.replace("__", "."): value for name, value in overrides.items()}
    settings = [f"--config.{name}={value}" for name, value in fields.items()]
    return [sys.executable, *python, f"--config={ROOT}/configs/stage2.py:runlocal", f"--workdir={workdir}", *settings, *flags]


def environment(devices=1, cache=None, **more):
    """Of a command on so many fake devices, compiled quickly, once for all commands that share `cache`."""
    found = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": str(devices), "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    if cache:
        found |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    return found | more


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    return {line["step"]: line["loss"] for line in metrics(workdir) if "loss" in line}


def assert_same_weights(one, other):
    for got, want in zip(jax.tree.leaves(find_checkpoint(one).load()), jax.tree.leaves(find_checkpoint(other).load()), strict=True):
        np.testing.assert_array_equal(got, want)
