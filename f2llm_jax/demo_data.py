"""`python -m f2llm_jax.demo_data --out DIR`: writes the embedded corpus (see `preparation.demo_corpus`) and prints what it holds."""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from f2llm_jax.cli.command import command


@command("demo_data")
def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the flags, builds, prints one line a file."""
    parser = argparse.ArgumentParser(prog="demo_data", description="Write the embedded corpus; no download.")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for raw/, heldout/ and tokenizer/")
    parser.add_argument("--seed", type=int, default=0, help="decides what is held out and every draw (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an older corpus at --out")
    flags = parser.parse_args(arguments)
    from f2llm_jax.preparation import demo_corpus

    tables = demo_corpus.build(flags.out, flags.seed, overwrite=flags.overwrite)
    print(f"{'source':<24}{'kind':<16}{'rows':>8}{'languages':>11}")
    for path, table in tables.items():
        folder, _, name = path.partition("/")
        kind, language = (demo_corpus.TASKS[name], "lang") if folder == "raw" else ("held out", "language")
        print(f"{path:<24}{kind:<16}{table.num_rows:>8,}{len(table[language].unique()):>11,}")
    print(f"written to {flags.out}")


if __name__ == "__main__":
    sys.exit(main())
