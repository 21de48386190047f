"""Prunes a model: `python -m f2llm_jax.prune --model FOLDER_OR_CKPT --target 330m --data DIR --calibration-rows N --out DIR`.

DIR becomes a workdir that training starts from (`--config.init=DIR`), with the same weights as a Hugging Face folder in DIR/model
and what stays, every score and their picture in DIR/pruning.*. What is not published, which activations decide, is a flag.
"""

import argparse
import sys
from collections.abc import Sequence

from f2llm_jax.cli.command import command
from f2llm_jax.cli.progress import Progress
from f2llm_jax.pruning.choice import CHANNELS_BY, LAYERS_BY, Method
from f2llm_jax.release.flags import add_form_flags, form_of
from f2llm_jax.storage.files import check_apart


@command("prune")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    flags = _parser().parse_args(arguments)
    from f2llm_jax import sharding
    from f2llm_jax.data.local_copy import local_dataset
    from f2llm_jax.model.decoder import count_parameters
    from f2llm_jax.pruning.prune import prune
    from f2llm_jax.release.pruned import check_out, write_pruned
    from f2llm_jax.weights.models import find_model

    check_apart(flags.out, {f"--model {flags.model}": flags.model, f"--data {flags.data}": flags.data})
    check_out(flags.out, flags.overwrite)
    source, dataset = find_model(flags.model), local_dataset(flags.data)
    method = Method(hidden_by=flags.hidden_by, ffn_by=flags.ffn_by, layers_by=flags.layers_by)
    mesh = sharding.make_mesh()
    with Progress() as progress:
        report = progress.of("calibrating", "layers")
        pruned = prune(source, flags.target, dataset, flags.calibration_rows, method, seed=flags.seed, mesh=mesh, report=report)
    write_pruned(pruned, flags.out, form_of(flags), overwrite=flags.overwrite)
    before, after = count_parameters(source.config), count_parameters(pruned.model.config)
    print(f"pruned {before:,} to {after:,} parameters on {pruned.activations.tokens:,} tokens; wrote {flags.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="workdir, WORKDIR/checkpoints/STEP, Hugging Face folder or Hub id")
    parser.add_argument("--target", required=True, help="a size by name (330m, 160m, 80m), or hidden=...,ffn=...,layers=...")
    parser.add_argument("--data", required=True, help="prepared dataset to calibrate on")
    parser.add_argument("--calibration-rows", type=int, required=True, metavar="N", help="rows drawn of its training rows")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; exists only when complete")
    parser.add_argument("--hidden-by", choices=CHANNELS_BY, default="l2", help="how hidden channels are chosen (default l2)")
    parser.add_argument("--ffn-by", choices=CHANNELS_BY, default="l2", help="how each MLP's channels are chosen (default l2)")
    parser.add_argument("--layers-by", choices=LAYERS_BY, default="first", help="how layers are chosen (default first, as published)")
    parser.add_argument("--seed", type=int, default=0, help="of the rows drawn (default 0)")
    add_form_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
