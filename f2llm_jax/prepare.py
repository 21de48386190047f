"""Turns raw text into a tokenised dataset: `python -m f2llm_jax.prepare --raw DIR --tokenizer DIR --out DIR`.

A run that was killed continues where it stopped when the same command is given again. On Dataflow, Flink or Spark, give the
runner's options in one string, with `gs://` folders: `--beam "--runner=DataflowRunner --project=... --region=..."`.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from f2llm_jax.cli.arguments import positive, share, share_or_path
from f2llm_jax.cli.command import command
from f2llm_jax.cli.progress import Progress
from f2llm_jax.inputs.columns import ColumnChoice
from f2llm_jax.inputs.flags import add_column_flags, pair
from f2llm_jax.preparation.catalogue import CAP, COMPOSITE, load_catalogue
from f2llm_jax.preparation.selection import VALIDATION_SHARE, Recipe
from f2llm_jax.preparation.sources import find_sources, unused
from f2llm_jax.text import find_tokenizer

if TYPE_CHECKING:
    from f2llm_jax.preparation import writing

NO_CATALOGUE = "none"
PUBLISHED_SHARE = 0.3  # of documents with an instruction (paper, section 3.2)


@command("prepare")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    flags = _parser().parse_args(arguments)
    from f2llm_jax.preparation import summary, writing  # after the flags are parsed: --help needs no TFDS

    sources = find_sources(
        flags.raw,
        stage=flags.stage,
        tasks=flags.tasks,
        catalogue=load_catalogue(flags.catalogue) if flags.catalogue not in (None, NO_CATALOGUE) else None,
        recognise=flags.catalogue != NO_CATALOGUE,
        choice=ColumnChoice(dict(flags.columns), flags.ignore_columns),
        qrels=flags.qrels,
        instructions=dict(flags.instruction),
        validation=None if isinstance(flags.validation, float) else flags.validation,
        strict=flags.policy == "strict",
    )
    if flags.catalogue is None and (released := [source for source in sources if source.released]):
        files = {path for source in released for path in source.files}
        print(
            f"{len(files)} files have names of the F2LLM-v2 release: tasks, caps and stages are those of --catalogue {COMPOSITE}, and "
            f"empty texts are skipped and counted (--catalogue {NO_CATALOGUE} takes them as any other file)",
            file=sys.stderr,
        )
    for source in sources:
        print(source.describe())
    if left := unused(flags.raw, sources):
        print(f"not read in {flags.raw}: {', '.join(left)}")
    recipe = Recipe(
        stage=flags.stage,
        max_length=flags.max_length,
        seed=flags.seed,
        cap=(CAP if flags.stage == 2 else 0) if flags.cap is None else flags.cap,
        instruct_documents=PUBLISHED_SHARE if flags.recipe == "published" else flags.instruct_documents,
        policy=flags.policy,
        repeated_negatives=flags.keep_repeated_negatives or flags.recipe == "published",
        validation=flags.validation if isinstance(flags.validation, float) else 0.0,
        split_by=flags.split_by,
    )
    with Progress(line_seconds=0) as shown:
        dataset = writing.prepare(
            sources,
            find_tokenizer(flags.tokenizer),
            flags.out,
            recipe,
            workers=flags.workers,
            overwrite=flags.overwrite,
            beam_flags=shlex.split(flags.beam),
            report=lambda progress: _show(progress, shown),
        )
    print(summary.table(dataset.folder))
    print(f"prepared {flags.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", required=True, help="folder with a file or folder a source (forms: docs/data.md), local, gs:// or hf://")
    parser.add_argument("--tokenizer", required=True, help="folder with tokenizer.json and tokenizer_config.json, or a Hub id")
    parser.add_argument("--out", required=True, help="folder to write; exists only when complete")
    parser.add_argument(
        "--catalogue",
        help=f"{COMPOSITE}, ml_embed, or a JSON file of that form: which files make which source (default: {COMPOSITE} for files with "
        f"names of that release where there is no tasks file, else each file one; {NO_CATALOGUE}: always each file one)",
    )
    parser.add_argument(
        "--tasks",
        help='JSON file {"source": "kind"} (default: tasks.json in --raw, of one file next to it, if there); not with --catalogue',
    )
    add_column_flags(parser)
    parser.add_argument("--qrels", default="train", help="split of the judgements of BEIR folders (default train)")
    parser.add_argument(
        "--validation",
        type=share_or_path,
        default=VALIDATION_SHARE,
        metavar="SHARE|PATH",
        help=f"share of the rows of each source that is held out, or a file or folder of held-out rows (default {VALIDATION_SHARE})",
    )
    parser.add_argument(
        "--split-by", choices=("row", "query"), default="row", help="query: rows of one query are on one side (default: row)"
    )
    parser.add_argument(
        "--instruction", type=pair, action="append", default=[], metavar="SOURCE=TEXT", help="for queries that carry none; may be repeated"
    )
    parser.add_argument(
        "--stage", type=int, choices=(1, 2), default=2, help="1: retrieval sources, instructions stripped; 2: all, kept (default)"
    )
    parser.add_argument("--cap", type=int, help=f"queries a unit at most, 0 for all (default: {CAP} in stage 2, all in stage 1)")
    parser.add_argument(
        "--instruct-documents",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="share of the documents of symmetric sources that get the instruction of their queries in stage 2, where they have none "
        "(published: 0.3; the released data comes with it, hence default 0)",
    )
    parser.add_argument("--max-length", type=positive, default=1024, help="tokens a text at most, EOS included (default 1024)")
    parser.add_argument("--seed", type=int, default=0, help="of split, cap and instructed documents (default 0)")
    parser.add_argument(
        "--recipe",
        choices=("published",),
        help=f"every choice of the published code: --keep-repeated-negatives --instruct-documents {PUBLISHED_SHARE} (docs/recipe.md)",
    )
    parser.add_argument("--keep-repeated-negatives", action="store_true", help="train on negatives that repeat or are the positive")
    policy = parser.add_mutually_exclusive_group()
    policy.add_argument(
        "--skip-invalid",
        "--set-aside",
        dest="policy",
        action="store_const",
        const="skip",
        help="leave out and count what has no valid text",
    )
    policy.add_argument(
        "--strict", dest="policy", action="store_const", const="strict", help="also fail on negatives that are the positive or repeated"
    )
    parser.set_defaults(policy="default")
    parser.add_argument("--workers", type=positive, help="sources built at a time (default: one a CPU)")
    parser.add_argument("--overwrite", action="store_true", help="replace what lies at --out")
    parser.add_argument("--beam", default="", metavar="OPTIONS", help='Beam options in one string, as in --beam="--runner=..."')
    return parser


def _show(progress: "writing.BuildProgress", shown: Progress) -> None:
    counted = f"[{progress.done}/{progress.sources}] {progress.source.name}: {sum(progress.source.rows.values()):,} rows"
    if progress.reused:
        shown.say(f"{counted}, complete from an earlier run")
        return
    speed = f"{progress.texts / max(progress.seconds, 1e-9):,.0f} texts/s"
    shown.show("preparing", progress.rows, progress.rows_total, "rows", f"{speed}, {counted}")


if __name__ == "__main__":
    sys.exit(main())
