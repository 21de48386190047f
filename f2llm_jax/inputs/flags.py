"""Flags that choose columns, the same in every command."""

import argparse


def add_column_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--columns` and `--ignore-columns`."""
    parser.add_argument("--columns", type=pairs, default=[], help="columns of other names, as in query=question,passage=title+answer")
    parser.add_argument(
        "--ignore-columns", type=_names, default=(), metavar="NAMES", help='columns to leave out, or patterns, as in "id,*_scores"'
    )


def pair(text: str) -> tuple[str, str]:
    """`key=value`.

    Raises:
      argparse.ArgumentTypeError: it is not of that form.
    """
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value")
    return key, value


def pairs(text: str) -> list[tuple[str, str]]:
    """`key=value,key=value`.

    Raises:
      argparse.ArgumentTypeError: it is not of that form, or a key repeats.
    """
    found = [pair(part) for part in text.split(",")]
    keys = [key for key, _ in found]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise argparse.ArgumentTypeError(f"{text!r} gives {twice[0]!r} twice; join columns with +, as in {twice[0]}=title+text")
    return found


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))
