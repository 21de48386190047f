"""Turns raw parquet into a tokenised dataset: `python -m f2llm_jax.prepare --raw DIR --tokenizer DIR --out DIR`.

A run that was killed continues where it stopped when the same command is given again. On Dataflow, Flink or Spark, give the
runner's options in one string, with `gs://` folders: `--beam "--runner=DataflowRunner --project=... --region=..."`.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from f2llm_jax.data import records, writing
from f2llm_jax.data.sources import RawDataError
from f2llm_jax.text import TokenizerError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    flags = _parser().parse_args(arguments)
    bar = tqdm(unit=" rows", file=sys.stderr, disable=not sys.stderr.isatty())
    try:
        dataset = writing.prepare(
            flags.raw,
            flags.tokenizer,
            flags.out,
            tasks=flags.tasks,
            stage=flags.stage,
            max_length=flags.max_length,
            seed=flags.seed,
            workers=flags.workers,
            overwrite=flags.overwrite,
            beam_flags=shlex.split(flags.beam),
            report=lambda progress: _show(progress, bar),
        )
    except (RawDataError, TokenizerError, records.DatasetError) as error:
        bar.close()
        print(f"prepare: error: {error}", file=sys.stderr)
        return 1
    bar.close()
    _print_table(dataset)
    print(f"prepared {flags.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", required=True, help="folder of parquet files, one a source")
    parser.add_argument("--tokenizer", required=True, help="folder with tokenizer.json and tokenizer_config.json")
    parser.add_argument("--out", required=True, help="folder to write; exists only when complete")
    parser.add_argument("--tasks", help='JSON file {"source": "kind"} (default: tasks.json in --raw, if there)')
    parser.add_argument(
        "--stage", type=int, choices=(1, 2), default=2, help="1: retrieval sources, instructions stripped; 2: all, kept (default)"
    )
    parser.add_argument("--max-length", type=_positive, default=1024, help="tokens a text at most, EOS included (default 1024)")
    parser.add_argument("--seed", type=int, default=0, help="of the train/validation split (default 0)")
    parser.add_argument("--workers", type=_positive, help="sources built at a time (default: one a CPU)")
    parser.add_argument("--overwrite", action="store_true", help="replace what lies at --out")
    parser.add_argument("--beam", default="", metavar="OPTIONS", help='Beam options in one string, as in --beam="--runner=..."')
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _show(progress: writing.Progress, bar: tqdm) -> None:
    """Moves the bar on a terminal; prints a line elsewhere."""
    seconds = max(progress.seconds, 1e-9)
    speed = f"{progress.texts / seconds:,.0f} texts/s"
    if not bar.disable:
        bar.total = progress.rows_total
        bar.set_postfix_str(f"{speed}, {progress.source.name}", refresh=False)
        bar.update(progress.rows - bar.n)
        return
    counted = f"[{progress.done}/{progress.sources}] {progress.source.name}: {sum(progress.source.rows.values()):,} rows"
    if progress.reused:
        print(f"{counted}, complete from an earlier run", file=sys.stderr, flush=True)
        return
    left = (progress.rows_total - progress.rows) * seconds / progress.rows
    print(f"{counted}; {progress.rows / seconds:,.0f} rows/s, {speed}, {left:.0f} s left", file=sys.stderr, flush=True)


def _print_table(dataset: records.Dataset) -> None:
    """One line a source; token lengths are of its queries and distinct documents."""
    header = ("source", "kind", "languages", "train", "validation", "documents", "tokens", "p50", "p95", "max")
    lines = [header]
    for info in dataset.sources.values():
        tables = [dataset.tables(info.name, split) for split in records.QUERY_SPLITS]
        lengths = np.concatenate([tables[0].document_length, *(table.query_length for table in tables)])
        languages = ",".join(info.languages) if len(info.languages) <= 2 else str(len(info.languages))
        counts = (*info.rows.values(), info.documents, sum(info.tokens.values()), *np.percentile(lengths, (50, 95)), lengths.max())
        lines.append((info.name, info.kind, languages or "-", *(f"{count:,.0f}" for count in counts)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [cell.ljust(width) if i < 3 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True))]
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    sys.exit(main())
