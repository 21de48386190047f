"""The texts of a prepared dataset, from their token ids, and what a teacher reads of them.

A text comes back as the student reads it. Where its tokenizer normalises (NFC in Qwen3, lower case and no accents in BERT) it is the
normalised text; where it was truncated it is what was left, without a character that was cut in two. That nothing else is lost is checked
on every text: tokenised again, it has the ids that are stored.
"""

import dataclasses
from collections.abc import Sequence
from typing import Final, Literal, Protocol

import numpy as np
import tokenizers
from jaxtyping import Float

from f2llm_jax.errors import UserError
from f2llm_jax.storage.vectors import texts_digest
from f2llm_jax.text import TokenIds, instruction_of, query_prompt, strip_instruction

Role = Literal["query", "document"]
BROKEN = "\ufffd"  # what a decoder makes of a part of a character


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What a teacher reads before a text. None leaves it to the model: its own prompt where it has one, else nothing."""

    query: str | None = None  # `{instruction}` in it is the instruction of the stored query; without one the prompt is empty
    document: str | None = None

    def of(self, role: Role, instruction: str) -> str | None:
        if role == "document":
            return self.document
        return query_prompt(instruction, self.query) if self.query and "{instruction}" in self.query else self.query


@dataclasses.dataclass(frozen=True)
class StoredText:
    """A text of a dataset without the student's instruction."""

    role: Role
    prompt: str | None  # of the teacher; None for its own
    text: str

    @property
    def read(self) -> str:
        """What a teacher without a prompt of its own reads."""
        return (self.prompt or "") + self.text

    @property
    def id(self) -> str:
        """32 hex digits that stand for the role and what is read."""
        return texts_digest([self.role, self.read])


class TextDecoder:
    """Token ids back to texts, for one tokenizer."""

    def __init__(self, backend: tokenizers.Tokenizer, limit: int):
        """Args: `backend`, the student's tokenizer; `limit`, tokens at which its texts are truncated."""
        self._backend = tokenizers.Tokenizer.from_str(backend.to_str())
        self._backend.encode_special_tokens = True  # as preparation writes them: a special token within a text is spelled out
        self._before, self._limit = len(backend.encode("").ids) - 1, limit

    def decode(self, ids: Sequence[TokenIds]) -> list[str]:
        """The texts of token ids, each framed by the tokenizer's own first and last tokens.

        Raises:
          UserError: a text cannot be told from its ids, as where the tokenizer has one token for every unknown character.
        """
        inner = [text[self._before : -1].tolist() for text in ids]
        texts = self._decoded(inner)
        other = [i for i, found in enumerate(self._encoded(texts)) if found != inner[i]]
        # The last tokens of a truncated text may be others once it ends there, and may hold a part of a character; all else may not change.
        truncated = [i for i in other if len(ids[i]) >= self._limit]
        for i in truncated:
            texts[i] = texts[i].rstrip(BROKEN)
        again = self._decoded(self._encoded([texts[i] for i in truncated]))
        same = {i for i, text in zip(truncated, again, strict=True) if text == texts[i]}
        if wrong := [i for i in other if i not in same]:
            raise UserError(
                f"the text {texts[wrong[0]][:80]!r} does not have the stored token ids {inner[wrong[0]][:20]}: the dataset's tokenizer "
                "does not keep every character, and a teacher would read another text than the student; prepare with a byte-level one"
            )
        return texts

    def _decoded(self, ids: list[list[int]]) -> list[str]:
        return self._backend.decode_batch(ids, skip_special_tokens=False)

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        return [found.ids for found in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def as_stored(self, texts: Sequence[str]) -> list[str]:
        """Texts of a user's as `decode` would give them once they were stored."""
        ids = [np.array(found.ids, np.int32) for found in self._backend.encode_batch_fast(list(texts))]
        return self.decode([text if len(text) <= self._limit else np.append(text[: self._limit - 1], text[-1]) for text in ids])


def stored_texts(texts: Sequence[str], role: Role, prompts: Prompts) -> list[StoredText]:
    """The decoded texts of one split without the instruction that preparation kept or put before them."""
    return [StoredText(role, prompts.of(role, instruction_of(text)), strip_instruction(text)) for text in texts]


class TextModel(Protocol):
    """A model that reads texts by its own tokenizer."""

    name: str  # as given, for people
    digest: str  # of everything that its vectors depend on besides texts and prompts
    compute: str  # dtype that it computes in; "" where that is not known

    @property
    def width(self) -> int:
        """W, components of a vector."""

    def encode(self, texts: list[StoredText]) -> Float[np.ndarray, "S W"]:
        """Raw vectors of texts, in order.

        Raises:
          UserError: it has none for one of them, or cannot be reached.
        """


class TextTeacher:
    """A model that reads the texts of a dataset instead of the student's token ids."""

    reads: Final = "texts"

    def __init__(self, model: TextModel, decoder: TextDecoder, prompts: Prompts):
        """Args as named."""
        self.name, self.digest, self.compute, self.prompts = model.name, model.digest, model.compute, prompts
        self._model, self._decoder = model, decoder

    @property
    def width(self) -> int:
        return self._model.width

    def encode(self, ids: list[TokenIds], role: Role) -> Float[np.ndarray, "S W"]:
        """Raw vectors of stored texts, in order.

        Raises:
          UserError: a vector is not finite or zero, or there is none.
        """
        texts = stored_texts(self._decoder.decode(ids), role, self.prompts)
        vectors = self._model.encode(texts)
        if vectors.shape != (len(texts), self.width):
            raise UserError(f"{self.name} gives {list(vectors.shape)} numbers for {len(texts)} texts, not {self.width} for each")
        if len(wrong := np.flatnonzero(~(np.isfinite(vectors).all(axis=1) & vectors.any(axis=1)))):
            why = "not finite" if vectors[wrong[0]].any() else "zero"
            raise UserError(f"{self.name}: the vector of {texts[wrong[0]].read[:80]!r} is {why}; check that model, or leave the text out")
        return vectors
