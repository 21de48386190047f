"""Trains a model: `python -m f2llm_jax.main --config configs/stage2.py:size=0.6b --workdir DIR [--config.x=y ...]`."""

from absl import app, flags, logging
from ml_collections import config_flags

from f2llm_jax.command import command

CONFIG = config_flags.DEFINE_config_file("config", None, "A configuration file, e.g. configs/stage1.py:size=0.6b.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints and metrics go; local or gs://. The same command resumes.")
COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "Of several processes: host:port of process 0, found by itself on TPU pods, GKE and Slurm."
)
COUNT = flags.DEFINE_integer("num_processes", None, "How many processes train together.", lower_bound=1)
INDEX = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
LIMIT = flags.DEFINE_integer("initialization_timeout", 300, "Seconds within which all processes must have started.", lower_bound=1)
flags.mark_flags_as_required(["config", "workdir"])


@command("main")
def main(argv: list[str]) -> int | None:
    """Runs the configured training."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; overrides are written --config.field=value")
    from f2llm_jax.training import hosts
    from f2llm_jax.training.run import run  # after flag parsing: --help needs no JAX

    logging.set_verbosity(logging.WARNING)
    place = hosts.find_place(COORDINATOR.value, COUNT.value, INDEX.value, LIMIT.value)
    run(CONFIG.value, WORKDIR.value, place, LIMIT.value)


if __name__ == "__main__":
    app.run(main)
