"""The container image: what a linter says of its Dockerfile, and its pip line run in a fresh virtual environment."""

import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LINES = [line.split(maxsplit=1) for line in (ROOT / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]


def of(instruction):
    return [rest for word, rest in LINES if word == instruction]


def test_hadolint_finds_nothing():
    linter = pathlib.Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_is_pinned_and_runs_as_nobody_special():
    bases = [line.split()[0] for line in of("FROM")]
    assert set(bases) == {"python:3.12.12-slim-bookworm"}
    assert of("USER") == ["1000"] and "--uid 1000" in of("RUN")[-1]
    assert [line for line, _ in LINES].index("USER") > max(i for i, (word, _) in enumerate(LINES) if word == "RUN")
    [install] = [line for line in of("RUN") if "pip install" in line]
    assert "--constraint constraints.txt" in install


def test_what_is_copied_is_there_and_sent_to_the_builder():
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for line in of("COPY") if "--from" not in line for name in line.split()[:-1] if not name.startswith("--")}
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.slow
def test_its_pip_line_makes_an_environment_that_trains(tmp_path):
    """The COPY and RUN lines of the first stage, with another folder for /venv and /src."""
    python = shutil.which("python3.12") or sys.executable
    if subprocess.run([python, "--version"], capture_output=True).returncode:
        python = sys.executable  # a shim without a Python behind it
    source, venv = tmp_path / "src", tmp_path / "venv"
    source.mkdir()
    for line in of("COPY"):
        *names, _ = [word for word in line.split() if not word.startswith("--")]
        if "--from" not in line and "--chown" not in line:
            for name in names:
                found = (ROOT / name).resolve()
                if found.is_dir():
                    shutil.copytree(found, source / name, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(found, source / name)
    for line in of("RUN")[:2]:
        words = shlex.split(re.sub(r"/venv\b", str(venv), line))
        done = subprocess.run([python if word == "python" else word for word in words], cwd=source, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    shutil.copytree(ROOT / "configs", tmp_path / "home" / "configs", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"}
    settings = {"cwd": tmp_path / "home", "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([venv / "bin" / "python", "-m", "f2llm_jax.main", "--help"], **settings)
    assert "--workdir WORKDIR" in done.stdout, done.stderr
    code = "import jax, gcsfs, f2llm_jax.training.run; print(jax.numpy.ones(3).sum())"
    done = subprocess.run([venv / "bin" / "python", "-c", code], **settings)
    assert done.stdout.strip() == "3.0", done.stderr
    sizes = sum(file.stat().st_size for file in venv.rglob("*") if file.is_file() and not file.is_symlink())
    print(f"{sizes / 1e9:.2f} GB")
    assert not list(venv.glob("lib/*/site-packages/torch")) and not list(venv.glob("lib/*/site-packages/apache_beam"))
