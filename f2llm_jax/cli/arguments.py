"""Types of command-line arguments, for `argparse`: what is not of the type is refused with the flag's name before any work."""

import argparse

COMPUTE = ("float32", "bfloat16")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def count(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def share(text: str) -> float:
    """A number between 0 and 1."""
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return number


def share_or_path(text: str) -> float | str:
    """A number between 0 and 1, else the text itself."""
    try:
        return share(text)
    except argparse.ArgumentTypeError:
        return text


def add_distributed(parser: argparse.ArgumentParser) -> None:
    """Adds `--distributed`, which `join_hosts` acts on."""
    shared = "share the texts with the other hosts of a TPU pod, a Slurm or an MPI job; all see the output folder"
    parser.add_argument("--distributed", action="store_true", help=shared)


def join_hosts(flags: argparse.Namespace) -> None:
    """Makes one JAX of all processes if `--distributed` says so; before anything else of JAX."""
    if flags.distributed:
        import jax

        jax.distributed.initialize()
