"""Texts of a source as token ids: what is cut, what spells a special token, and which texts are one to the model."""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import tokenizers
from jaxtyping import Bool, Int

from f2llm_jax.errors import UserError
from f2llm_jax.preparation.cleaning import CleanRows, close_up
from f2llm_jax.text import Tokenizer, load_tokenizer, truncate


class TextEncoding:
    """A tokenizer for texts of users, in which a token that the tokenizer keeps for itself is a word like any other.

    A text with `<|im_end|>` in it would otherwise hold the token that ends a text, before its end or twice at its end. Users' texts do not
    mean it, so that here it is spelled out in pieces; everywhere else the tokenizer reads it as that token, as other software does.
    """

    def __init__(self, tokenizer: Tokenizer):
        tokens = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values() if token.special]
        self._special = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
        self._tokenizer = tokenizer

    @functools.cached_property
    def _spelling(self) -> Tokenizer:
        backend = tokenizers.Tokenizer.from_str(self._tokenizer.backend.to_str())
        backend.encode_special_tokens = True
        return dataclasses.replace(self._tokenizer, backend=backend)

    def encode(self, texts: Sequence[str], max_length: int) -> "Encoded":
        """Token ids of at most `max_length`, the end token last."""
        ids = self._tokenizer.encode(texts, max_length + 1)
        search, cut, spelled = self._special.search, np.zeros(len(texts), bool), np.zeros(len(texts), bool)
        for i in [i for i, text in enumerate(texts) if search(text)]:
            ids[i], spelled[i] = self._spelling.encode([texts[i]], max_length + 1)[0], True
        for i in [i for i, found in enumerate(ids) if len(found) > max_length]:
            ids[i], cut[i] = truncate(ids[i], max_length, self._tokenizer.end_id), True
        return Encoded(ids, cut, spelled)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The token ids of S texts, int32, and what is remarkable in each."""

    ids: list[np.ndarray]
    cut: Bool[np.ndarray, " S"]  # longer than the limit
    spelled: Bool[np.ndarray, " S"]  # spells a special token


_loaded: dict[str, TextEncoding] = {}  # of this process, by folder


def load(folder: str) -> TextEncoding:
    """One tokenizer a process: a vocabulary of 150,000 takes longer to load than a small source to encode."""
    if folder not in _loaded:
        remember(folder, load_tokenizer(folder))
    return _loaded[folder]


def remember(folder: str, tokenizer: Tokenizer) -> None:
    """Spares this process to load the tokenizer that it has saved to `folder`."""
    _loaded.clear()
    _loaded[folder] = TextEncoding(tokenizer)


def drop_same_ids(
    rows: CleanRows, same: Int[np.ndarray, "B 1+N"], needs_negatives: bool, strict: bool
) -> tuple[CleanRows, Int[np.ndarray, " B"]]:
    """The rows without negatives whose token ids are those of their positive: to the model they are one text.

    Args:
      rows: cleaned, so that no negative is the positive by text.
      same: equal numbers for documents of equal ids, -1 for none.
      needs_negatives: a row that has none left is dropped.
      strict: such a negative is an error.

    Returns:
      What is left, and which of the rows given these are.
    """
    bad = (same == same[:, :1]) & (rows.documents >= 0)
    bad[:, 0] = False
    if not bad.any():
        return rows, np.arange(len(rows.index))
    if strict:
        row = int(rows.row[np.flatnonzero(bad.any(axis=1))[0]])
        raise UserError(f"{rows.path}: row {row} has a negative with the token ids of its positive; replace it, or leave out --strict")
    documents = np.where(bad, -1, rows.documents)
    scores = None if rows.scores is None else close_up(documents, np.where(bad, np.nan, rows.scores))
    documents = close_up(documents)
    kept = np.flatnonzero((documents[:, 1:] >= 0).any(axis=1) | (not needs_negatives))
    counters = rows.counters + Counter(
        {"negatives: has the token ids of the positive": int(bad.sum()), "rows: no negative left": len(documents) - len(kept)}
    )
    chosen = kept.tolist()
    left = dataclasses.replace(
        rows,
        index=rows.index[kept],
        row=rows.row[kept],
        queries=[rows.queries[i] for i in chosen],
        languages=[rows.languages[i] for i in chosen],
        documents=documents[kept],
        counters=+counters,
        scores=None if scores is None else scores[kept],
    )
    return left, kept
