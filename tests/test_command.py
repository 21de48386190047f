"""How commands end when whoever reads their output leaves."""

import os
import subprocess
import sys

import pytest

from f2llm_jax.cli.command import UNREAD


@pytest.mark.parametrize("words", [[], ["embed", "--help"]])
def test_a_closed_pipe_is_no_traceback(words):
    reads, writes = os.pipe()
    os.close(reads)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-m", "f2llm_jax", *words], stdout=writes, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writes)
    assert (done.returncode, done.stderr) == (UNREAD, "")
