"""What a pruned start and a teacher are worth to a small model: `python -m f2llm_jax.ablation --root RUNS --config.data=DATA`.

Trains every arm of configs/ablation.py for the same number of steps, one after the other, and writes RUNS/starts.md and
RUNS/starts.png. Run again, it resumes where it stopped. `--plan` prints the commands instead.
"""

import argparse
import sys
from collections.abc import Sequence

from f2llm_jax.cli.command import command
from f2llm_jax.cli.configuration import parse_flags


@command("ablation")
def main(arguments: Sequence[str] | None = None) -> None:
    """Prints or runs the sweep."""
    parser = argparse.ArgumentParser(prog="ablation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of every workdir of the sweep")
    parser.add_argument("--plan", action="store_true", help="print the commands and do nothing")
    flags = parse_flags(parser, arguments, default="configs/ablation.py")
    from f2llm_jax.chain import links, sweep  # after flag parsing: --help needs no JAX

    if flags.plan:
        print(links.describe(sweep.sweep_links(flags.config, flags.root), flags.root))
    else:
        print(sweep.run_sweep(flags.config, flags.root, lambda name: print(f"scored {name}", file=sys.stderr, flush=True)))


if __name__ == "__main__":
    sys.exit(main())
