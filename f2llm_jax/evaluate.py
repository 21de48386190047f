"""MTEB: `python -m f2llm_jax.evaluate --model M --benchmark NAME | --tasks TASK ... | --manifest FILE --out DIR`.

Tasks are mteb's own or, from a manifest, your files measured by mteb (its form: f2llm_jax/evaluation/local_tasks.py). Results stand in
mteb's layout under DIR/results, vectors in DIR/vectors; a killed evaluation resumes when the same command is given again. Several hosts
(--distributed) encode a share of the texts each, into one DIR that all see.

`--held-out` alone: what training logs next to its held-out losses, again, from a workdir or one of its checkpoints.
"""

import argparse
import sys
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from f2llm_jax.cli.arguments import COMPUTE, add_distributed, join_hosts, positive
from f2llm_jax.cli.command import command
from f2llm_jax.errors import UserError
from f2llm_jax.evaluation.widths import FULL, parse_dims

if TYPE_CHECKING:
    import jax

    from f2llm_jax.evaluation.mteb_run import TaskScore
    from f2llm_jax.weights.models import ModelSource


@command("evaluate")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    if not (flags.benchmark or flags.tasks or flags.manifest or flags.held_out):
        parser.error("name what to evaluate: --benchmark, --tasks, --manifest or --held-out")
    if flags.held_out and (flags.benchmark or flags.tasks or flags.manifest):
        parser.error("--held-out goes alone: run it and the other tasks one after the other")
    if not (flags.held_out or flags.out):
        parser.error("--out is required: a folder for results and vectors")
    if flags.held_out:
        _print_held_out(flags)
        return 0
    join_hosts(flags)
    scores = _evaluate(flags)
    _print(scores)
    print(f"results in mteb's layout: {flags.out}/results")
    return 0


def _evaluate(flags: argparse.Namespace) -> "list[TaskScore]":
    import jax.numpy as jnp  # here and below after the flags are parsed: --help needs no JAX

    from f2llm_jax.evaluation import instructions
    from f2llm_jax.evaluation.local_tasks import read_manifest
    from f2llm_jax.evaluation.mteb_encoder import Conditions, model_meta
    from f2llm_jax.evaluation.mteb_run import find_tasks, run_tasks
    from f2llm_jax.inference.encode import load_encoder
    from f2llm_jax.inference.shared_model import find_shared
    from f2llm_jax.inference.vector_cache import CachedEncoder
    from f2llm_jax.weights.digest import model_digest

    tasks = find_tasks(flags.tasks, flags.benchmark)
    local, theirs = read_manifest(flags.manifest) if flags.manifest else ([], {})
    for line in (line for task in local for line in task.described):
        print(line)
    own = instructions.read_instructions(flags.instructions, [task.metadata.name for task in local]) if flags.instructions else {}
    origin = find_shared(flags.model, flags.out)
    dims = _widths(flags.dims, origin)
    options = {"max_length": flags.max_length, "dtype": jnp.dtype(flags.dtype), "chunk_tokens": flags.batch_tokens}
    encoder = load_encoder(origin, mesh=_mesh(flags.mesh), **options)
    digest = model_digest(origin)
    return run_tasks(
        CachedEncoder(encoder, f"{flags.out}/vectors", model=digest),
        [*tasks, *local],
        dims,
        flags.out,
        {**instructions.published(), **theirs, **own},
        model_meta(origin, digest, flags.name),
        Conditions(flags.dtype, flags.max_length, own),
    )


