"""Shows what is in a prepared dataset: `python -m f2llm_jax.data.inspect DIR [--source S] [--step N]`.

Prints samples decoded back to text, with their task, language and lengths in tokens. With `--step` they are those of a
training step, and a picture of how its texts are packed is drawn: a row of the picture is a row of tokens, every text a bar.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import get_args

import numpy as np
from etils import epath
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from f2llm_jax.cli.command import command
from f2llm_jax.data import records
from f2llm_jax.data.order import Order, Sampling
from f2llm_jax.data.packing import Packing
from f2llm_jax.data.pipeline import BatchConfig, Pipeline, PlannedStep
from f2llm_jax.text import Tokenizer

COLOURS = {"query": "tab:blue", "positive": "tab:green", "negative": "tab:orange"}
SHOWN_TEXT = 160  # characters


@command("inspect")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    flags = _parser().parse_args(arguments)
    dataset = records.load_dataset(flags.folder)
    names = [flags.source] if flags.source else list(dataset.sources)
    if unknown := [name for name in names if name not in dataset.sources]:
        raise records.DatasetError(f"{flags.folder} has no source {unknown[0]!r}; choose one of {', '.join(dataset.sources)}")
    if flags.step is None:
        for name in names:
            rows = np.arange(min(flags.samples, dataset.sources[name].rows[flags.split]))
            print_samples(dataset, name, flags.split, rows, dataset.tables(name, flags.split).documents[rows])
        return 0
    show_step(dataset, names, flags)
    return 0


def show_step(dataset: records.Dataset, sources: list[str], flags: argparse.Namespace) -> None:
    """Prints samples of a step and draws its packing."""
    length = min(flags.row_tokens, dataset.max_length)
    config = BatchConfig(size=flags.batch_size, row_tokens=flags.row_tokens, microbatch_rows=1, max_length=length)
    order = Sampling(order=flags.order)
    planned = Pipeline(dataset, flags.split, config, flags.seed, None, sources, sampling=order).planned(flags.step)
    plan, packing = planned.plan, planned.packing
    share = packing.lengths.sum() / (packing.rows * flags.row_tokens)
    print(f"step {flags.step}: epoch {plan.epoch}, source {plan.source} ({plan.kind}), {len(plan.rows)} samples,", end=" ")
    print(f"{int((packing.lengths > 0).sum())} texts, {packing.lengths.sum():,} tokens in {packing.rows} rows, {share:.1%} full")
    print_samples(dataset, plan.source, flags.split, plan.rows[: flags.samples], planned.documents[: flags.samples])
    with epath.Path(flags.picture).open("wb") as file:
        draw_packing(packing, planned, flags.row_tokens, f"{plan.source}, step {flags.step}: {share:.1%} full").savefig(file, dpi=100)
    print(f"drew {flags.picture}")


def print_samples(dataset: records.Dataset, source: str, split: str, rows: np.ndarray, documents: np.ndarray) -> None:
    """Samples of one source: `rows` `[b]` of its split, and their `documents` `[b, 1 + n]`, -1 for none."""
    info, tokenizer = dataset.sources[source], dataset.tokenizer()
    reader, corpus = dataset.reader(source, split), dataset.reader(source, records.CORPUS)
    print(f"\n{source}: {info.kind}, {sum(info.rows.values()):,} rows, {len(info.languages)} languages, {info.negatives} negatives a row")
    for row, ids, language, wanted in zip(rows.tolist(), reader.read(rows), reader.languages(rows), documents, strict=True):
        print(f"  row {row}, language {language or 'unknown'}")
        _print_text("query", ids, tokenizer)
        for i, found in enumerate(corpus.read(wanted[wanted >= 0])):
            _print_text(f"negative {i}" if i else "positive", found, tokenizer)


def _print_text(role: str, ids: np.ndarray, tokenizer: Tokenizer) -> None:
    text = tokenizer.decode(ids.tolist())
    shown = text if len(text) <= SHOWN_TEXT else f"{text[: SHOWN_TEXT - 20]} ... {text[-15:]}"
    print(f"    {role:<11} {len(ids):>5} tokens  {shown!r}")


def draw_packing(packing: Packing, planned: PlannedStep, row_tokens: int, title: str) -> Figure:
    """A bar a text, from its first token to its EOS, coloured by what it is."""
    figure = Figure(figsize=(12, min(2 + packing.rows / 12, 40)), layout="constrained")
    axes = figure.subplots()
    samples = planned.samples
    roles = {"query": slice(0, samples), "positive": slice(samples, 2 * samples), "negative": slice(2 * samples, None)}
    for role, texts in roles.items():
        there = packing.row[texts] >= 0
        row, start, length = (values[texts][there] for values in (packing.row, packing.start, packing.lengths))
        corners = [(start, row), (start + length, row), (start + length, row + 0.9), (start, row + 0.9)]
        bars = np.stack([np.stack(corner, axis=-1) for corner in corners], axis=1)
        axes.add_collection(PolyCollection(list(bars), facecolors=COLOURS[role], edgecolors="white", linewidths=0.3, label=role))
    axes.set(xlim=(0, row_tokens), ylim=(packing.rows, 0), xlabel="token", ylabel="row", title=title)
    axes.legend(loc="upper right")
    return figure


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="prepared dataset")
    parser.add_argument("--source", help="one source only")
    parser.add_argument("--split", choices=records.QUERY_SPLITS, default="train")
    parser.add_argument("--samples", type=int, default=3, help="samples printed a source (default 3)")
    parser.add_argument("--step", type=int, help="samples and packing of this training step")
    parser.add_argument("--batch-size", type=int, default=512, help="of the step (default 512)")
    parser.add_argument("--row-tokens", type=int, default=1024, help="of the step (default 1024)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the steps (default 0)")
    parser.add_argument("--order", choices=get_args(Order), default="uniform", help="of the steps, as data.order (default uniform)")
    parser.add_argument("--picture", default="packing.png", help="file to draw the packing of the step to (default packing.png)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
