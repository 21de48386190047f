"""Configuration files as commands take them: `--config configs/stage2.py:size=0.6b,runlocal --config.batch.size=256`.

A configuration file is a Python program with `get_config(arg) -> ml_collections.ConfigDict`. A file that the working directory does not
have is looked up among those that come with the package (`stage2`, `stage2.py` and `configs/stage2.py` all name the same one), so
commands run from anywhere; a file of one's own builds on them by `from f2llm_jax.configs import common`.
"""

import argparse
import ast
import difflib
import importlib.util
import pathlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import ml_collections

from f2llm_jax.errors import UserError

SHIPPED = pathlib.Path(__file__).parents[1] / "configs"
PREFIX = "--config."
TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def parse_flags(parser: argparse.ArgumentParser, arguments: Sequence[str] | None, default: str | None = None) -> argparse.Namespace:
    """Parses the command line of a `parser` to which `--config` is added; `flags.config` is the configuration, overridden and
    locked; `flags.overrides` are the fields that were overridden with their values as typed.

    Raises:
      UserError: there is no such file or field, or a value is not of its field's type.
    """
    parser.add_argument(
        "--config",
        required=default is None,
        default=default,
        metavar="FILE[:ARG]",
        help="configuration file, e.g. configs/stage2.py:size=0.6b" + (f" (default {default})" if default else ""),
    )
    parser.epilog = "Any field of the configuration is overridden by --config.FIELD=VALUE, e.g. --config.optimizer.learning_rate=1e-5."
    flags, rest = parser.parse_known_args(arguments)
    flags.overrides = _overrides(parser, rest)
    flags.config_file = flags.config
    flags.config = load(flags.config, flags.overrides)
    return flags


def load(reference: str, overrides: Sequence[tuple[str, str]] = ()) -> ml_collections.ConfigDict:
    """The configuration of `FILE[:ARG]` with `(field, value)` overrides as typed on a command line, locked.

    Raises:
      UserError: there is no such file or field, or a value is not of its field's type.
    """
    name, _, argument = reference.partition(":")
    file = find(name)
    module = _program(file)
    if not hasattr(module, "get_config"):
        raise UserError(f"{file} defines no get_config(arg); see {SHIPPED / 'stage2.py'} for one that does")
    config = module.get_config(argument or None)
    for field, value in overrides:
        override(config, field, value)
    return config.lock()


def defaults(size: str) -> ml_collections.ConfigDict:
    """Every field of a run at its default, that of configs/common.py, for a model of `size`; of 0.6b where that has no row there."""
    common = _program(SHIPPED / "common.py")
    config: ml_collections.ConfigDict = common.base(size if size in common.LEARNING_RATE else "0.6b", runlocal=False, stage=2)
    return config


def find(name: str) -> pathlib.Path:
    """The configuration file `name`: as it is, or one that comes with the package.

    Raises:
      UserError: there is none; the message lists those that come with the package.
    """
    given = pathlib.Path(name)
    shipped = SHIPPED / f"{given.stem}.py"
    if given.is_file():
        return given
    if given.parent.name in ("", "configs") and not given.is_absolute() and shipped.is_file():
        return shipped
    names = ", ".join(sorted(f"configs/{file.name}" for file in SHIPPED.glob("[!_]*.py") if file.name != "common.py"))
    raise UserError(f"{name}: there is no such configuration file; give a path or one of {names}")


def override(config: ml_collections.ConfigDict, field: str, value: str) -> None:
    """Sets `field` ("optimizer.learning_rate") to `value`, read as the type that the field has.

    Raises:
      UserError: there is no such field, or the value is of another type.
    """
    *groups, name = field.split(".")
    group: Any = config
    for part in groups:
        group = group[part] if isinstance(group, ml_collections.ConfigDict) and part in group else None
    if not isinstance(group, ml_collections.ConfigDict) or name not in group:
        raise UserError(f"config.{field}: there is no such field; {_nearest(config, field)}")
    if isinstance(group[name], ml_collections.ConfigDict):
        raise UserError(f"config.{field} is a group; set one of its fields: {', '.join(f'config.{field}.{key}' for key in group[name])}")
    group[name] = _parsed(field, value, group[name])


def _program(file: pathlib.Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(f"f2llm_jax_config_{file.stem}", file)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _overrides(parser: argparse.ArgumentParser, rest: Sequence[str]) -> list[tuple[str, str]]:
    found, words = [], list(rest)
    while words:
        word = words.pop(0)
        field, equals, value = word.removeprefix(PREFIX).partition("=")
        if not word.startswith(PREFIX) or not (equals or words):
            parser.error(f"unrecognized argument {word!r}; fields of the configuration are written {PREFIX}FIELD=VALUE")
        found.append((field, value if equals else words.pop(0)))
    return found


def _parsed(field: str, value: str, before: Any) -> Any:
    try:
        if isinstance(before, bool):
            return TRUTH[value.lower()]
        if isinstance(before, int | float):
            return type(before)(value)
        if before and isinstance(before, tuple) and isinstance(before[0], str) and not value.startswith(("(", "[")):
            return tuple(part for part in value.split(",") if part)
        if isinstance(before, tuple):
            read = ast.literal_eval(value or "()")
            return tuple(read) if isinstance(read, tuple | list) else (read,)
        return value
    except (KeyError, ValueError, SyntaxError) as error:
        raise UserError(f"config.{field}={value}: must be of type {type(before).__name__}, as the default {before!r}") from error


def _nearest(config: ml_collections.ConfigDict, field: str) -> str:
    """Fields by spelling, first those of the last name alone; `lr` finds `learning_rate` by its initials."""
    fields = _fields(config)
    last = field.split(".")[-1]
    short = [path for path in fields if "".join(word[0] for word in path.split(".")[-1].split("_")) == last]
    by_name = {path.split(".")[-1]: path for path in fields}
    close = [by_name[name] for name in difflib.get_close_matches(last, by_name, n=2)]
    found = list(dict.fromkeys([*short, *difflib.get_close_matches(field, fields, n=1), *close]))
    return f"did you mean {' or '.join(f'config.{path}' for path in found[:3])}?" if found else f"there are: {', '.join(fields)}"


def _fields(config: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
    fields: list[str] = []
    for name, value in config.items():
        fields += _fields(value, f"{prefix}{name}.") if isinstance(value, ml_collections.ConfigDict) else [prefix + name]
    return fields
