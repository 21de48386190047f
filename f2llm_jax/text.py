"""The one place that decides what string a model sees: instruction, end-of-sequence token, truncation.

Data preparation, training, evaluation, mining and release all call this module, so a prompt or an EOS cannot differ between
them. The EOS rule is not code that runs after the tokenizer but part of the tokenizer itself (a `tokenizer.json`
post-processor), hence the very file that is trained with is the file that is released: sentence-transformers,
transformers 5, text-embeddings-inference and llama.cpp all read it (transformers >= 5 ignores `add_eos_token`).

Sources of the rules: the template and its trailing space are mteb's `codefuse_models.py`; EOS last after truncation is
commit 33533d2 of CodeFuse-Embeddings; causal last-token pooling reads that EOS, so without it the vector means nothing.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence

import numpy as np
import tokenizers
from etils import epath
from tokenizers import processors

from f2llm_jax.errors import UserError
from f2llm_jax.files import write_json, write_text

INSTRUCTION_TEMPLATE = "Instruct: {instruction}\nQuery: "
_INSTRUCTION = re.compile(r"\AInstruct: .*?\nQuery: ?", re.DOTALL)

DEFAULT_QUERY_INSTRUCTION = "Given a question, retrieve passages that can help answer the question."


class TokenizerError(UserError):
    """A tokenizer folder that cannot be trained with or released; the message names the remedy."""


def query_prompt(instruction: str) -> str:
    """The prefix of a query that carries `instruction`; documents get none. Empty for an empty instruction."""
    return INSTRUCTION_TEMPLATE.format(instruction=instruction) if instruction else ""


def strip_instruction(text: str) -> str:
    """`text` without a leading `Instruct: ...\\nQuery: `, as stage 1 trains (paper, section 3.2)."""
    return _INSTRUCTION.sub("", text, count=1)


def leading_prompt(text: str) -> str:
    """The `Instruct: ...\\nQuery: ` that `text` begins with, "" if it does not."""
    found = _INSTRUCTION.match(text)
    return found[0] if found else ""


def truncate(ids: np.ndarray, max_length: int, eos_id: int) -> np.ndarray:
    """`ids` int32 `[length]` cut to `max_length`, EOS last whatever the length; uncut ids come back as they are."""
    return ids if len(ids) <= max_length else np.append(ids[: max_length - 1], np.int32(eos_id))


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A fast tokenizer that ends every text in exactly one EOS of its own making.

    Attributes:
      backend: the `tokenizers.Tokenizer`, post-processor attached, neither truncating nor padding.
      config: the contents of `tokenizer_config.json`.
      eos_id: id of the token whose final hidden state is the embedding.
      pad_id: id used for padding by consumers of a release. Never used to build a mask here: masks come from lengths.
      vocab_size: number of ids the tokenizer can produce; an embedding table needs at least so many rows.
    """

    backend: tokenizers.Tokenizer
    config: dict
    eos_id: int
    pad_id: int
    vocab_size: int

    def encode(self, texts: Sequence[str], max_length: int) -> list[np.ndarray]:
        """Token ids of each text, int32 `[length]` with `1 <= length <= max_length`, EOS last whatever the length."""
        if max_length < 1:
            raise UserError(f"max_length must be at least 1 (the EOS alone), not {max_length}")
        encoded = self.backend.encode_batch_fast(list(texts))
        return [truncate(np.array(e.ids, np.int32), max_length, self.eos_id) for e in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens shown."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that turns text into ids. Equal means equal ids for every text.

        The post-processor, which differs in form between files that all append the EOS, counts through its effect.
        """
        parts = json.loads(self.backend.to_str())
        kept = {key: parts[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
        kept["ends"] = self.backend.encode("").ids
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def save(self, folder: epath.PathLike) -> None:
        """Writes `tokenizer.json` (EOS post-processor included) and `tokenizer_config.json` to `folder`."""
        folder = epath.Path(folder)
        write_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        write_json(folder / "tokenizer_config.json", self.config)


def load_tokenizer(folder: epath.PathLike) -> Tokenizer:
    """Loads `tokenizer.json` and `tokenizer_config.json`, adding the EOS post-processor where there is none.

    Args:
      folder: a local or `gs://` folder in the Hugging Face layout.

    Raises:
      TokenizerError: a file is missing or unreadable, no EOS or pad token is named, one is not in the vocabulary, or
        the tokenizer ends a text in more than one EOS.
    """
    folder = epath.Path(folder)
    backend, config = _read(folder)
    eos = _special(config, "eos_token", backend, folder)
    pad = _special(config, "pad_token", backend, folder)
    backend.no_truncation()
    backend.no_padding()
    if backend.encode("a").ids[-1:] != [eos[1]]:
        template = processors.TemplateProcessing(single=f"$A {eos[0]}", special_tokens=[eos])
        present = backend.post_processor
        backend.post_processor = processors.Sequence([present, template]) if present else template
    if backend.encode("a").ids.count(eos[1]) != 1:
        raise TokenizerError(f"{folder}/tokenizer.json ends a text in more than one {eos[0]!r}; keep one post-processor that adds it")
    return Tokenizer(backend, config, eos[1], pad[1], backend.get_vocab_size(with_added_tokens=True))


def _read(folder: epath.Path) -> tuple[tokenizers.Tokenizer, dict]:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).exists():
            raise TokenizerError(f"{folder / name} does not exist; save a fast tokenizer there with `AutoTokenizer(...).save_pretrained`")
    try:
        return tokenizers.Tokenizer.from_str((folder / "tokenizer.json").read_text()), json.loads(
            (folder / "tokenizer_config.json").read_text()
        )
    except Exception as error:  # tokenizers raises plain Exception on a malformed file
        raise TokenizerError(f"{folder} does not hold a readable fast tokenizer ({error}); save it again") from error


def _special(config: dict, role: str, backend: tokenizers.Tokenizer, folder: epath.Path) -> tuple[str, int]:
    token = config.get(role)
    token = token["content"] if isinstance(token, dict) else token
    number = backend.token_to_id(token) if token else None
    if number is None:
        raise TokenizerError(
            f"{folder}/tokenizer_config.json names {role} {token!r}, which is not in the vocabulary; set {role} to a token that is"
        )
    return token, number
