"""The example in `examples/` runs by itself and learns."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def test_the_minimal_training_learns():
    command = [sys.executable, "examples/train_minimal.py", "--steps", "60", "--held-out", "500"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    before, after = map(float, re.findall(r"recall@1 \w+ training ([\d.]+)", done.stdout))
    assert after > 1.3 * before, done.stdout


def test_the_minimal_training_stays_minimal():
    lines = (ROOT / "examples" / "train_minimal.py").read_text().splitlines()
    assert len(lines) <= 120 and not [line for line in lines if "configs" in line or "ml_collections" in line]
