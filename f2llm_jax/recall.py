"""Recall@1 on files of pairs: `python -m f2llm_jax.recall --model M [--model M2 ...] --pairs FILE [...]`.

A file is one of pairs (forms: docs/data.md), with `instruction` and `language` if it has them, or a BEIR folder. Each query searches the
distinct documents of its file. Several models are shown side by side, with the last one's ratio to the first.
"""

import argparse
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from f2llm_jax.arguments import COMPUTE, add_distributed, join_hosts
from f2llm_jax.command import command
from f2llm_jax.evaluation.widths import FULL, parse_dims
from f2llm_jax.files import check_apart, write_json
from f2llm_jax.inputs.columns import Choice
from f2llm_jax.inputs.flags import add_column_flags
from f2llm_jax.progress import Progress

if TYPE_CHECKING:
    from f2llm_jax.evaluation.retrieval import Pairs, Recall

EXTREMES = 3  # languages shown from either end
Results = dict[str, dict[str, dict[str, "Recall"]]]  # by model, file, width


@command("recall")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    if flags.distributed and not flags.cache:
        parser.error("--distributed needs --cache: a folder that all hosts see")
    join_hosts(flags)
    from f2llm_jax.evaluation import retrieval

    if flags.json:
        check_apart(flags.json, {f"--pairs {path}": path for path in flags.pairs} | {f"--model {name}": name for name in flags.model})
    choice = Choice(dict(flags.columns), flags.ignore_columns)
    files = [retrieval.read_pairs(path, choice, flags.qrels) for path in flags.pairs]
    results = {name: _evaluate(name, files, flags) for name in flags.model}
    from f2llm_jax.inference.devices import is_first

    if not is_first():
        return 0
    for line in (line for pairs in files for line in pairs.described):
        print(line)
    if flags.json:
        write_json(flags.json, _plain(results))
    _print(files, results, flags.dims)
    return 0


def _evaluate(name: str, files: Sequence["Pairs"], flags: argparse.Namespace) -> dict[str, dict[str, "Recall"]]:
    import jax.numpy as jnp

    from f2llm_jax.evaluation import retrieval
    from f2llm_jax.inference.devices import local_mesh
    from f2llm_jax.inference.encode import load_encoder
    from f2llm_jax.inference.vector_cache import CachedEncoder
    from f2llm_jax.weights.digest import model_digest
    from f2llm_jax.weights.models import find_model

    origin = find_model(name)
    encoder = load_encoder(origin, mesh=local_mesh(), dtype=jnp.dtype(flags.dtype))
    if flags.cache:
        encoder = CachedEncoder(encoder, flags.cache, model=model_digest(origin))
    widths = {dim: encoder.width if dim == FULL else int(dim) for dim in flags.dims}
    results = {}
    for pairs in files:
        with Progress() as progress:
            recall = retrieval.evaluate(encoder, pairs, list(widths.values()), report=progress.of(pairs.name, "texts"))
        results[pairs.name] = {dim: recall[width] for dim, width in widths.items()}
    return results


def _print(files: Sequence["Pairs"], results: Results, dims: Sequence[str]) -> None:
    columns = [f"[{i}]" for i in range(1, len(results) + 1)]
    for column, name in zip(columns, results, strict=True):
        print(f"{column} {name}")
    compared = [f"{columns[-1]}/{columns[0]}"] if len(columns) > 1 else []
    for pairs in files:
        languages = len(set(pairs.language.tolist()))
        print(f"\n{pairs.name}: {len(pairs.queries):,} queries, {len(pairs.documents):,} documents, {languages} languages")
        print(_line("recall@1", [*columns, *compared]))
        for dim in dims:
            of_models = [result[pairs.name][dim] for result in results.values()]
            print(_figures(f"{_width(dim)}, overall", [recall.overall for recall in of_models]))
            if languages > 1:
                print(_figures(f"{_width(dim)}, mean over languages", [recall.mean_over_languages for recall in of_models]))
        if languages > 2 * EXTREMES:
            _print_extremes(list(results.values())[-1][pairs.name][dims[-1]], f"{columns[-1]}, {_width(dims[-1])}")


def _print_extremes(recall: "Recall", label: str) -> None:
    ranked = [f"{language} {value:.3f}" for language, value in recall.languages.items()]
    print(f"lowest ({label}): {', '.join(ranked[:EXTREMES])}; highest: {', '.join(reversed(ranked[-EXTREMES:]))}")


def _width(dim: str) -> str:
    return "full width" if dim == FULL else f"{dim} dimensions"


def _figures(label: str, values: Sequence[float]) -> str:
    ratio = [f"{values[-1] / values[0]:.1f}x" if values[0] else "-"] if len(values) > 1 else []
    return _line(label, [*(f"{value:.4f}" for value in values), *ratio])


def _line(label: str, cells: Sequence[str]) -> str:
    return f"{label:<38}" + "".join(f"{cell:>10}" for cell in cells)


def _plain(results: Results) -> Mapping[str, object]:
    def one(recall: "Recall") -> dict[str, object]:
        return {"recall@1": recall.overall, "mean_over_languages": recall.mean_over_languages, "languages": recall.languages}

    return {
        model: {file: {dim: one(recall) for dim, recall in by_dim.items()} for file, by_dim in by_file.items()}
        for model, by_file in results.items()
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="recall", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, action="append", help="Hugging Face folder, Hub id, workdir or checkpoint; repeatable")
    parser.add_argument("--pairs", required=True, nargs="+", help="files, folders that are tables, or BEIR folders")
    add_column_flags(parser)
    parser.add_argument("--qrels", default="test", help="split of BEIR folders (default test)")
    parser.add_argument("--dims", type=parse_dims, default=FULL, help='widths to cut to, as in "32,full" (default: full)')
    parser.add_argument("--json", type=pathlib.Path, help="also write every figure, by language, to this file")
    parser.add_argument("--dtype", choices=COMPUTE, default=COMPUTE[0], help="compute dtype (default float32)")
    parser.add_argument("--cache", help="folder of vectors, to share or to delete at will (default: none are kept)")
    add_distributed(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
