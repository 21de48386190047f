"""The family of models, from 14B to 80M: `python -m f2llm_jax.family --root RUNS [--plan | --run]`.

`--plan` (default) prints every command in order, with what it needs and makes, and marks what there is in RUNS. `--run` runs what is
missing, one command after the other; run again, it goes on where it stopped. The chain itself is `configs/family.py`, where the
argument `toy` makes it one for a laptop: `--config configs/family.py:toy`.
"""

from absl import app, flags
from ml_collections import config_flags

from f2llm_jax.command import command

CONFIG = config_flags.DEFINE_config_file("config", "configs/family.py", "The chain.", lock_config=True)
ROOT = flags.DEFINE_string("root", None, "Folder of every dataset, workdir and release of the chain.", required=True)
PLAN = flags.DEFINE_bool("plan", False, "Print the chain and do nothing; what happens without --run anyway.")
RUN = flags.DEFINE_bool("run", False, "Run what is missing.")


@command("family")
def main(argv: list[str]) -> int | None:
    """Prints or runs the chain; an error is one line on stderr and exit code 1."""
    if len(argv) > 1 or (PLAN.value and RUN.value):
        raise app.UsageError("pass either --plan or --run, and overrides as --config.field=value")
    from f2llm_jax.chain import links
    from f2llm_jax.chain.family import family_links

    chain = family_links(CONFIG.value, ROOT.value)
    if RUN.value:
        links.run(chain, ROOT.value)
    print(links.describe(chain, ROOT.value))


if __name__ == "__main__":
    app.run(main)
