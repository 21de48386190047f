"""Average checkpoints of one architecture: `python -m f2llm_jax.merge --out DIR CKPT_OR_FOLDER ...`.

Each input is a workdir, WORKDIR/checkpoints/STEP, a Hugging Face folder or a Hub id, in any dtype; a workdir alone means
its last checkpoints. DIR becomes a release. Tensors pass through memory block by block.
"""

import argparse
import sys
from collections.abc import Sequence

from f2llm_jax.cli.arguments import positive
from f2llm_jax.cli.command import command
from f2llm_jax.errors import UserError
from f2llm_jax.release.flags import add_form_flags, form_of
from f2llm_jax.storage.files import check_apart

LAST = 5  # the published trainer keeps its last five "for ckpt merging"


@command("merge")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    flags = _parser().parse_args(arguments)
    from f2llm_jax.release import hf_folder
    from f2llm_jax.release.merge import merge
    from f2llm_jax.weights.models import find_model

    if flags.last and len(flags.models) > 1:
        raise UserError(f"--last {flags.last} goes with one workdir, and {len(flags.models)} models are named; drop it")
    check_apart(flags.out, {f"input {model}": model for model in flags.models})
    merged = merge([find_model(name) for name in _names(flags.models, flags.last or LAST)], flags.weights)
    hf_folder.export(merged, flags.out, form_of(flags), overwrite=flags.overwrite)
    print(f"wrote the {merged.name} to {flags.out}")
    return 0


def _names(models: Sequence[str], last: int) -> list[str]:
    """The inputs, a lone workdir replaced by its last checkpoints; step 0 is what training started from."""
    if len(models) > 1:
        return list(models)
    from f2llm_jax.weights.checkpoint_reader import steps_of

    return [f"{models[0]}/checkpoints/{step}" for step in steps_of(models[0]) if step > 0][-last:]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="merge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="CKPT_OR_FOLDER", help="models of one architecture and tokenizer")
    parser.add_argument("--out", required=True, metavar="DIR", help="release to write, local or gs://")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="one a model, in any unit (default: equal)")
    parser.add_argument("--last", type=positive, metavar="N", help=f"checkpoints of a lone workdir (default {LAST})")
    add_form_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
