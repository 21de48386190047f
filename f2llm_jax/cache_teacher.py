"""Teacher vectors once and for all: `python -m f2llm_jax.cache_teacher --model M --data DIR --dims K --out DIR`.

Training reads them with the texts (`--config.teacher_cache=DIR`) instead of running the teacher. Interrupted, the same command
resumes where it stopped.
"""

import argparse
import sys
from collections.abc import Sequence

from f2llm_jax.cli.arguments import COMPUTE, add_distributed, join_hosts, positive
from f2llm_jax.cli.command import command
from f2llm_jax.cli.progress import Progress


@command("cache_teacher")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="cache_teacher", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="teacher: workdir, checkpoint, Hugging Face folder or Hub id")
    parser.add_argument("--data", required=True, help="prepared dataset")
    parser.add_argument("--out", required=True, help="folder of the cache")
    parser.add_argument("--dims", type=int, required=True, help="components kept of each vector, at least the student's width")
    parser.add_argument("--max-length", type=int, required=True, help="tokens at which texts are cut: the run's batch.max_length")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="on disk (default float16)")
    parser.add_argument("--compute", choices=COMPUTE, default=COMPUTE[0], help="compute dtype (default float32)")
    parser.add_argument("--batch-tokens", type=positive, help="tokens on the devices at once; memory only (default: by device)")
    add_distributed(parser)
    flags = parser.parse_args(arguments)
    join_hosts(flags)
    from f2llm_jax.data.local_copy import local_dataset
    from f2llm_jax.inference.devices import local_mesh
    from f2llm_jax.inference.teacher import cache_teacher
    from f2llm_jax.storage.files import absolute, check_apart
    from f2llm_jax.weights.models import find_model

    dataset, out = local_dataset(flags.data), absolute(flags.out)
    check_apart(out, {f"--model {flags.model}": flags.model, f"--data {flags.data}": flags.data})
    with Progress() as progress:
        options = {"dims": flags.dims, "max_length": flags.max_length, "dtype": flags.dtype, "compute": flags.compute}
        options |= {"mesh": local_mesh(), "chunk_tokens": flags.batch_tokens}
        content = cache_teacher(find_model(flags.model), dataset, out, **options, report=progress.of("encoding", "texts"))
    print(f"cached {content.width} dims of {flags.model} for every text of {flags.data} in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
