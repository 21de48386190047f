"""Tests and demo on every supported pair of Python and JAX that this machine has the interpreter for, as a table.

    python tests/benchmarks/versions.py [--columns 3.11 3.12-middle 3.12 3.13 lowest] [--no-demo] [--no-tests]

Each column is an environment of its own, made by uv in build/versions/NAME from what pyproject.toml allows: the versions of
constraints.txt, the newest, or the lowest. In each run the tests, and the demo, whose recall on three held-out files and whose metrics
(stage 1, 480 updates with a fixed seed) are compared with the first column's. Logs are in build/versions/NAME.*.log.
"""

import argparse
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "build" / "versions"
UV = str(pathlib.Path(sys.executable).with_name("uv"))
SHOWN = ("jax", "flax", "numpy", "tokenizers", "huggingface_hub")
VERSIONS = f"import importlib.metadata as m, json; print(json.dumps({{name: m.version(name) for name in {SHOWN}}}))"


class Column(NamedTuple):
    python: str
    flags: tuple[str, ...]  # of `uv pip install`


COLUMNS = {
    "3.11": Column("3.11", ("--constraint", "constraints.txt")),
    "3.12-middle": Column("3.12", ("jax==0.11.2", "flax==0.12.12")),
    "3.12": Column("3.12", ("--upgrade",)),
    "3.13": Column("3.13", ("--upgrade",)),
    "lowest": Column("3.11", ("--resolution", "lowest-direct")),
}


def interpreter(version: str) -> str | None:
    """The newest Python of this minor version: on PATH, or among pyenv's."""
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv")) / "versions"
    installed = sorted(pyenv.glob(f"{version}.*/bin/python"), key=lambda path: int(re.findall(r"\d+", path.parts[-3])[2]))
    for candidate in (*reversed(list(map(str, installed))), shutil.which(f"python{version}")):
        if candidate and subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return candidate
    return None


def environment(name: str, column: Column, python: str) -> pathlib.Path:
    """The Python of the column's environment, made anew."""
    folder = FOLDER / name
    own = folder / "bin" / "python"
    subprocess.run([UV, "venv", "--quiet", "--clear", "--python", python, str(folder)], check=True)
    install = [UV, "pip", "install", "--quiet", "--python", str(own), *column.flags, "--editable", ".[test]"]
    if subprocess.run(install, cwd=ROOT).returncode:  # PyTorch's own index, which pyproject.toml names, is not to be reached everywhere
        subprocess.run([*install, "--no-sources"], cwd=ROOT, check=True)
    return own


def logged(name: str, what: str, command: list[str], own: pathlib.Path) -> tuple[int, str, float]:
    """Exit code, output and seconds of a command that finds the column's Python first on PATH."""
    runs_in = os.environ | {"JAX_PLATFORMS": "cpu", "PATH": f"{own.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    begun, log = time.monotonic(), FOLDER / f"{name}.{what}.log"
    with log.open("w") as file:
        code = subprocess.run(command, cwd=ROOT, env=runs_in, stdout=file, stderr=subprocess.STDOUT).returncode
    return code, log.read_text(), time.monotonic() - begun


def tests(name: str, own: pathlib.Path) -> tuple[str, bool]:
    command = [str(own), "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider"]
    code, printed, seconds = logged(name, "tests", command, own)
    counts = dict(reversed(pair) for pair in re.findall(r"(\d+) (passed|failed|skipped|error)", printed.splitlines()[-1]))
    told = ", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "failed", "error", "skipped") if kind in counts)
    return f"{told or 'did not run'} | {seconds:.0f} s", code == 0


def demo(name: str, own: pathlib.Path) -> tuple[str, str, bool]:
    """Recall@1 at full width on the three held-out files and the time; the metrics of stage 1."""
    folder = FOLDER / f"{name}.demo"
    code, printed, seconds = logged(name, "demo", ["bash", "launch/demo.sh", str(folder)], own)
    recall = re.findall(r"^full width, overall.* ([\d.]+) +[\d.]+x$", printed, re.MULTILINE)
    metrics = folder / "stage1" / "metrics.jsonl"
    return f"{' '.join(recall) or 'failed'} | {seconds:.0f} s", metrics.read_text() if metrics.exists() else "", code == 0


def difference(metrics: str, first: str) -> str:
    """Where two files of metrics part, or that they do not."""
    if metrics == first:
        return "equal"
    for one, other in itertools.zip_longest(metrics.splitlines(), first.splitlines(), fillvalue="{}"):
        found, wanted = json.loads(one), json.loads(other)
        for key in found | wanted:
            if found.get(key) != wanted.get(key):
                return f"step {wanted.get('step')}, {key}: {found.get(key)} for {wanted.get(key)}"
    return "equal but for their form"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--no-tests", dest="tests", action="store_false")
    parser.add_argument("--no-demo", dest="demo", action="store_false")
    flags = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    print("| Python | packages | tests | time | demo's recall | time | metrics |\n|---|---|---|---|---|---|---|", flush=True)
    right, first = True, None
    for name in flags.columns:
        python = interpreter(COLUMNS[name].python)
        if python is None:
            print(f"| {name} | no Python {COLUMNS[name].python} on this machine | | | | | |", flush=True)
            continue
        own = environment(name, COLUMNS[name], python)
        held = json.loads(subprocess.run([str(own), "-c", VERSIONS], check=True, capture_output=True, text=True).stdout)
        tested, tests_right = tests(name, own) if flags.tests else ("- | -", True)
        shown, metrics, demo_right = demo(name, own) if flags.demo else ("- | -", "", True)
        first = metrics if first is None else first
        packages = ", ".join(f"{package} {version}" for package, version in held.items())
        compared = difference(metrics, first) if flags.demo else "-"
        print(f"| {name} | {packages} | {tested} | {shown} | {compared} |", flush=True)
        right = right and tests_right and demo_right
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
