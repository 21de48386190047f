"""The one place that decides what a model sees of a text: instruction, the token that ends it, truncation.

Data preparation, training, evaluation, mining and release all call this module, so a prompt or an end token cannot differ between
them. What ends a text is part of the tokenizer itself (a `tokenizer.json` post-processor): the file that is trained with is the file
that is released, and sentence-transformers, transformers 5, text-embeddings-inference and llama.cpp all read it.

Whatever the post-processor of a tokenizer appends ends its texts: `<|endoftext|>` in Qwen3-Embedding, whose `eos_token` is
`<|im_end|>`. Only a tokenizer that appends nothing (Qwen3) gets its `eos_token` appended.

Sources of the rules: the template and its trailing space are mteb's `codefuse_models.py`; the end token last after truncation is
commit 33533d2 of CodeFuse-Embeddings; causal last-token pooling reads that token, so without it the vector means nothing.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers
from etils import epath
from jaxtyping import Int

from f2llm_jax import hf_settings, tokenizer_settings
from f2llm_jax.errors import UserError
from f2llm_jax.storage.files import is_remote, read_json, write_json, write_text

INSTRUCTION_TEMPLATE = "Instruct: {instruction}\nQuery: "
_INSTRUCTION = re.compile(r"\AInstruct: (.*?)\nQuery: ?", re.DOTALL)

DEFAULT_QUERY_INSTRUCTION = "Given a question, retrieve passages that can help answer the question."

TokenIds = Int[np.ndarray, " length"]


def query_prompt(instruction: str, template: str = INSTRUCTION_TEMPLATE) -> str:
    """The prefix of a query that carries `instruction`; documents get none. Empty for an empty instruction."""
    return template.replace("{instruction}", instruction) if instruction else ""


def template_of(prompt: str) -> str:
    """The template of a query prompt: Qwen3-Embedding has no space after `Query:`. A prompt of another form gives the published one."""
    found = _INSTRUCTION.fullmatch(prompt)
    return INSTRUCTION_TEMPLATE.rstrip(" ") if found and not prompt.endswith(" ") else INSTRUCTION_TEMPLATE


def strip_instruction(text: str) -> str:
    """`text` without a leading `Instruct: ...\\nQuery: `, as stage 1 trains (paper, section 3.2)."""
    return _INSTRUCTION.sub("", text, count=1)


def leading_prompt(text: str) -> str:
    """The `Instruct: ...\\nQuery: ` that `text` begins with, "" if it does not."""
    found = _INSTRUCTION.match(text)
    return found[0] if found else ""


def instruction_of(text: str) -> str:
    """The instruction that `text` begins with, "" if it has none."""
    found = _INSTRUCTION.match(text)
    return found[1] if found else ""


def truncate(ids: TokenIds, max_length: int, end_id: int) -> TokenIds:
    """`ids` int32 `[length]` truncated to `max_length`, the end token last; shorter ids come back as they are."""
    return ids if len(ids) <= max_length else np.append(ids[: max_length - 1], np.int32(end_id))


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A fast tokenizer whose post-processor ends every text in one and the same token."""

    backend: tokenizers.Tokenizer  # neither truncates nor pads
    config: dict[str, Any]  # tokenizer_config.json
    notes: tuple[hf_settings.Note, ...]  # what becomes of each setting of tokenizer_config.json
    end_id: int  # of the token whose final hidden state is the embedding
    pad_id: int  # for readers of a release; masks come from lengths here, never from ids
    vocab_size: int  # every id is below it: the largest id and one, not the number of ids, which may have holes

    def encode(self, texts: Sequence[str], max_length: int) -> list[TokenIds]:
        """Token ids of each text, int32 `[length]` with `1 <= length <= max_length`, the end token last whatever the length."""
        if max_length < 1:
            raise UserError(f"max_length must be at least 1 (the end token alone), not {max_length}")
        encoded = self.backend.encode_batch_fast(list(texts))
        return [truncate(np.array(e.ids, np.int32), max_length, self.end_id) for e in encoded]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`, special tokens shown."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that turns text into ids. Equal means equal ids for every text.

        The post-processor, which differs in form between files that all append the same token, counts through its effect.
        """
        parts = json.loads(self.backend.to_str())
        kept = {key: parts[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
        kept["ends"] = self.backend.encode("").ids
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def save(self, folder: epath.PathLike) -> None:
        """Writes `tokenizer.json` (post-processor included) and `tokenizer_config.json` to `folder`."""
        folder = epath.Path(folder)
        write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        write_json(folder / "tokenizer_config.json", self.config)


def load_tokenizer(folder: epath.PathLike) -> Tokenizer:
    """Loads `tokenizer.json` and `tokenizer_config.json`; a tokenizer that ends a text in nothing gets its `eos_token` appended.

    Args:
      folder: a local or `gs://` folder in the Hugging Face layout.

    Raises:
      UserError: a file is missing or unreadable, a setting would give other ids in other software, no pad token is named or no end
        token can be told, or texts do not all end in one and the same token.
    """
    folder = epath.Path(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).exists():
            raise UserError(f"{folder / name} does not exist; save a fast tokenizer there with `AutoTokenizer(...).save_pretrained`")
    config = read_json(folder / "tokenizer_config.json")
    backend, pipeline = _backend(folder, (folder / "tokenizer.json").read_text())
    notes = hf_settings.check(folder / "tokenizer_config.json", "tokenizer_config.json", config, hf_settings.TOKENIZER)
    tokenizer_settings.add_special_tokens(folder, config, backend)
    before, after = _added(backend, folder)
    if not after:
        after = [_special(config, "eos_token", backend, folder)]
        _append(backend, pipeline.get("post_processor"), before, after[0])
    tokenizer_settings.check(folder, config, pipeline, [str(backend.id_to_token(n)) for n in before], str(backend.id_to_token(after[0])))
    _check_encodings(folder, backend, before, after)
    pad_id = _special(config, "pad_token", backend, folder)
    bound = 1 + max(backend.get_vocab(with_added_tokens=True).values())
    return Tokenizer(backend, config, tuple(notes), after[0], pad_id, bound)


def find_tokenizer(name: str) -> epath.Path:
    """The folder of a tokenizer: `name` itself or, of a workdir, `name/tokenizer`; else that of a Hub repository, without its weights.

    Raises:
      UserError: neither exists, or the Hub cannot be reached.
    """
    if is_remote(name) or epath.Path(name).exists():
        folder = epath.Path(name)
        return folder / "tokenizer" if (folder / "tokenizer" / "tokenizer.json").exists() else folder
    import huggingface_hub  # only here: a local folder needs no hub client

    try:
        return epath.Path(huggingface_hub.snapshot_download(name, allow_patterns=["tokenizer.json", "tokenizer_config.json"]))
    except Exception as error:  # offline, unknown name, no permission: the client has a class for each
        why = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise UserError(f"{name!r} is no folder and could not be downloaded from the Hub ({why})") from error


def _backend(folder: epath.Path, content: str) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The tokenizer of a file, and the file's own statement of it: a large one takes most of a second to read either way."""
    try:
        backend, pipeline = tokenizers.Tokenizer.from_str(content), json.loads(content)
    except Exception as error:  # tokenizers raises plain Exception on a malformed file
        raise UserError(f"{folder}/tokenizer.json is not a readable fast tokenizer ({error}); save it again") from error
    truncation = backend.truncation
    if truncation and truncation["direction"].lower() != "right":
        raise UserError(f"{folder}/tokenizer.json cuts long texts at their start; set truncation to null or its direction to Right")
    if pipeline["model"].get("dropout"):
        raise UserError(f"{folder}/tokenizer.json has a dropout of merges, so a text has other ids each time; set model.dropout to null")
    backend.no_truncation()
    backend.no_padding()
    return backend, pipeline


