"""Widths to cut embeddings to, as commands take them."""

import argparse

FULL = "full"


def parse_dims(text: str) -> list[str]:
    """The parts of "8,32,full", each a positive number or `FULL`.

    Raises:
      argparse.ArgumentTypeError: a part is neither.
    """
    dims = text.split(",")
    if wrong := [dim for dim in dims if dim != FULL and not (dim.isdecimal() and int(dim))]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is neither a width nor {FULL!r}")
    return dims
