"""Models in and out of the Hugging Face layout.

    python -m f2llm_jax.convert to-hf CKPT OUT         a workdir, a checkpoint or a Hugging Face folder as a release
    python -m f2llm_jax.convert from-hf MODEL OUT      a Hugging Face folder or Hub id as a workdir with one checkpoint
    python -m f2llm_jax.convert inspect FOLDER         what would be computed of a model, and what of its folder is ignored and why
    python -m f2llm_jax.convert verify FOLDER          do sentence-transformers and transformers give this project's vectors?
    python -m f2llm_jax.convert push FOLDER REPO_ID    what would be uploaded; with --yes, the upload

Models are copied block by block: no device is needed, and memory is bounded by one layer's largest matrix. CKPT and OUT of
`to-hf` may be `gs://` paths.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from f2llm_jax.cli.command import command
from f2llm_jax.errors import UserError
from f2llm_jax.release.flags import TOKEN_VARIABLE, add_form_flags, form_of
from f2llm_jax.storage.files import check_apart, check_new_file, write_json

if TYPE_CHECKING:
    import numpy as np


@command("convert")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    flags = _parser().parse_args(arguments)
    return flags.command(flags)


def _to_hf(flags: argparse.Namespace) -> int:
    from f2llm_jax.release import hf_folder  # here and below after the flags are parsed: --help needs no JAX
    from f2llm_jax.weights.checkpoint_reader import steps_of
    from f2llm_jax.weights.models import find_model
    from f2llm_jax.weights.truncation import Truncation

    if flags.all_steps:
        pairs = [(f"{flags.model}/checkpoints/{step}", f"{flags.out}/step-{step}") for step in steps_of(flags.model)]
    else:
        pairs = [(flags.model, flags.out)]
    left = Truncation(flags.layers, flags.table_rank, flags.refactorise)
    if flags.projections and flags.truncate_dim:
        raise UserError("--projections map the model's full width to its teachers' spaces; leave out --truncate-dim")
    if flags.refactorise and not flags.table_rank:
        raise UserError("--refactorise needs the rank of the table: add --table-rank Z")
    for model, out in pairs:
        check_apart(out, {f"CKPT {model}": model})
        hf_folder.check_out(out, flags.overwrite)  # all of them before the first is written
    for model, out in pairs:
        factored = find_model(model, dataclasses.replace(left, factored=True)) if flags.factors else None
        if factored and not factored.config.table_rank:
            raise UserError(f"{model} has a plain embedding table and no factors; leave out --factors")
        projections = _projections(model) if flags.projections else ()
        source, form = find_model(model, left), form_of(flags)
        hf_folder.export(source, out, form, overwrite=flags.overwrite, factored=factored, projections=projections)
        print(f"released {model} to {out} in {flags.dtype}")
    return 0


def _projections(model: str) -> "list[np.ndarray]":
    """The projections of a run.

    Raises:
      UserError: it has none.
    """
    from f2llm_jax.weights.checkpoint_reader import find_checkpoint

    if not (projections := find_checkpoint(model).load_projections()):
        raise UserError(f"{model} was trained without config.objective.projection; leave out --projections")
    return projections


def _from_hf(flags: argparse.Namespace) -> int:
    from f2llm_jax.release import workdir
    from f2llm_jax.weights.describe import describe
    from f2llm_jax.weights.models import find_model

    check_apart(flags.out, {f"MODEL {flags.model}": flags.model})
    model = find_model(flags.model)
    workdir.write_workdir(model, flags.out, overwrite=flags.overwrite)
    print(describe(model), file=sys.stderr)
    print(f"imported {flags.model} to {flags.out}/checkpoints/0")
    return 0


def _inspect(flags: argparse.Namespace) -> int:
    from f2llm_jax.weights.describe import describe
    from f2llm_jax.weights.models import find_model

    print(describe(find_model(flags.model)))
    return 0


def _verify(flags: argparse.Namespace) -> int:
    from f2llm_jax.release.verify import compare

    if flags.json:
        check_new_file(flags.json)
    extra = pathlib.Path(flags.texts).read_text(encoding="utf-8").splitlines() if flags.texts else ()
    results = compare(flags.folder, extra)
    for result in results:
        verdict = "ok" if result.holds else f"FAILED, must be at least {result.required}"
        print(f"{result.peer:<24}{result.case:<22}worst cosine {result.cosine:.8f}  {verdict}")
    agree = all(result.holds for result in results)
    if flags.json and agree:
        write_json(flags.json, [dataclasses.asdict(result) for result in results])
    return 0 if agree else 1


def _push(flags: argparse.Namespace) -> int:
    from f2llm_jax.release.push import files_to_push, push

    for name, size in files_to_push(flags.folder):
        print(f"{size:>16,}  {name}")
    if not flags.yes:
        print(f"nothing was sent; pass --yes to upload to {flags.repo_id} with the token in {TOKEN_VARIABLE}")
        return 0
    print(f"pushed to {push(flags.folder, flags.repo_id, private=flags.private)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    to_hf = commands.add_parser("to-hf", help="write a release")
    to_hf.add_argument("model", metavar="CKPT", help="workdir, WORKDIR/checkpoints/STEP, Hugging Face folder or Hub id")
    to_hf.add_argument("out", metavar="OUT", help="folder to write; exists only when complete")
    to_hf.add_argument("--all-steps", action="store_true", help="every checkpoint of the workdir CKPT, each to OUT/step-STEP")
    to_hf.add_argument("--layers", type=int, metavar="N", help="the first N layers alone, of a model trained with layer_matryoshka")
    to_hf.add_argument("--table-rank", type=int, metavar="Z", help="an embedding table of rank Z, of a model trained with table_rank")
    to_hf.add_argument(
        "--refactorise", action="store_true", help="with --table-rank: the nearest table of that rank, which need not have been trained"
    )
    to_hf.add_argument("--factors", action="store_true", help="also write the two factors of the table, to factors/embedding.safetensors")
    dense = "also write the projections to its teachers, as Dense modules of sentence-transformers, to projections/0 and on"
    to_hf.add_argument("--projections", action="store_true", help=dense)
    add_form_flags(to_hf)
    to_hf.set_defaults(command=_to_hf)

    from_hf = commands.add_parser("from-hf", help="write a workdir")
    from_hf.add_argument("model", metavar="MODEL", help="Hugging Face folder or Hub id")
    from_hf.add_argument("out", metavar="OUT", help="folder to write; exists only when complete")
    from_hf.add_argument("--overwrite", action="store_true", help="replace the workdir at OUT, with all its checkpoints")
    from_hf.set_defaults(command=_from_hf)

    inspect = commands.add_parser("inspect", help="print what would be computed of a model")
    inspect.add_argument("model", metavar="FOLDER", help="Hugging Face folder, local or gs://, Hub id, workdir or WORKDIR/checkpoints/STEP")
    inspect.set_defaults(command=_inspect)

    verify = commands.add_parser("verify", help="compare vectors with sentence-transformers and transformers; exit code 1 if they differ")
    verify.add_argument("folder", metavar="FOLDER", help="a release")
    verify.add_argument("--texts", metavar="FILE", help="more texts to compare, one a line")
    verify.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the worst cosines to this file, if all vectors agree")
    verify.set_defaults(command=_verify)

    push_command = commands.add_parser("push", help="list what would be uploaded to the Hugging Face Hub, or upload it")
    push_command.add_argument("folder", metavar="FOLDER", help="a release")
    push_command.add_argument("repo_id", metavar="REPO_ID", help="owner/name on the Hub")
    push_command.add_argument("--yes", action="store_true", help=f"upload, with the token in {TOKEN_VARIABLE}")
    push_command.add_argument("--private", action="store_true", help="make the repository private if it is new")
    push_command.set_defaults(command=_push)
    return parser


if __name__ == "__main__":
    sys.exit(main())
