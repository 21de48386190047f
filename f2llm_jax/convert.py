"""Models in and out of the Hugging Face layout: `python -m f2llm_jax.convert to-hf CKPT OUT`, `from-hf MODEL OUT`, `verify FOLDER`.

`to-hf` turns a workdir, a checkpoint or a Hugging Face folder into a release, `from-hf` turns a Hugging Face folder or Hub id
into a workdir with one checkpoint, and `verify` tells whether sentence-transformers and transformers give this project's
vectors for a release.
"""

import argparse
import pathlib
import re
import sys
from collections.abc import Sequence

from f2llm_jax.evaluation.agreement import AgreementError, compare
from f2llm_jax.model.hf_import import ModelFolderError
from f2llm_jax.model.origin import find_model
from f2llm_jax.model.stored import CheckpointError
from f2llm_jax.release import hf_folder, workdir
from f2llm_jax.release.folder import ReleaseError
from f2llm_jax.release.safetensors import DTYPES
from f2llm_jax.text import TokenizerError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}  # as transformers' save_pretrained counts


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    flags = _parser().parse_args(arguments)
    try:
        return flags.command(flags)
    except (AgreementError, CheckpointError, ModelFolderError, ReleaseError, TokenizerError, OSError) as error:
        print(f"convert: error: {error}", file=sys.stderr)
        return 1


def _to_hf(flags: argparse.Namespace) -> int:
    origin = find_model(flags.model)
    hf_folder.export(origin, flags.out, dtype=flags.dtype, max_shard_bytes=flags.max_shard_size, overwrite=flags.overwrite)
    print(f"released {flags.model} to {flags.out} in {flags.dtype}")
    return 0


def _from_hf(flags: argparse.Namespace) -> int:
    workdir.write_workdir(find_model(flags.model), flags.out, overwrite=flags.overwrite)
    print(f"imported {flags.model} to {flags.out}/checkpoints/0")
    return 0


def _verify(flags: argparse.Namespace) -> int:
    extra = pathlib.Path(flags.texts).read_text(encoding="utf-8").splitlines() if flags.texts else ()
    results = compare(flags.folder, extra)
    for result in results:
        verdict = "ok" if result.holds else f"FAILED, must be at least {result.required}"
        print(f"{result.peer:<24}{result.case:<20}worst cosine {result.cosine:.8f}  {verdict}")
    return 0 if all(result.holds for result in results) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    to_hf = commands.add_parser("to-hf", help="write a release")
    to_hf.add_argument("model", metavar="CKPT", help="workdir, WORKDIR/checkpoints/STEP, Hugging Face folder or Hub id")
    to_hf.add_argument("out", metavar="OUT", help="folder to write; exists only when complete")
    to_hf.add_argument("--dtype", choices=DTYPES, default="float32", help="of the stored weights (default float32, as trained)")
    to_hf.add_argument(
        "--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="most bytes of weights in a file: 500MB, 5GB (default)"
    )
    to_hf.add_argument("--overwrite", action="store_true", help="replace the release at OUT")
    to_hf.set_defaults(command=_to_hf)

    from_hf = commands.add_parser("from-hf", help="write a workdir")
    from_hf.add_argument("model", metavar="MODEL", help="Hugging Face folder or Hub id")
    from_hf.add_argument("out", metavar="OUT", help="folder to write; exists only when complete")
    from_hf.add_argument("--overwrite", action="store_true", help="replace the workdir at OUT, with all its checkpoints")
    from_hf.set_defaults(command=_from_hf)

    verify = commands.add_parser("verify", help="compare vectors with sentence-transformers and transformers; exit code 1 if they differ")
    verify.add_argument("folder", metavar="FOLDER", help="a release")
    verify.add_argument("--texts", metavar="FILE", help="more texts to compare, one a line")
    verify.set_defaults(command=_verify)
    return parser


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)(KB|MB|GB|)", text.upper())
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 5GB")
    return int(match[1]) * UNITS[match[2]]


if __name__ == "__main__":
    sys.exit(main())
