"""Recall on files of pairs: `python -m f2llm_jax.recall --model M [--model M2 ...] --pairs FILE [...]`.

A file is one of pairs (forms: docs/data.md), with `instruction` and `language` if it has them, or a BEIR folder. Each query searches the
distinct documents of its file. With --data the held-out queries of a prepared dataset search all documents of their source; of graded
pairs it is the rank correlation of scores and cosines. Several models are shown side by side, with the last one's ratio to the first.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from f2llm_jax.cli.arguments import COMPUTE, add_distributed, join_hosts
from f2llm_jax.cli.command import command
from f2llm_jax.cli.progress import Progress
from f2llm_jax.evaluation.widths import FULL, parse_dims
from f2llm_jax.inputs.columns import ColumnChoice, check_ignored
from f2llm_jax.inputs.flags import add_column_flags
from f2llm_jax.storage.files import check_apart, check_new_file, write_json

if TYPE_CHECKING:
    from f2llm_jax.data.records import Dataset
    from f2llm_jax.evaluation.held_out import Correlation, Search
    from f2llm_jax.evaluation.retrieval import Recall, RetrievalTask
    from f2llm_jax.inference.encode import TextEncoder
    from f2llm_jax.inference.vector_cache import CachedEncoder

EXTREMES = 3  # languages shown from either end
Results = dict[str, dict[str, dict[str, "Recall"]]]  # by model, file, width
Measured = dict[str, dict[str, "Search | Correlation"]]  # by source, width


@command("recall")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    if not flags.pairs and not flags.data:
        parser.error("give --pairs, --data or both")
    if flags.distributed and not flags.cache:
        parser.error("--distributed needs --cache: a folder that all hosts see")
    join_hosts(flags)
    from f2llm_jax.data.records import load_dataset
    from f2llm_jax.evaluation import held_out, retrieval
    from f2llm_jax.inference.devices import is_first

    if flags.json:
        check_new_file(flags.json)
        check_apart(flags.json, {f"--pairs {path}": path for path in flags.pairs} | {f"--model {name}": name for name in flags.model})
    choice = ColumnChoice(dict(flags.columns), flags.ignore_columns)
    files = [retrieval.read_pairs(path, choice, flags.qrels) for path in flags.pairs]
    check_ignored(choice)
    sources = [(dataset, name) for dataset in map(load_dataset, flags.data) for name in held_out.sources(dataset)]
    labels = _labels(
        [*((file.name, path) for file, path in zip(files, flags.pairs, strict=True)), *((n, f"{d.folder}/{n}") for d, n in sources)]
    )
    files = [dataclasses.replace(file, name=label) for file, label in zip(files, labels, strict=False)]
    labelled = dict(zip(labels[len(files) :], sources, strict=True))
    results: Results = {}
    searches: dict[str, Measured] = {}
    for name in flags.model:
        encoder, cached = _encoders(name, flags)
        results[name] = _evaluate(cached, files, flags.dims)
        searches[name] = _search(encoder, labelled, flags.dims)
    if not is_first():
        return 0
    for line in (line for pairs in files for line in pairs.described):
        print(line)
    if flags.json:
        plain = _plain(results)
        write_json(flags.json, {name: {**plain[name], **_plain_searches(searches[name])} for name in flags.model})
    _print(files, results, flags.dims)
    _print_searches(searches, flags.dims)
    return 0


def _encoders(name: str, flags: argparse.Namespace) -> "tuple[TextEncoder, TextEncoder | CachedEncoder]":
    """The model's encoder, and the same over the cache if there is one."""
    import jax.numpy as jnp

    from f2llm_jax.inference.devices import local_mesh
    from f2llm_jax.inference.encode import load_encoder
    from f2llm_jax.inference.shared_model import find_shared
    from f2llm_jax.inference.vector_cache import CachedEncoder
    from f2llm_jax.weights.digest import model_digest

    print(f"loading {name}", file=sys.stderr, flush=True)
    origin = find_shared(name, flags.cache)
    encoder = load_encoder(origin, mesh=local_mesh(), dtype=jnp.dtype(flags.dtype))
    return encoder, CachedEncoder(encoder, flags.cache, model=model_digest(origin)) if flags.cache else encoder


def _labels(named: Sequence[tuple[str, str]]) -> list[str]:
    """The name of each, or where it lies if another has its name."""
    names = [name for name, _ in named]
    return [name if names.count(name) == 1 else place for name, place in named]


def _search(encoder: "TextEncoder", sources: "Mapping[str, tuple[Dataset, str]]", dims: Sequence[str]) -> Measured:
    """Of the held-out rows of each source."""
    from f2llm_jax.evaluation import held_out

    widths = {dim: None if dim == FULL else int(dim) for dim in dims}
    return {
        label: {dim: held_out.measure(encoder, dataset, source, dim=width) for dim, width in widths.items()}
        for label, (dataset, source) in sources.items()
    }


def _print_searches(searches: Mapping[str, Measured], dims: Sequence[str]) -> None:
    columns = [f"[{i}]" for i in range(1, len(searches) + 1)]
    compared = [f"{columns[-1]}/{columns[0]}"] if len(columns) > 1 else []
    for source, by_dim in next(iter(searches.values())).items():
        first = by_dim[dims[0]]
        print(f"\n{source}, held out: {first.counted}")
        print(_line("", [*columns, *compared]))
        for dim in dims:
            for name in first.figures:
                print(_figures(f"{_width(dim)}, {name}", [of_model[source][dim].figures[name] for of_model in searches.values()]))


def _plain_searches(searches: Measured) -> dict[str, object]:
    return {source: {dim: found.figures for dim, found in by_dim.items()} for source, by_dim in searches.items()}


def _evaluate(
    encoder: "TextEncoder | CachedEncoder", files: Sequence["RetrievalTask"], dims: Sequence[str]
) -> dict[str, dict[str, "Recall"]]:
    from f2llm_jax.evaluation import retrieval

    widths = {dim: encoder.width if dim == FULL else int(dim) for dim in dims}
    results = {}
    for pairs in files:
        with Progress() as progress:
            recall = retrieval.evaluate(encoder, pairs, list(widths.values()), report=progress.of(pairs.name, "texts"))
        results[pairs.name] = {dim: recall[width] for dim, width in widths.items()}
    return results


def _print(files: Sequence["RetrievalTask"], results: Results, dims: Sequence[str]) -> None:
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
    ratio = [f"{values[-1] / values[0]:.1f}x" if values[0] > 0 else "-"] if len(values) > 1 else []
    return _line(label, [*(f"{value:.4f}" for value in values), *ratio])


def _line(label: str, cells: Sequence[str]) -> str:
    return f"{label:<38}" + "".join(f"{cell:>10}" for cell in cells)


def _plain(results: Results) -> dict[str, dict[str, Any]]:
    def one(recall: "Recall") -> dict[str, object]:
        return {"recall@1": recall.overall, "mean_over_languages": recall.mean_over_languages, "languages": recall.languages}

    return {
        model: {file: {dim: one(recall) for dim, recall in by_dim.items()} for file, by_dim in by_file.items()}
        for model, by_file in results.items()
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="recall", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, action="append", help="Hugging Face folder, Hub id, workdir or checkpoint; repeatable")
    parser.add_argument("--pairs", default=[], nargs="+", help="files, folders that are tables, or BEIR folders")
    parser.add_argument(
        "--data",
        default=[],
        nargs="+",
        help="prepared datasets, of whose held-out rows recall@1 and recall@10 are taken, or Spearman's correlation",
    )
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
