"""Where does a small model's quality come from? `python -m f2llm_jax.ablation --root RUNS --config.data=DATA`.

Trains every arm of `configs/ablation.py` for the same number of steps, one after the other, and writes RUNS/starts.md and
RUNS/starts.png. Run again, it goes on where it stopped. `--plan` prints the commands instead.
"""

import sys

from absl import app, flags
from ml_collections import config_flags

from f2llm_jax.command import command

CONFIG = config_flags.DEFINE_config_file("config", "configs/ablation.py", "The sweep.", lock_config=True)
ROOT = flags.DEFINE_string("root", None, "Folder of every workdir of the sweep.", required=True)
PLAN = flags.DEFINE_bool("plan", False, "Print the commands and do nothing.")


@command("ablation")
def main(argv: list[str]) -> int | None:
    """Prints or runs the sweep; an error is one line on stderr and exit code 1."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; overrides are written --config.field=value")
    from f2llm_jax.chain import links, sweep

    if PLAN.value:
        print(links.describe(sweep.sweep_links(CONFIG.value, ROOT.value), ROOT.value))
    else:
        print(sweep.run_sweep(CONFIG.value, ROOT.value, lambda name: print(f"scored {name}", file=sys.stderr, flush=True)))


if __name__ == "__main__":
    app.run(main)
