"""Runs on one page: `python -m f2llm_jax.report WORKDIR [WORKDIR ...] [--out FOLDER]`.

Losses, learning rate, gradient norm, throughput; held-out quality by width, source and language; similarities and a map of
held-out texts. Several runs are laid over each other. The page needs no network and no other file.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from f2llm_jax.cli.command import command


@command("report")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="of a run of f2llm_jax.main")
    parser.add_argument("--out", type=pathlib.Path, help="folder to write (default: WORKDIR/report of the first)")
    flags = parser.parse_args(arguments)
    from f2llm_jax.reporting.report import write_report

    page = write_report(flags.workdirs, flags.out or pathlib.Path(flags.workdirs[0]) / "report")
    print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
