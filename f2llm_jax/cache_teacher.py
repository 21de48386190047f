"""Teacher vectors, computed once for every text of a dataset: `python -m f2llm_jax.cache_teacher TEACHER --data DIR --out DIR`.

A teacher is one of

    --model MODEL                     a model of this project with the dataset's tokenizer; with --retokenize also of another one
    --sentence-transformers MODEL     what sentence-transformers loads
    --endpoint URL                    a model that is served with OpenAI's protocol (OpenAI, vLLM, text-embeddings-inference, infinity),
                                      with --endpoint-model NAME and, where it asks for a key, --api-key-variable VARIABLE
    --vectors FILE                    vectors that other software computed: parquet with the columns vector and id or text, or .npy
                                      with --vectors-of TABLE, whose rows have the id or text of each

Every teacher but the first reads the texts that the token ids stand for, without the student's instructions and behind prompts of its
own. Training reads the vectors with its texts (`--config.teacher_cache=DIR`). Interrupted, the same command resumes.

`--write-texts FILE.parquet` instead of a teacher writes the texts (id, role, text) for software of your own.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from f2llm_jax.cli.arguments import COMPUTE, add_distributed, join_hosts, positive
from f2llm_jax.cli.command import command
from f2llm_jax.cli.progress import Progress
from f2llm_jax.errors import UserError

if TYPE_CHECKING:
    from f2llm_jax.data.records import Dataset
    from f2llm_jax.teachers.fill import VectorSource
    from f2llm_jax.teachers.texts import Prompts, TextDecoder


@command("cache_teacher")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    flags = _parser().parse_args(arguments)
    _check(flags)
    join_hosts(flags)
    from f2llm_jax.data.local_copy import local_dataset
    from f2llm_jax.storage.files import absolute, check_apart, check_new_file
    from f2llm_jax.teachers import fill, vector_file

    dataset = local_dataset(flags.data)
    if flags.write_texts:
        check_new_file(flags.write_texts)
        texts = vector_file.write_texts(dataset, flags.write_texts, _decoder(flags, dataset), _prompts(flags), flags.max_length)
        print(f"wrote {texts:,} texts of {flags.data} to {flags.write_texts}")
        return 0
    out = absolute(flags.out)
    given = {f"--{name.replace('_', '-')}": getattr(flags, name) for name in ("model", "sentence_transformers", "vectors", "vectors_of")}
    check_apart(out, {f"{flag} {value}": value for flag, value in (given | {"--data": flags.data}).items() if value})
    with Progress() as progress:
        options = {"dims": flags.dims, "max_length": flags.max_length, "dtype": flags.dtype}
        teacher = _teacher(flags, dataset)
        if flags.vectors:
            fill.check_complete(teacher, dataset, flags.max_length)
        content = fill.fill_cache(teacher, dataset, out, **options, report=progress.of("encoding", "texts"))
    print(f"cached {content.width} dims of {teacher.name} for every text of {flags.data} in {out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cache_teacher", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="teacher: workdir, checkpoint, Hugging Face folder or Hub id")
    what.add_argument("--sentence-transformers", metavar="MODEL", help="teacher: folder or Hub id of sentence-transformers")
    what.add_argument("--endpoint", metavar="URL", help="teacher: such as http://localhost:8000/v1")
    what.add_argument("--vectors", metavar="FILE", help="teacher: a file of vectors")
    what.add_argument("--write-texts", metavar="FILE", help="write the texts as parquet, and no cache")
    parser.add_argument("--vectors-of", metavar="TABLE", help="ids or texts of the rows of an .npy file of --vectors")
    parser.add_argument("--endpoint-model", metavar="NAME", help="name of the model at --endpoint")
    parser.add_argument("--api-key-variable", metavar="VARIABLE", help="environment variable with the key of --endpoint (default: no key)")
    parser.add_argument("--endpoint-batch", type=positive, default=64, help="texts a request (default 64)")
    parser.add_argument("--endpoint-requests", type=positive, default=8, help="requests at once (default 8)")
    parser.add_argument("--retokenize", action="store_true", help="--model reads texts by its own tokenizer, not the dataset's ids")
    own = "(default: the model's own; none where it has none)"
    parser.add_argument("--query-prompt", help=f"before queries; {{instruction}} in it is that of the stored query {own}")
    parser.add_argument("--document-prompt", help=f"before documents {own}")
    parser.add_argument("--data", required=True, help="prepared dataset")
    parser.add_argument("--out", help="folder of the cache")
    parser.add_argument("--dims", type=positive, help="first components kept of each vector (default: all)")
    parser.add_argument("--max-length", type=positive, required=True, help="tokens at which texts are cut: the run's batch.max_length")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="on disk (default float16)")
    parser.add_argument("--compute", choices=COMPUTE, default=COMPUTE[0], help="compute dtype (default float32)")
    parser.add_argument("--batch-tokens", type=positive, help="tokens on the devices at once; memory only (default: by device)")
    add_distributed(parser)
    return parser


def _check(flags: argparse.Namespace) -> None:
    """Raises a UserError for flags that do not go together."""
    if not flags.out and not flags.write_texts:
        raise UserError("--out is missing: the folder of the cache")
    if flags.model and not flags.retokenize and (flags.query_prompt is not None or flags.document_prompt is not None):
        raise UserError("--query-prompt and --document-prompt are for teachers that read texts: pass --retokenize, or drop them")
    if "{instruction}" in (flags.document_prompt or ""):
        raise UserError("--document-prompt cannot hold {instruction}: documents have none; write the prompt out")
    if flags.retokenize and not flags.model:
        raise UserError("--retokenize goes with --model alone: every other teacher reads texts by its own tokenizer anyway")
    if bool(flags.endpoint) != bool(flags.endpoint_model):
        raise UserError("--endpoint and --endpoint-model go together: where a model is served, and its name there")
    if flags.api_key_variable and not flags.endpoint:
        raise UserError("--api-key-variable goes with --endpoint alone; drop it")
    if flags.api_key_variable and not os.environ.get(flags.api_key_variable):
        raise UserError(f"--api-key-variable {flags.api_key_variable}: there is no such environment variable; export it with the key")
    if flags.vectors_of and not flags.vectors:
        raise UserError("--vectors-of goes with --vectors alone; drop it")


def _teacher(flags: argparse.Namespace, dataset: "Dataset") -> "VectorSource":
    """The teacher that the flags name."""
    from f2llm_jax.inference.devices import local_mesh
    from f2llm_jax.inference.shared_model import find_shared
    from f2llm_jax.storage.files import absolute
    from f2llm_jax.teachers import endpoint, own, sentence_transformers, vector_file
    from f2llm_jax.teachers.texts import TextModel, TextTeacher

    common = f"{absolute(flags.out)}.model"  # where several hosts share a model of the Hub
    computing = {"compute": flags.compute, "mesh": local_mesh(), "chunk_tokens": flags.batch_tokens}
    if flags.model and not flags.retokenize:
        return own.OwnTeacher(find_shared(flags.model, common), dataset, flags.max_length, **computing)
    decoder = _decoder(flags, dataset)
    model: TextModel
    if flags.model:
        model = own.OwnTextModel(find_shared(flags.model, common), **computing)
    elif flags.sentence_transformers:
        model = found = sentence_transformers.SentenceTransformersModel(flags.sentence_transformers, flags.compute)
        if found.longest:
            print(f"{found.name} reads the first {found.longest} of its own tokens of a text", file=sys.stderr)
    elif flags.endpoint:
        key = os.environ[flags.api_key_variable] if flags.api_key_variable else ""
        batch, at_once = flags.endpoint_batch, flags.endpoint_requests
        model = endpoint.EndpointModel(flags.endpoint, flags.endpoint_model, key=key, batch=batch, at_once=at_once)
    else:
        model = vector_file.VectorFile(flags.vectors, flags.vectors_of, decoder)
    return TextTeacher(model, decoder, _prompts(flags))


def _prompts(flags: argparse.Namespace) -> "Prompts":
    from f2llm_jax.teachers.texts import Prompts

    return Prompts(flags.query_prompt, flags.document_prompt)


def _decoder(flags: argparse.Namespace, dataset: "Dataset") -> "TextDecoder":
    from f2llm_jax.teachers.texts import TextDecoder

    return TextDecoder(dataset.tokenizer().backend, min(flags.max_length, dataset.max_length))


if __name__ == "__main__":
    sys.exit(main())
