"""What pyproject.toml asks for, constraints.txt pins and the commands name as an extra is one and the same."""

import pathlib
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from f2llm_jax.cli.command import EXTRAS
from f2llm_jax.jax_version import LAST_TESTED

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()]
LINUX = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "platform_python_implementation": "CPython"}


def of_extra(name):
    """Requirements of an extra, those of the extras that it takes in included."""
    for line in PROJECT["optional-dependencies"][name]:
        requirement = Requirement(line)
        if requirement.name == PROJECT["name"]:
            for inner in requirement.extras:
                yield from of_extra(inner)
        else:
            yield requirement


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_the_locked_versions_are_those_that_are_asked_for(python):
    where = LINUX | {"python_version": python, "python_full_version": f"{python}.0"}
    pins = {canonicalize_name(pin.name): pin for pin in PINS if not pin.marker or pin.marker.evaluate(where)}
    wanted = [Requirement(line) for line in PROJECT["dependencies"]] + [
        one for name in PROJECT["optional-dependencies"] for one in of_extra(name)
    ]
    for requirement in wanted:
        (pin,) = pins[canonicalize_name(requirement.name)].specifier
        assert pin.operator == "==" and pin.version in requirement.specifier, f"{requirement}, locked is {pin}: make lock"


def test_training_asks_for_nothing_that_an_extra_is_for():
    core = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    assert core & {canonicalize_name(name) for name in EXTRAS} == set()


@pytest.mark.parametrize("package", EXTRAS)
def test_a_package_is_named_with_an_extra_that_brings_it(package):
    assert canonicalize_name(package) in {canonicalize_name(one.name) for one in of_extra(EXTRAS[package])}


def test_the_last_tested_jax_is_the_last_that_is_allowed():
    (jax,) = (Requirement(line) for line in PROJECT["dependencies"] if re.match(r"jax\b", line))
    major, minor = LAST_TESTED
    assert f"{major}.{minor}.99" in jax.specifier and f"{major}.{minor + 1}.0" not in jax.specifier


def test_both_ways_to_install_name_one_lowest_python():
    lowest = re.search(r"version_info < \((\d+), (\d+)\)", (ROOT / "setup.py").read_text())
    assert PROJECT["requires-python"] == f">={lowest[1]}.{lowest[2]}"
