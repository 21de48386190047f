"""All commands under one name: `f2llm-jax COMMAND ...`, which is `python -m f2llm_jax.COMMAND ...`."""

import importlib
import sys

from f2llm_jax.cli.command import command

COMMANDS = {  # in the order of the work
    "finetune": "a model on data of your own: prepare, train, release, evaluate, verify",
    "main": "train",
    "prepare": "raw files to a prepared dataset",
    "mine": "hard negatives for pairs, or for labelled files",
    "cache_teacher": "teacher vectors of every text of a dataset",
    "prune": "a model into a smaller one",
    "convert": "models in and out of the Hugging Face layout; verify, inspect, push",
    "merge": "average checkpoints",
    "embed": "texts to vectors",
    "evaluate": "MTEB and tasks of your own",
    "recall": "recall@1 on files of pairs",
    "report": "runs on one page for a browser",
    "compile_check": "will a size fit a TPU slice, and how fast can it be",
    "family": "the chain of models from 14B to 80M",
    "ablation": "what a pruned start and a teacher are worth",
    "demo_data": "write the embedded corpus",
}


def main() -> int:
    """Runs the command that the first argument names; returns its exit code."""
    name = sys.argv[1].replace("-", "_") if len(sys.argv) > 1 else "help"
    if name in ("help", "__help", "_h"):
        return _help()
    if name not in COMMANDS:
        print(f"f2llm-jax: error: unknown command {sys.argv[1]!r}; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return importlib.import_module(f"f2llm_jax.{name}").main(sys.argv[2:]) or 0


@command("f2llm-jax")
def _help() -> None:
    print(f"{__doc__}\n")
    print("\n".join(f"  {name:<15}{what}" for name, what in COMMANDS.items()))


if __name__ == "__main__":
    sys.exit(main())
