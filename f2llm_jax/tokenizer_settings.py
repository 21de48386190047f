"""What the files next to tokenizer.json say of it: special tokens, flags and a class, by which transformers may change the ids of texts.

Ids come from tokenizer.json here. A folder of which transformers 4 or 5 would make other ids is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tokenizers
from etils import epath

from f2llm_jax.errors import UserError
from f2llm_jax.storage.files import read_json

LISTS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")  # of a special token: where it is found in a text
AS_IT_IS = ("PreTrainedTokenizerFast", "TokenizersBackend")  # classes that open tokenizer.json and change nothing
# Qwen2's, which transformers 5 also takes where a Qwen3 model names none, reads the vocabulary alone and makes its own normalizer and
# pre-tokenizer: these.
QWEN2 = ("Qwen2Tokenizer", "Qwen2TokenizerFast", None)
QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def add_special_tokens(folder: epath.Path, config: Mapping[str, Any], backend: tokenizers.Tokenizer) -> None:
    """Makes the tokens that tokenizer_config.json names special, as transformers does: within a text each is one id then.

    Raises:
      UserError: one is not in the vocabulary, has another id there or is found by other rules, or a file next to it names others.
    """
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    decoder = config.get("added_tokens_decoder") or {}
    numbers = {token: backend.token_to_id(token) for token in _named(config)}
    numbers |= {str(content(token)): int(number) for number, token in decoder.items()}
    if wrong := [token for token, number in numbers.items() if number is None or backend.token_to_id(token) != number]:
        raise UserError(
            f"{folder}/tokenizer_config.json names special tokens (in its roles, {', '.join(LISTS)} or added_tokens_decoder) that "
            f"tokenizer.json lacks or numbers otherwise: {', '.join(wrong)}; save the tokenizer again with transformers, which writes "
            "them into tokenizer.json"
        )
    _check_companions(folder, config, {token: backend.token_to_id(token) for token in added})
    for token in decoder.values():
        name = str(content(token))
        if name in added and isinstance(token, dict) and (wrong := _other_flags(token, added[name])):
            raise UserError(
                f"{folder}/tokenizer_config.json: added_tokens_decoder finds {name!r} in a text by other rules ({', '.join(wrong)}) than "
                "tokenizer.json; write the same into both"
            )
    backend.add_special_tokens([token for token in numbers if token not in added])


def check(folder: epath.Path, config: Mapping[str, Any], pipeline: Mapping[str, Any], before: Sequence[str], end: str) -> None:
    """Raises a UserError if tokenizer_config.json tells other software something else than tokenizer.json tells this project.

    Args:
      folder: of both files.
      config: the content of tokenizer_config.json.
      pipeline: the content of tokenizer.json.
      before: tokens that a text begins with.
      end: the token that ends it.
    """
    wrong = []
    if (add := config.get("add_bos_token")) is not None and bool(add) != bool(before):
        wrong.append(f"add_bos_token is {add}, but the post-processor of tokenizer.json begins a text with {list(before) or 'nothing'}")
    if config.get("add_eos_token") and content(config.get("eos_token")) != end:
        wrong.append(f"add_eos_token is True, but a text ends in {end!r} and not in the eos_token")
    prefix = (pipeline.get("pre_tokenizer") or {}).get("add_prefix_space")
    if config.get("add_prefix_space") is not None and prefix is not None and config["add_prefix_space"] != prefix:
        wrong.append(f"add_prefix_space is {config['add_prefix_space']}, but {prefix} in the pre_tokenizer of tokenizer.json")
    name = config.get("tokenizer_class")
    if name not in AS_IT_IS and not (name in QWEN2 and _is_qwen2(pipeline, bool(config.get("add_prefix_space")))):
        wrong.append(
            f"tokenizer_class {name}: transformers 5 makes a normalizer and a pre-tokenizer of its own for it; set it to {AS_IT_IS[0]} if "
            "the model was trained with those of tokenizer.json"
        )
    if wrong:
        raise UserError(f"{folder}/tokenizer_config.json and tokenizer.json disagree:\n  " + "\n  ".join(wrong))


def content(token: Any) -> Any:
    """The text of a token, which files give alone or with its flags."""
    return token["content"] if isinstance(token, dict) else token


def _named(config: Mapping[str, Any]) -> Iterator[str]:
    """Special tokens of a file: `eos_token` and everything else that ends in `_token`, and lists of them."""
    for key, value in config.items():
        if key.endswith("_token") and isinstance(content(value), str):
            yield content(value)
        elif key in LISTS:
            yield from (str(content(token)) for token in (value.values() if isinstance(value, dict) else value or ()))


def _check_companions(folder: epath.Path, config: Mapping[str, Any], added: Mapping[str, int | None]) -> None:
    """Raises a UserError if files that some versions of transformers read next to tokenizer_config.json name other special tokens."""
    for file in ("special_tokens_map.json", "added_tokens.json"):
        path = folder / file
        if not path.exists():
            continue
        found = read_json(path, kind=dict)
        named = found if file == "added_tokens.json" else {token: added.get(token) for token in _named(found)}
        wrong = [token for token, number in named.items() if number is None or added.get(token) != number]
        wrong += [key for key in found if key.endswith("_token") and config.get(key) and content(config[key]) != content(found[key])]
        if wrong:
            raise UserError(
                f"{path} says otherwise than tokenizer.json and tokenizer_config.json of {', '.join(wrong)}, and readers differ in which "
                "they take; correct it, or remove it if those two are right"
            )


def _other_flags(token: Mapping[str, Any], added: tokenizers.AddedToken) -> list[str]:
    defaults = {"normalized": not token.get("special", False)}
    return [flag for flag in FLAGS if bool(token.get(flag, defaults.get(flag, False))) != getattr(added, flag)]


def _is_qwen2(pipeline: Mapping[str, Any], prefix_space: bool) -> bool:
    """Whether a tokenizer.json has the pieces that transformers' Qwen2Tokenizer makes."""
    model, split = pipeline["model"], {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": prefix_space, "use_regex": False}
    found = (pipeline.get("pre_tokenizer") or {}).get("pretokenizers", [])
    return (
        pipeline.get("normalizer") == {"type": "NFC"}
        and [{key: value for key, value in one.items() if key != "trim_offsets"} for one in found] == [split, bytes_]
        and model.get("type") == "BPE"
        and not any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"))
    )
