"""Trains a model: `python -m f2llm_jax.main --config configs/stage2.py:size=0.6b --workdir DIR [--config.FIELD=VALUE ...]`.

The same command resumes. Exit code 75 says that the run was asked to stop (SIGTERM) and its state is saved.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from f2llm_jax.cli.arguments import count, positive
from f2llm_jax.cli.command import command
from f2llm_jax.cli.configuration import parse_flags


@command("main")
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the configured training."""
    flags = parse_flags(_parser(), arguments)
    from f2llm_jax.training import hosts
    from f2llm_jax.training.resuming import Resume
    from f2llm_jax.training.run import run  # after flag parsing: --help needs no JAX

    logging.getLogger("absl").setLevel(logging.WARNING)
    place = hosts.find_place(flags.coordinator_address, flags.num_processes, flags.process_id, flags.initialization_timeout)
    resume = Resume(flags.resume_from, flags.resume_with_changes, flags.verify)
    run(flags.config, flags.workdir, place, flags.initialization_timeout, resume=resume)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="main", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="folder of checkpoints and metrics, local or gs://")
    parser.add_argument(
        "--resume_from", type=count, metavar="STEP", help="checkpoint to resume from; later ones are deleted (default: the last)"
    )
    parser.add_argument(
        "--resume_with_changes",
        action="store_true",
        help="resume although data, order, objective or teacher have changed; config.json keeps what",
    )
    parser.add_argument("--verify", action="store_true", help="first compare the checksums of all data and cached teacher vectors")
    processes = parser.add_argument_group("several processes, where they do not find one another as on TPU pods, GKE and under Slurm")
    processes.add_argument("--coordinator_address", metavar="HOST:PORT", help="of process 0")
    processes.add_argument("--num_processes", type=positive, metavar="N", help="how many train together")
    processes.add_argument("--process_id", type=count, metavar="I", help="which of them this is, from 0")
    processes.add_argument(
        "--initialization_timeout", type=positive, default=300, metavar="SECONDS", help="within which all must have started (default 300)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
