"""Mines hard negatives: `python -m f2llm_jax.mine --model M --queries FILES [--corpus FILES] --out DIR`.

Inputs are files of pairs or BEIR folders (forms: docs/data.md); the output is files that `prepare` reads, with the scores. Without
--corpus each source searches its own passages. A killed run resumes where it stopped when the same command is given again, and another
run over the same texts reuses their vectors (--cache). The default rules are the published ones. With --build, inputs are labelled
files (see f2llm_jax/mining/builders.py).
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence

from f2llm_jax.cli.arguments import add_distributed, join_hosts
from f2llm_jax.cli.command import command
from f2llm_jax.cli.progress import Progress
from f2llm_jax.inputs.columns import ColumnChoice, check_ignored, check_shared, plain
from f2llm_jax.inputs.fields import DOCUMENTS
from f2llm_jax.inputs.flags import add_column_flags
from f2llm_jax.inputs.judged import read_documents
from f2llm_jax.mining import builders, inputs
from f2llm_jax.mining.selection import NegativeRules


@command("mine")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    if not flags.model and flags.build not in set(builders.INSTRUCTIONS) - set(builders.MINED):
        parser.error("--model is required, except with --build classification or clustering")
    join_hosts(flags)
    summary = _mine(flags)
    for name, count in summary["total"].items():
        print(f"{name}: {count:,}")
    print(f"mined {flags.out}")
    return 0


def _mine(flags: argparse.Namespace) -> dict:
    from f2llm_jax.inference.shared_model import find_shared
    from f2llm_jax.mining import run  # after the flags are parsed: --help needs no JAX
    from f2llm_jax.mining.writing import write_built

    named = [*(("--queries", path) for path in flags.queries), *(("--corpus", path) for path in flags.corpus or ())]
    read = {f"{flag} {path}": path for flag, path in named}
    rules = NegativeRules(**{name: getattr(flags, name) for name in NegativeRules.__dataclass_fields__})
    of_corpus = {role: column for role, column in flags.columns if flags.corpus and plain(role) in DOCUMENTS.roles}  # no roles of pairs
    choice = ColumnChoice({role: column for role, column in flags.columns if role not in of_corpus}, flags.ignore_columns)
    if flags.build:
        built = [builders.build(flags.build, path, flags.instruction, rules.negatives, rules.seed, choice) for path in flags.queries]
        sources = [pairs for pairs, _ in built]
        _describe(sources)
        if flags.build not in builders.MINED:
            check_ignored(choice)
            return write_built(sources, {pairs.name: counters for pairs, counters in built}, flags.out, flags.overwrite, read)
    else:
        sources = [inputs.read_pairs(path, flags.instruction, choice, flags.qrels) for path in flags.queries]
        _describe(sources)
    corpora = [read_documents(path, dataclasses.replace(choice, columns=dict(flags.columns))) for path in flags.corpus or ()]
    check_shared(ColumnChoice(of_corpus), [(DOCUMENTS, file.names) for documents in corpora for file in documents.files])
    check_ignored(choice)
    for line in (line for documents in corpora for line in documents.describe()):
        print(f"documents: {line}")
    corpus = [text for documents in corpora for text in documents.joined()] if flags.corpus else None
    encoding = run.Encoding(max_length=flags.max_length, compute=flags.dtype, stored=flags.vectors)
    with Progress() as progress:

        def report(phase: str, done: int, total: int) -> None:
            progress.show(phase, done, total, "documents" if phase == "search" else "texts")

        options = {"encoding": encoding, "cache": flags.cache, "overwrite": flags.overwrite, "inputs": read, "report": report}
        return run.mine(find_shared(flags.model, flags.cache or f"{flags.out}.cache"), sources, corpus, flags.out, rules, **options)


def _describe(sources: Sequence[inputs.SourcePairs]) -> None:
    for source in sources:
        print("\n".join([f"{source.name}: {source.kind}, {len(source.queries):,} rows", *(f"  {line}" for line in source.described)]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face folder, Hub id, workdir or WORKDIR/checkpoints/STEP; its cosine is the score")
    parser.add_argument("--queries", required=True, nargs="+", help="files, folders that are tables, or BEIR folders; each is a source")
    parser.add_argument(
        "--corpus", nargs="+", help="files of documents or BEIR folders that every source searches in (default: its own passages)"
    )
    add_column_flags(parser)
    parser.add_argument("--out", required=True, help="folder to write; exists only when complete")
    parser.add_argument("--cache", help="folder of vectors and neighbours, to share or to delete at will (default OUT.cache)")
    parser.add_argument("--overwrite", action="store_true", help="replace what lies at --out")
    parser.add_argument("--build", choices=builders.INSTRUCTIONS, help="inputs are labelled files of this form")
    parser.add_argument("--instruction", help='given to queries that carry none; "" for none (default: none for raw files)')
    parser.add_argument("--qrels", default="train", help="split of BEIR folders (default train)")
    add_distributed(parser)
    rules = parser.add_argument_group("rules", 'thresholds are cosines; "none" switches one off')
    rules.add_argument("--nearest", type=_number(int, 1), default=100, metavar="K", help="documents considered a query (default 100)")
    rules.add_argument(
        "--skip", type=_number(int, 0), default=5, metavar="R", help="first ranks left out of what the thresholds leave (default 5)"
    )
    rules.add_argument("--max-score", type=_threshold, default=0.8, help="above it is no negative (default 0.8)")
    rules.add_argument("--max-relative", type=_threshold, default=0.95, help="the same, as a share of the positive's score (default 0.95)")
    rules.add_argument("--absolute-margin", type=_threshold, help="the same, as a distance to the positive's score (default none)")
    rules.add_argument("--min-score", type=_threshold, help="below it is too easy (default none)")
    rules.add_argument(
        "--near-duplicate",
        type=_number(float, 0),
        default=0.9,
        metavar="SHARE",
        help="similarity to a positive (Jaccard, of character 5-grams) from which on a document is no negative; 2 for never (default 0.9)",
    )
    rules.add_argument("--negatives", type=_number(int, 1), default=24, metavar="N", help="wanted a row (default 24)")
    rules.add_argument("--take", choices=("top", "sample"), default="top", help="the nearest of what is left, or some of it (default top)")
    rules.add_argument(
        "--too-few",
        choices=("drop", "fill"),
        default="drop",
        help="skip rows with fewer, or fill with random documents (default drop)",
    )
    rules.add_argument("--max-positive-rank", type=_number(int, 1), metavar="R", help="skip rows whose positive ranks below (default none)")
    rules.add_argument("--seed", type=int, default=0, help="of what is random (default 0)")
    encoding = parser.add_argument_group("encoding")
    encoding.add_argument("--max-length", type=_number(int, 1), help="tokens at which texts are cut (default: the model's limit)")
    encoding.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype (default float32)")
    encoding.add_argument(
        "--vectors", choices=("float32", "float16"), default="float32", help="dtype on disk; scores are float32 always (default float32)"
    )
    return parser


def _number(kind: type, least: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        number = kind(text)
        if not number >= least:
            raise argparse.ArgumentTypeError(f"{text} is not at least {least}")
        return number

    return parse


def _threshold(text: str) -> float | None:
    return None if text == "none" else _number(float, -math.inf)(text)


if __name__ == "__main__":
    sys.exit(main())
