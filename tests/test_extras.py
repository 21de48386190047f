"""What is imported when: `--help` needs no JAX, training none of the extras, and what is missing is named with its extra."""

import subprocess
import sys

import pytest

from f2llm_jax.__main__ import COMMANDS

HEAVY = {"jax", "flax", "optax", "orbax", "grain", "torch", "transformers", "huggingface_hub"}
OF_EXTRAS = {"apache_beam", "babel", "gcsfs", "matplotlib", "mteb", "sentence_transformers", "torch", "transformers"}


def python(code, *arguments, blocked=()):
    """Runs `code` in a process of its own that finds none of the `blocked` packages."""
    block = f"import sys; sys.modules.update(dict.fromkeys({sorted(blocked)})); "
    return subprocess.run([sys.executable, "-c", block + code, *arguments], capture_output=True, text=True)


def modules(code):
    """The packages that `code` has imported at its end."""
    done = python(code + "\nprint(*{name.partition('.')[0] for name in sys.modules})")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_nothing_heavy(command):
    code = f"""
from f2llm_jax import {command}
try:
    {command}.main(["--help"])
except SystemExit as end:
    assert not end.code"""
    found = modules(code)
    assert "f2llm_jax" in found and found & HEAVY == set()


def test_training_imports_no_extra():
    assert modules("import f2llm_jax.training.run") & (OF_EXTRAS | {"tensorboardX"}) == set()


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        (["demo_data", "--out", "OUT"], "babel", "demo"),
        (["report", "OUT"], "matplotlib", "report"),
        (["mine", "--queries", "OUT", "--model", "OUT", "--out", "OUT"], "matplotlib", "report"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(tmp_path, command, package, extra):
    arguments = [str(tmp_path / part) if part == "OUT" else part for part in command]
    done = python("from f2llm_jax.__main__ import main; sys.exit(main())", *arguments, blocked={package})
    message = f"{command[0]}: error: {package} is not installed; run: pip install 'f2llm-jax[{extra}]'"
    assert (done.returncode, done.stderr.splitlines()) == (1, [message])
    assert not (tmp_path / "OUT").exists()
