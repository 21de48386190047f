"""The family of models, from 14B to 80M: `python -m f2llm_jax.family --root RUNS [--run]`.

Prints every command in order, with what it needs and makes, and marks what is in RUNS already. `--run` runs what is missing, one
command after the other; run again, it resumes where it stopped. The chain itself is configs/family.py, whose argument `toy` makes it
one for a laptop: `--config configs/family.py:toy`.
"""

import argparse
import sys
from collections.abc import Sequence

from f2llm_jax.cli.command import command
from f2llm_jax.cli.configuration import parse_flags


@command("family")
def main(arguments: Sequence[str] | None = None) -> None:
    """Prints or runs the chain."""
    parser = argparse.ArgumentParser(prog="family", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of every dataset, workdir and release of the chain")
    does = parser.add_mutually_exclusive_group()
    does.add_argument("--plan", action="store_true", help="print the chain and do nothing (default)")
    does.add_argument("--run", action="store_true", help="run what is missing")
    flags = parse_flags(parser, arguments, default="configs/family.py")
    from f2llm_jax.chain import links  # after flag parsing: --help needs no JAX
    from f2llm_jax.chain.family import family_links

    chain = family_links(flags.config, flags.root)
    if flags.run:
        links.run(chain, flags.root)
    print(links.describe(chain, flags.root))


if __name__ == "__main__":
    sys.exit(main())
