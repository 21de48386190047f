"""Embeds a text file: `python -m f2llm_jax.embed --model FOLDER --input FILE.txt --output X.npy`.

One text a line in, one normalised float32 vector a row out. Give queries the instruction of their task, documents none. All devices of
this host are used, with --distributed those of several. What a killed run has encoded lies in OUTPUT.vectors; the same command resumes.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from etils import epath

from f2llm_jax.arguments import COMPUTE, add_distributed, join_hosts, positive
from f2llm_jax.command import command
from f2llm_jax.errors import UserError
from f2llm_jax.files import new_file
from f2llm_jax.progress import Progress


@command("embed")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    flags = _parser().parse_args(arguments)
    join_hosts(flags)
    shape = _embed(flags)
    print(f"wrote {shape[0]:,} vectors of {shape[1]} dimensions to {flags.output}")
    return 0


def _embed(flags: argparse.Namespace) -> tuple[int, int]:
    import jax.numpy as jnp
    import numpy as np

    from f2llm_jax.inference.devices import all_here, is_first, local_mesh
    from f2llm_jax.inference.encode import load_encoder, truncate_and_normalize
    from f2llm_jax.inference.vector_cache import CachedEncoder
    from f2llm_jax.text import query_prompt
    from f2llm_jax.weights.digest import model_digest
    from f2llm_jax.weights.models import find_model

    texts = _read_lines(flags.input)
    origin = find_model(flags.model)
    dim = flags.dim or origin.width
    if dim > origin.width:
        raise UserError(f"--dim {dim} exceeds the {origin.width} dimensions of {flags.model}")
    encoder = load_encoder(origin, mesh=local_mesh(), dtype=jnp.dtype(flags.dtype), chunk_tokens=flags.batch_tokens)
    cache = epath.Path(f"{flags.output}.vectors")
    prompt = flags.prompt or query_prompt(flags.instruction)
    with Progress() as progress:
        cached = CachedEncoder(encoder, cache, model=model_digest(origin))
        vectors = truncate_and_normalize(cached.encode(texts, prompt, dim, progress.of("embedding", "texts")), dim)
    if is_first():
        with new_file(flags.output) as file:  # an open file, because np.save gives a path without .npy that ending
            np.save(file, vectors)
    all_here("written")
    if is_first():
        cache.rmtree()
    return vectors.shape


def _read_lines(path: pathlib.Path) -> list[str]:
    """The lines of a UTF-8 file, an empty one included; only line feeds end a line."""
    try:
        with path.open(encoding="utf-8") as file:  # iteration, because str.splitlines also splits at U+2028 and the like
            lines = [line.removesuffix("\n") for line in file]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}); convert it with iconv") from error
    if not lines:
        raise UserError(f"{path} is empty; write one text a line")
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="embed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder, Hub id, workdir or WORKDIR/checkpoints/STEP")
    parser.add_argument("--input", required=True, type=pathlib.Path, help="UTF-8 text file, one text a line")
    parser.add_argument("--output", required=True, type=pathlib.Path, help=".npy file to write; exists only when complete")
    parser.add_argument("--dim", type=positive, help="keep so many leading dimensions (default: all)")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", default="", help="put this before every text as it is")
    prompts.add_argument("--instruction", default="", help='describe the task of queries; they become "Instruct: ...\\nQuery: text"')
    parser.add_argument("--dtype", choices=COMPUTE, default=COMPUTE[0], help="compute dtype (default float32)")
    parser.add_argument("--batch-tokens", type=positive, help="tokens on the device at once; memory only (default: by device)")
    add_distributed(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
