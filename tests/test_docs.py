"""The documentation: every command parses with the real parsers, every block is executed or says why not, links and navigation hold."""

import argparse
import ast
import importlib
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import yaml
from small_runs import environment

from f2llm_jax.__main__ import COMMANDS
from f2llm_jax.cli import configuration

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Pages whose blocks are executed, in this order, in one folder: a page uses what those before it made.
EXECUTED = ["index.md", "finetune.md", "api.md", "objectives/own.md", "loggers.md"]
BLOCK = re.compile(r"(?P<mark><!-- not run: (?P<why>[^\n]+) -->\n)?```(?P<language>bash|python)\n(?P<code>.*?)```", re.DOTALL)
PAGES = {str(page.relative_to(DOCS)): page.read_text(encoding="utf-8") for page in sorted(DOCS.rglob("*.md")) if page.name != "log.md"}
BLOCKS = [(page, block) for page, text in PAGES.items() for block in BLOCK.finditer(text)]


def commands(code):
    """Command lines of the package in a block of shell: `(module, arguments)`."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] == ["python", "-m"] and words[2].startswith("f2llm_jax.") and "data.inspect" not in words[2]:
            yield words[2].removeprefix("f2llm_jax."), words[3:]


class Parsed(Exception):
    """The command line was understood."""


SHELL = [(page, *found) for page, block in BLOCKS if block["language"] == "bash" for found in commands(block["code"])]


def test_every_block_is_executed_or_says_why_not():
    assert [(page, block["code"][:60]) for page, block in BLOCKS if not block["mark"] and page not in EXECUTED] == []


@pytest.mark.parametrize(("page", "name", "arguments"), SHELL, ids=[f"{page}-{name}-{i}" for i, (page, name, _) in enumerate(SHELL)])
def test_every_command_parses(page, name, arguments, monkeypatch):
    """Flags, required arguments and fields of configurations are those of the commands as they are; no work is begun."""

    def then_stop(function):
        def wrapped(*args, **kwargs):
            function(*args, **kwargs)
            raise Parsed

        return wrapped

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", then_stop(argparse.ArgumentParser.parse_args))
    monkeypatch.setattr(configuration, "load", then_stop(configuration.load))
    assert name in COMMANDS, f"{page}: no command {name}"
    with pytest.raises(Parsed):
        importlib.import_module(f"f2llm_jax.{name}").main(arguments)


PYTHON = [(page, block["code"]) for page, block in BLOCKS if block["language"] == "python"]


@pytest.mark.parametrize(("page", "code"), PYTHON, ids=[f"{page}-{i}" for i, (page, _) in enumerate(PYTHON)])
def test_every_python_block_is_python(page, code):
    ast.parse(code, page)


def test_links_lead_somewhere_and_so_does_the_navigation():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#\s]+\.md)[^)]*\)", text):
            if "://" not in target:
                assert ((DOCS / page).parent / target).resolve().is_file(), f"{page}: {target}"
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = set(re.findall(r"[\w/]+\.md", nav))
    assert listed <= set(PAGES) and set(EXECUTED) <= listed


def test_every_loss_has_its_page():
    index = PAGES["objectives/index.md"]
    for page in (page for page in PAGES if page.startswith("objectives/") and page != "objectives/index.md"):
        assert f"({page.removeprefix('objectives/')})" in index
        if page != "objectives/own.md":
            assert all(part in PAGES[page] for part in ("**Shapes", "**When")), page


@pytest.mark.slow
def test_the_pages_do_what_they_say(tmp_path):
    """Block by block, in a folder that is empty at first."""
    runs_in = environment(1, tmp_path / "compiled")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    runs_in["PATH"] = f"{tmp_path / 'bin'}:{runs_in['PATH']}"
    for name in EXECUTED:
        code = ""
        for block in BLOCK.finditer(PAGES[name]):
            if block["mark"]:
                continue
            if block["language"] == "python":
                code += block["code"]  # the blocks of a page are one session
                command = [sys.executable, "-c", code]
            else:
                command = ["bash", "-euo", "pipefail", "-c", block["code"]]
            done = subprocess.run(command, cwd=tmp_path, env=runs_in, capture_output=True, text=True, timeout=3600)
            assert done.returncode == 0, f"{name}:\n{block['code']}\n{done.stdout}\n{done.stderr}"
    assert yaml.safe_load((tmp_path / "MODEL" / "config.json").read_text())["model_type"] == "qwen3"
