"""Fine-tunes a model on data of your own: `python -m f2llm_jax.finetune --model M --data pairs.jsonl --out MODEL`.

Prepares the data, trains, writes a release, scores the model before and after on held-out queries, and verifies the release. It prints
each command that it runs, and each of them can be run alone. Given again, it resumes where it stopped; data that has not changed is not
prepared again. `--plan` prints the commands and runs none.

    python -m f2llm_jax.finetune --model Qwen/Qwen3-Embedding-0.6B --data faq.csv --columns query=question,passage=answer --out MODEL
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from f2llm_jax.cli import configuration
from f2llm_jax.cli.arguments import positive, share_or_path
from f2llm_jax.cli.command import command
from f2llm_jax.cli.configuration import parse_flags
from f2llm_jax.errors import UserError

if TYPE_CHECKING:
    from f2llm_jax.chain.finetune import Finetune
    from f2llm_jax.chain.links import Link

LONGEST = 1024  # tokens of a text, as published, where the model would take more


@command("finetune")
def main(arguments: Sequence[str] | None = None) -> None:
    """Prints or runs the commands."""
    flags = parse_flags(_parser(), arguments, default="configs/finetune.py")
    from f2llm_jax.chain import links  # after flag parsing: --help needs no JAX
    from f2llm_jax.chain.finetune import finetune_links
    from f2llm_jax.preparation import writing

    plan = _plan(flags)
    chain = finetune_links(plan)
    _check_out(plan, chain)
    if flags.plan:
        print(links.describe(chain, plan.root))
        return
    writing.check_installed()  # said now and not after hours of mining
    links.run(chain, plan.root)
    print(f"fine-tuned {plan.model} on {plan.data}: {plan.out}")


def _plan(flags: argparse.Namespace) -> "Finetune":
    from f2llm_jax.chain.finetune import Finetune
    from f2llm_jax.storage.files import absolute, is_remote
    from f2llm_jax.weights.digest import model_digest
    from f2llm_jax.weights.models import find_model

    model = find_model(flags.model)
    name = str(absolute(flags.model)) if pathlib.Path(flags.model).exists() else flags.model
    out = absolute(flags.out)
    if is_remote(out) and not flags.work:
        raise UserError(f"--out {out} is in an object store, where commands cannot work; give a local folder for that, --work WORK")
    return Finetune(
        model=name,
        digest=model_digest(model),
        tokenizer=str(model.run_folder / "tokenizer") if model.run_folder else name,
        fingerprint=model.matching_tokenizer().fingerprint,
        data=absolute(flags.data),
        out=out,
        root=absolute(flags.work or out.with_name(out.name + ".work")),
        max_length=flags.max_length or min(model.text_limit, LONGEST),
        validation=flags.validation if isinstance(flags.validation, float) else absolute(flags.validation),
        instruction=flags.instruction,
        columns=tuple(f"--{name}={value}" for name in ("columns", "ignore-columns") if (value := getattr(flags, name.replace("-", "_")))),
        skip_invalid=flags.skip_invalid,
        mine=flags.mine,
        negatives=flags.negatives,
        dtype=flags.dtype,
        config=_config_file(flags.config_file),
        settings=flags.config.to_json_best_effort(sort_keys=True),
        overrides=flags.overrides,
    )


def _config_file(reference: str) -> str:
    """`FILE[:ARG]` as it can be given from any folder."""
    name, colon, argument = reference.partition(":")
    file = configuration.find(name)
    return reference if file.parent == configuration.SHIPPED else f"{file.absolute()}{colon}{argument}"


def _check_out(plan: "Finetune", chain: Sequence["Link"]) -> None:
    """Raises a UserError, before any work, if the release is there and was not made by these commands."""
    from f2llm_jax.chain import links
    from f2llm_jax.chain.finetune import release_name

    name = release_name(plan)
    strange = plan.out.exists() and any(plan.out.iterdir()) and name not in links.commands_done(plan.root)
    if strange or links.statuses(chain, plan.root)[name] == "changed":
        raise UserError(f"{plan.out} exists and was made from other data, model or settings; remove it or choose another --out")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="finetune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder, Hub id, workdir or checkpoint to start from")
    parser.add_argument("--data", required=True, help="file of pairs or triplets, or a folder with one file a source (forms: docs/data.md)")
    parser.add_argument("--out", required=True, help="folder of the release to write; exists only when complete")
    parser.add_argument("--work", help="folder of the prepared data, the run and the figures (default OUT.work)")
    parser.add_argument("--columns", default="", help="columns of other names, as in query=question,passage=answer")
    parser.add_argument("--ignore-columns", default="", metavar="NAMES", help='columns to leave out, or patterns, as in "id,*_scores"')
    parser.add_argument("--skip-invalid", action="store_true", help="leave out and count rows that have no valid text")
    parser.add_argument("--instruction", default="", help="the task of queries that carry no instruction of their own (default none)")
    parser.add_argument("--mine", action="store_true", help="let the model find hard negatives, for data that has none")
    parser.add_argument("--negatives", type=positive, default=7, metavar="N", help="hard negatives to mine for a row (default 7)")
    parser.add_argument(
        "--validation",
        type=share_or_path,
        default=0.1,
        metavar="SHARE|PATH",
        help="share of the queries, or file of pairs, that is held out (default 0.1)",
    )
    parser.add_argument("--max-length", type=positive, help=f"tokens of a text (default: the model's limit, at most {LONGEST})")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the release (default float32)")
    parser.add_argument("--plan", action="store_true", help="print the commands and run none")
    return parser


if __name__ == "__main__":
    sys.exit(main())
