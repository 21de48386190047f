"""Will it fit, and how fast can it be? Compiles the training step ahead of time, for TPUs that this machine does not have.

    python -m f2llm_jax.compile_check --config configs/stage2.py:size=14b --topology v5p:4x4x4
    python -m f2llm_jax.compile_check --config configs/stage2.py:size=0.6b --topology v5e:2x4 --slices 2 --teacher 1.7b --config.mesh.data=2

The step is the real one: optimizer, teacher, matryoshka, packing, chunks. Needs libtpu (`pip install -e '.[tpu]'`), no TPU.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from f2llm_jax.cli.arguments import positive
from f2llm_jax.cli.command import command
from f2llm_jax.cli.configuration import parse_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # with libtpu installed JAX would look for a TPU here


@command("compile_check")
def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles and prints."""
    flags = parse_flags(_parser(), arguments)
    from f2llm_jax.compilation import check, report  # after flag parsing: --help needs no JAX

    request = check.Request(flags.config, flags.topology, flags.slices, flags.teacher, flags.tokens_per_text)
    found = check.search(request, lambda line: print(line, file=sys.stderr, flush=True)) if flags.search else check.check(request)
    if flags.json:
        report.write_report(found, flags.json)
    print(report.describe(found))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="compile_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", required=True, help="slice to compile for: v5e:2x4, v6e:4x4, v5p:4x4x4, tpu7x:2x2x1, ...")
    parser.add_argument("--slices", type=positive, default=1, help="number of such slices, over which mesh.data is split (default 1)")
    parser.add_argument("--teacher", default="", metavar="SIZE", help="size of the online teacher (default: none)")
    parser.add_argument("--tokens_per_text", type=int, default=0, help="length of every text (default: stored lengths of several sources)")
    parser.add_argument("--search", action="store_true", help="find the largest batch.microbatch_rows that fits, by doubling")
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON, too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
