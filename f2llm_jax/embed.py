"""Embeds a file of texts: `python -m f2llm_jax.embed --model FOLDER --input FILE.txt --output X.npy`.

One text a line or row in, one normalised float32 vector a row out; an empty text is a text. Other forms than lines of text, with a column
`text` and optionally `title`, are those of docs/data.md. Give queries the instruction of their task, documents none. All devices of this
host are used, with --distributed those of several. What a killed run has encoded is in OUTPUT.vectors; the same command resumes.
"""

import argparse
import sys
from collections.abc import Sequence

from etils import epath

from f2llm_jax.cli.arguments import COMPUTE, add_distributed, join_hosts, positive
from f2llm_jax.cli.command import command
from f2llm_jax.cli.progress import Progress
from f2llm_jax.errors import UserError
from f2llm_jax.inputs.columns import ColumnChoice, check_ignored
from f2llm_jax.inputs.fields import TEXTS, read_fields
from f2llm_jax.inputs.flags import add_column_flags
from f2llm_jax.storage.files import check_apart, check_new_file, new_file
from f2llm_jax.storage.locks import lock


@command("embed")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    flags = _parser().parse_args(arguments)
    join_hosts(flags)
    print(_embed(flags))
    return 0


def _embed(flags: argparse.Namespace) -> str:
    import jax.numpy as jnp
    import numpy as np

    from f2llm_jax.inference.devices import all_here, is_first, local_mesh
    from f2llm_jax.inference.encode import load_encoder, truncate_and_normalize
    from f2llm_jax.inference.shared_model import find_shared
    from f2llm_jax.inference.vector_cache import CachedEncoder
    from f2llm_jax.text import query_prompt
    from f2llm_jax.weights.digest import model_digest

    check_apart(flags.output, {f"--input {flags.input}": flags.input, f"--model {flags.model}": flags.model})
    check_new_file(flags.output)
    choice = ColumnChoice(dict(flags.columns), flags.ignore_columns)
    fields = read_fields(flags.input, TEXTS, {"text": "any text", "title": "optional text"}, choice)
    check_ignored(choice)
    texts = fields.joined()
    for line in fields.describe():
        print(line)
    cache = epath.Path(f"{flags.output}.vectors")
    origin = find_shared(flags.model, cache)
    dim = flags.dim or origin.width
    if dim > origin.width:
        raise UserError(f"--dim {dim} exceeds the {origin.width} dimensions of {flags.model}")
    template = origin.embedding.instruction_template
    prompt = origin.embedding.resolve_prompt(flags.prompt) if flags.prompt else query_prompt(flags.instruction, template)
    encoder = load_encoder(origin, mesh=local_mesh(), dtype=jnp.dtype(flags.dtype), chunk_tokens=flags.batch_tokens)
    with Progress() as progress:
        progress.begin("compiling and embedding")
        cached = CachedEncoder(encoder, cache, model=model_digest(origin))
        vectors = truncate_and_normalize(cached.encode(texts, prompt, dim, progress.of("embedding", "texts")), dim)
    if is_first():
        with lock(flags.output), new_file(flags.output) as file:  # an open file, because np.save gives a path without .npy that ending
            np.save(file, vectors)
    all_here("written")
    if is_first():
        cache.rmtree()
    empty = sum(not text for text in texts)
    of_empty = f", {empty:,} of them of empty texts" if empty else ""
    cut = f"; {encoder.truncated:,} texts were truncated at {encoder.max_length} tokens" if encoder.truncated else ""
    return f"wrote {len(vectors):,} vectors of {dim} dimensions to {flags.output}{of_empty}{cut}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="embed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder, Hub id, workdir or WORKDIR/checkpoints/STEP")
    parser.add_argument("--input", required=True, help="file of texts, or a folder that is a table")
    add_column_flags(parser)
    parser.add_argument("--output", required=True, help=".npy file to write; exists only when complete")
    parser.add_argument("--dim", type=positive, help="keep so many leading dimensions (default: all)")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt", default="", help='put before every text: the name of a prompt of the model, such as "query", or any text'
    )
    prompts.add_argument("--instruction", default="", help='describe the task of queries; they become "Instruct: ...\\nQuery: text"')
    parser.add_argument("--dtype", choices=COMPUTE, default=COMPUTE[0], help="compute dtype (default float32)")
    parser.add_argument("--batch-tokens", type=positive, help="tokens on the device at once; memory only (default: by device)")
    add_distributed(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