def _added(backend: tokenizers.Tokenizer, folder: epath.Path) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts before and after a text."""
    bare, whole = backend.encode("a b", add_special_tokens=False).ids, backend.encode("a b").ids
    for first in range(len(whole) - len(bare) + 1):
        if whole[first : first + len(bare)] == bare:
            return whole[:first], whole[first + len(bare) :]
    raise UserError(f"{folder}/tokenizer.json has a post-processor that rearranges the ids of a text; keep one that only adds tokens")


def _append(backend: tokenizers.Tokenizer, present: dict[str, Any] | None, before: list[int], end: int) -> None:
    """Gives the tokenizer one template that adds `before` as the `present` post-processor does, and `end`.

    One template, because of two in a row the second takes what the first returns for a pair of texts and uses its own pair template.
    """
    special = {number: str(backend.id_to_token(number)) for number in [*before, end]}

    def framed(name: str, type_id: int) -> list[dict[str, Any]]:
        token = lambda number: {"SpecialToken": {"id": special[number], "type_id": type_id}}  # noqa: E731
        return [*map(token, before), {"Sequence": {"id": name, "type_id": type_id}}, token(end)]

    template = {
        "type": "TemplateProcessing",
        "single": framed("A", 0),
        "pair": framed("A", 0) + framed("B", 1),
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]} for number, name in special.items()},
    }
    parts = present["processors"] if present and present["type"] == "Sequence" else [present] if present else []
    offsets = [part for part in parts if part["type"] == "ByteLevel"]  # changes offsets and no id
    made = {"type": "Sequence", "processors": [*offsets, template]} if offsets else template
    small = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {}, "unk_token": ""}, "post_processor": made}
    backend.post_processor = tokenizers.Tokenizer.from_str(json.dumps(small)).post_processor


def _check_encodings(folder: epath.Path, backend: tokenizers.Tokenizer, before: list[int], after: list[int]) -> None:
    """Raises a UserError unless texts of every kind get `before` and one end token `after`, and nothing else."""
    file, shown = f"{folder}/tokenizer.json", " ".join(str(backend.id_to_token(number)) for number in after)
    if len(after) != 1:
        raise UserError(f"{file} ends a text in {len(after)} tokens, {shown!r}; keep one, whose hidden state is the embedding")
    if after[0] in before:
        raise UserError(
            f"{file} begins a text with {shown!r}, which also ends it; such a text has no one last token to tell, so drop the first"
        )
    specials = "".join(token.content for token in backend.get_added_tokens_decoder().values())
    for text in ("", "a", " \n", "a b " * 3000, f"a{shown}", specials):
        if backend.encode(text).ids != [*before, *backend.encode(text, add_special_tokens=False).ids, *after]:
            raise UserError(f"{file} does not end the text {text[:40]!r} in {shown!r}; keep a post-processor that ends every text in it")


def _special(config: dict[str, Any], role: str, backend: tokenizers.Tokenizer, folder: epath.Path) -> int:
    token = tokenizer_settings.content(config.get(role))
    number = backend.token_to_id(token) if token else None
    if number is None:
        raise UserError(
            f"{folder}/tokenizer_config.json names {role} {token!r}, which is not in the vocabulary; set {role} to a token that is"
        )
    return number
