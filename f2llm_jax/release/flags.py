"""What the commands that write a release share: the flags that say how."""

import argparse
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from f2llm_jax.release.hf_folder import ReleaseForm

TOKEN_VARIABLE = "HF_TOKEN"  # as huggingface_hub reads it
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}  # as transformers' save_pretrained counts


def add_form_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that writes a release; `form_of` reads them."""
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the stored weights (default float32, as trained)"
    )
    parser.add_argument(
        "--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="most bytes of weights in a file: 500MB, 5GB (default)"
    )
    parser.add_argument(
        "--truncate-dim",
        type=int,
        metavar="K",
        help="serve the first K dimensions for good: a layer that truncates is added for the readers of modules.json",
    )
    parser.add_argument(
        "--query-instruction",
        metavar="TEXT",
        help='instruction of the prompt "query", "" for none (default: what the model was trained with)',
    )
    parser.add_argument(
        "--no-golden", dest="golden", action="store_false", help="write no golden.json, which takes reading the weights twice"
    )
    parser.add_argument("--license", default="apache-2.0", help="for the model card, as the Hub names it (default apache-2.0)")
    parser.add_argument("--base-model", default="", metavar="HUB_ID", help="for the model card")
    parser.add_argument("--overwrite", action="store_true", help="replace the release at OUT")


def form_of(flags: argparse.Namespace) -> "ReleaseForm":
    """What the flags of `add_form_flags` say."""
    from f2llm_jax.release.card import Labels
    from f2llm_jax.release.hf_folder import ReleaseForm

    return ReleaseForm(
        dtype=flags.dtype,
        max_shard_bytes=flags.max_shard_size,
        truncate_dim=flags.truncate_dim,
        query_instruction=flags.query_instruction,
        golden=flags.golden,
        labels=Labels(license=flags.license, base_model=flags.base_model),
    )


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)(KB|MB|GB|)", text.upper())
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 5GB")
    return int(match[1]) * UNITS[match[2]]