def _print_held_out(flags: argparse.Namespace) -> None:
    import jax.numpy as jnp

    from f2llm_jax.data.local_copy import local_dataset
    from f2llm_jax.evaluation.held_out import as_in_training
    from f2llm_jax.inference.encode import load_encoder
    from f2llm_jax.reporting.run_record import read_record
    from f2llm_jax.weights.models import find_model

    origin = find_model(flags.model)
    if origin.run_folder is None:
        raise UserError(f"{flags.model} is no workdir and no checkpoint, and only those know their held-out rows; try --manifest")
    config = read_record(origin.run_folder).config
    dataset = local_dataset(config["data"]["folder"] or origin.run_folder / "data")
    encoder = load_encoder(origin, max_length=config["batch"]["max_length"], dtype=jnp.dtype(flags.dtype), mesh=_mesh(flags.mesh))
    dims = sorted({*origin.embedding.served_dims, origin.width})
    for name, accuracy in as_in_training(encoder, dataset, config, dims).items():
        print(f"{name:<64}{accuracy:>10.4f}")


def _mesh(sizes: Sequence[int] | None) -> "jax.sharding.Mesh | None":
    import jax

    from f2llm_jax import sharding
    from f2llm_jax.inference.devices import local_mesh

    return sharding.make_mesh(sizes[0], sizes[1], sizes[2], devices=jax.local_devices()) if sizes else local_mesh()


def _widths(dims: Sequence[str], origin: "ModelSource") -> list[int]:
    """Widest first, each once."""
    widths = {origin.width if dim == FULL else int(dim) for dim in dims}
    if max(widths) > origin.width:
        raise UserError(f"--dims {max(widths)}: {origin.name} has {origin.width} dimensions; lower it")
    return sorted(widths, reverse=True)


def _print(scores: "Sequence[TaskScore]") -> None:
    dims = list(dict.fromkeys(score.dim for score in scores))
    kinds = list(dict.fromkeys(score.kind for score in scores))
    print(_line("main score by width", dims))
    for kind in kinds:
        of_kind = [score for score in scores if score.kind == kind]
        for task in dict.fromkeys(score.task for score in of_kind):
            print(_line(task, [score.value for score in of_kind if score.task == task]))
        print(_line(f"mean of {kind}", [fmean([score.value for score in of_kind if score.dim == dim]) for dim in dims]))
    print(_line("mean of tasks", [fmean([score.value for score in scores if score.dim == dim]) for dim in dims]))


def _line(label: str, cells: Sequence) -> str:
    return f"{label:<48}" + "".join(f"{cell:>10}" if isinstance(cell, int) else f"{cell:>10.4f}" for cell in cells)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder, Hub id, workdir or WORKDIR/checkpoints/STEP")
    parser.add_argument("--benchmark", help='an mteb benchmark, such as "MTEB(Multilingual, v2)"')
    parser.add_argument("--tasks", nargs="+", default=[], help="mteb tasks by name")
    parser.add_argument("--manifest", help="JSON file that names your own tasks and their files")
    parser.add_argument("--held-out", action="store_true", help="the benchmark that training ran, on the run's own held-out rows")
    parser.add_argument("--out", help="folder of results and vectors")
    parser.add_argument("--dims", type=parse_dims, default=FULL, help='widths, as in "8,32,128,full" (default full); one pass serves all')
    parser.add_argument("--instructions", help="JSON file {task, type or 'query': instruction}, before the published model's")
    parser.add_argument("--name", help="owner/name on the leaderboard (default: from the model)")
    parser.add_argument("--dtype", choices=COMPUTE, default=COMPUTE[0], help="compute dtype (default float32)")
    parser.add_argument("--max-length", type=positive, help="tokens at which texts are cut (default: the model's own limit)")
    parser.add_argument("--mesh", type=_sizes, help="data,fsdp,tensor over this host's devices, as in 1,-1,1 (default: fsdp over all)")
    parser.add_argument("--batch-tokens", type=positive, help="tokens on the device at once; memory only (default: by device)")
    add_distributed(parser)
    return parser


def _sizes(text: str) -> list[int]:
    try:
        data, fsdp, tensor = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form data,fsdp,tensor, as in 1,-1,1") from None
    return [data, fsdp, tensor]


if __name__ == "__main__":
    sys.exit(main())
