"""What becomes of rows that are not as they should be: repaired, skipped and counted, or an error.

    anomaly                                         default             --skip-invalid      --strict
    query or passage null, empty, not a text,
      not valid UTF-8                               error               row skipped         error
    negative null, empty, not a text, not UTF-8     error               negative dropped    error
    language not a text, not valid UTF-8            error               unknown             error
    scores not finite numbers, or not one each      error               no scores           error
    graded row without a score                      error               row skipped         error
    negative is a positive of its row               negative dropped    negative dropped    error
    negative repeats an earlier one of its row      negative dropped    negative dropped    error
    no negative left in a clustering or
      classification row (its loss would be 0)      row skipped         row skipped         error

The files of the F2LLM-v2 release have a few empty texts; for them the default is `--skip-invalid`.

Two texts are the same if they are equal in Unicode's form NFC, or if their token ids are (see `shards`): a model cannot tell them apart.
A query is empty if nothing is left once its instruction is gone. What is dropped leaves a row with fewer negatives: the rest
close up, and a step draws the missing ones from those its row has left (see `pipeline`). Rows of JSON lines may leave out negatives.
A missing column, a column declared as another type, and a file that cannot be read are always errors.
"""

import dataclasses
import unicodedata
from collections import Counter
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int, Shaped

from f2llm_jax.errors import UserError
from f2llm_jax.inputs.cells import ABSENT, EMPTY, NULL
from f2llm_jax.inputs.pairs import PairBlock
from f2llm_jax.text import strip_instruction

Policy = Literal["default", "skip", "strict"]
POSITIVE = "is the positive"


@dataclasses.dataclass(frozen=True)
class CleanRows:
    """B rows that can be trained on, each with its positive and N negatives."""

    path: str
    index: Int[np.ndarray, " B"]  # which rows of the block they are
    row: Int[np.ndarray, " B"]  # of the file, for messages
    queries: list[str]  # with the instruction they have or are given
    languages: list[str]  # "" where unknown
    documents: Int[np.ndarray, "B 1+N"]  # positive then negatives, numbers into `texts`; -1 for a negative that does not exist
    texts: list[str]  # the distinct documents
    counters: Counter[str]  # what was skipped ("rows: ..."), repaired ("negatives: ...") and is remarkable ("warning: ...")
    scores: Float[np.ndarray, "B 1+N"] | None = None  # float32, of `documents`, NaN for none; None where the file has no scores


def clean(
    path: str,
    block: PairBlock,
    negatives: int,
    needs_negatives: bool,
    policy: Policy,
    wanted: Bool[np.ndarray, " B"],
    repeated: bool = False,
    needs_scores: bool = False,
) -> CleanRows:
    """Applies the rules above.

    Args:
      path: of the file, for messages.
      block: its rows.
      negatives: N of the result, at least as many as the file has.
      needs_negatives: a row without any is skipped.
      policy: the column of the table above.
      wanted: the other rows are left out, unseen and uncounted.
      repeated: negatives that repeat or are a positive stay.
      needs_scores: a row whose positive has none is skipped.

    Raises:
      UserError: an anomaly that is an error; names the first one, with row and field.
    """
    queries = block.texts["query"].values.to_pylist()
    bare = [None if query is None else strip_instruction(query).strip() for query in queries]
    names = ["passage", *(f"negative_{i}" for i in range(1, negatives + 1) if f"negative_{i}" in block.texts)]
    codes, texts, empty = _distinct([block.texts[name].values for name in names])
    same = _same_form(texts)
    judge = _Judge(path, block, policy, wanted)
    kept = judge.drop_rows("query", np.array([query is None for query in bare]), None)
    kept &= judge.drop_rows("query", np.array([query == "" for query in bare]), EMPTY)
    kept &= judge.drop_rows("passage", codes[0] < 0, None)
    kept &= judge.drop_rows("passage", (codes[0] >= 0) & empty[codes[0]], EMPTY)
    judge.rows = kept
    scores = judge.scores(negatives)
    if needs_scores:
        unscored = np.ones(len(queries), bool) if scores is None else np.isnan(scores[:, 0])
        kept = judge.drop_rows("scores", unscored, NULL)
    there = np.array([judge.keep_negatives(name, codes[i], empty) for i, name in enumerate(names) if i], bool)
    there = there.reshape(len(names) - 1, len(queries))
    forms = same[codes[1:]]
    if not repeated:
        there &= judge.keep_others(names[1:], there & _is_positive(forms, same[codes[0]], block.rows), POSITIVE)
        there &= judge.keep_others(names[1:], _repeats(np.where(there, forms, -1)), "repeats an earlier one")
    if needs_negatives:
        kept = kept & judge.keep_rows_with_negatives(np.any(there, axis=0))
    documents = np.full((len(queries), 1 + negatives), -1, np.int64)
    documents[:, 0] = codes[0]
    documents[:, 1 : len(names)] = np.where(there, codes[1:], -1).T
    index = np.flatnonzero(kept)
    languages = judge.languages() if "lang" in block.texts else [""] * len(queries)
    echoes = _echoes([bare[i] for i in index], texts, documents[index])
    judge.counters["warning: rows whose query is their passage"] += int(echoes[:, 0].sum())
    judge.counters["warning: rows with a negative that is their query"] += int(echoes[:, 1:].any(axis=1).sum())
    return CleanRows(
        path=path,
        index=index,
        row=block.rows[index],
        queries=[queries[i] for i in index],
        languages=[languages[i] for i in index],
        documents=close_up(documents[index]),
        texts=texts,
        counters=+judge.counters,
        scores=None if scores is None else close_up(documents[index], np.where(documents < 0, np.nan, scores)[index]),
    )


def close_up(documents: Int[np.ndarray, "B 1+N"], values: Shaped[np.ndarray, "B 1+N"] | None = None) -> Shaped[np.ndarray, "B 1+N"]:
    """The documents of the same rows, or what is said of them, with absent negatives (-1) last."""
    order = np.argsort(documents < 0, axis=1, kind="stable")
    return np.take_along_axis(documents if values is None else values, order, axis=1)


def _distinct(arrays: list[pa.Array]) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Numbers int64 `[columns, rows]` into the distinct texts (-1 for null), those texts, and which of them are empty (a False more)."""
    encoded = pa.concat_arrays(arrays).dictionary_encode()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64).reshape(len(arrays), -1)
    empty = pc.equal(pc.utf8_trim_whitespace(encoded.dictionary), "").to_numpy(zero_copy_only=False).astype(bool)
    return codes, encoded.dictionary.to_pylist(), np.append(empty, False)


def _echoes(queries: list[str | None], texts: list[str], documents: Int[np.ndarray, "B 1+N"]) -> Bool[np.ndarray, "B 1+N"]:
    """Which documents are their row's query, but for its instruction and outer spaces."""
    number: dict[str | None, int] = {}
    same = np.array([number.setdefault(text.strip(), i) for i, text in enumerate(texts)] + [-1])  # the last of -1, none
    return same[documents] == np.array([number.get(query, -2) for query in queries], np.int64)[:, None]


def _same_form(texts: list[str]) -> Int[np.ndarray, " S+1"]:
    """For each text the number of one that is equal to it in Unicode's form NFC; -1 for number -1, behind the last."""
    same = np.append(np.arange(len(texts)), -1)
    odd = [i for i, text in enumerate(texts) if not text.isascii() and not unicodedata.is_normalized("NFC", text)]
    if odd:
        number = {text: i for i, text in enumerate(texts)}
        for i in odd:
            same[i] = number.setdefault(unicodedata.normalize("NFC", texts[i]), i)
    return same


def _is_positive(negatives: np.ndarray, positive: np.ndarray, row: np.ndarray) -> np.ndarray:
    """bool like `negatives` `[n, pairs]`: equal to the positive, or to another positive of the same row of the file."""
    found = negatives == positive
    for first in np.flatnonzero(np.append(row[1:] == row[:-1], False) & np.append(True, row[1:] != row[:-1])):
        siblings = np.flatnonzero(row == row[first])
        found[:, siblings] = np.isin(negatives[:, siblings], positive[siblings])
    return found


def _repeats(codes: np.ndarray) -> np.ndarray:
    """bool like `codes` `[n, rows]`: an equal number, other than -1, is above it."""
    order = np.argsort(codes, axis=0, kind="stable")
    ordered = np.take_along_axis(codes, order, axis=0)
    again = np.zeros(codes.shape, bool)
    again[1:] = (ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0)
    repeats = np.zeros(codes.shape, bool)
    np.put_along_axis(repeats, order, again, axis=0)
    return repeats


@dataclasses.dataclass
class _Judge:
    """Decides what becomes of anomalies of one block and counts them; only in rows that are still wanted."""

    path: str
    block: PairBlock
    policy: Policy
    rows: np.ndarray
    counters: Counter[str] = dataclasses.field(default_factory=Counter)

    def drop_rows(self, name: str, bad: np.ndarray, reason: str | None) -> np.ndarray:
        """Rows that remain, bool `[rows]`; without a `reason` the block knows it."""
        bad = bad & self.rows
        for i in np.flatnonzero(bad).tolist():
            why = reason or self.block.texts[name].reason(i)
            if self.policy != "skip":
                raise self._error(
                    name,
                    i,
                    why,
                    f"give it a {'number' if name == 'scores' else 'text'} or drop the row, or pass --skip-invalid to leave such rows out",
                )
            self.counters[f"rows: {name} {why}"] += 1
        self.rows = self.rows & ~bad
        return self.rows

    def keep_negatives(self, name: str, codes: np.ndarray, empty: np.ndarray) -> np.ndarray:
        """Negatives of one column that are texts, bool `[rows]`."""
        there = codes >= 0
        bad = (~there | empty[codes]) & self.rows
        for i in np.flatnonzero(bad).tolist():
            why = EMPTY if there[i] else self.block.texts[name].reason(i)
            if why == ABSENT:
                continue
            if self.policy != "skip":
                raise self._error(name, i, why, "give it a text or drop the row, or pass --skip-invalid to leave such negatives out")
            self.counters[f"negatives: {why}"] += 1
        return there & ~bad

    def languages(self) -> list[str]:
        """The language of each row, "" where it has none."""
        for i, why in sorted(self.block.texts["lang"].broken.items()):
            if self.rows[i] and why != ABSENT:
                if self.policy != "skip":
                    raise self._error("lang", i, why, "give it a text or leave it out, or pass --skip-invalid to take it for unknown")
                self.counters[f"languages: {why}"] += 1
        return self.block.texts["lang"].values.fill_null("").to_pylist()

    def scores(self, negatives: int) -> Float[np.ndarray, "B 1+N"] | None:
        """The scores of each row, NaN for none, as many as `negatives` and one."""
        if self.block.scores is None:
            return None
        for i, why in sorted(self.block.scores.broken.items()):
            if self.rows[i]:
                if self.policy != "skip":
                    raise self._error("scores", i, why, "correct it, or pass --skip-invalid to take it for no scores")
                self.counters[f"scores: {why}"] += 1
        found = self.block.scores.values
        return np.pad(found, ((0, 0), (0, 1 + negatives - found.shape[1])), constant_values=np.nan)

    def keep_others(self, names: list[str], bad: np.ndarray, why: str) -> np.ndarray:
        """Negatives that are not `bad`, bool `[n, rows]`."""
        bad = bad & self.rows
        if bad.any() and self.policy == "strict":
            column, i = np.argwhere(bad)[0].tolist()
            raise self._error(names[column], i, why, "replace it, or leave out --strict to have such negatives dropped")
        self.counters[f"negatives: {why}"] += int(bad.sum())
        return ~bad

    def keep_rows_with_negatives(self, some: np.ndarray) -> np.ndarray:
        """Rows that have a negative left, bool `[rows]`."""
        bad = ~some & self.rows
        if bad.any() and self.policy == "strict":
            raise no_negative(self.path, int(self.block.rows[np.flatnonzero(bad)[0]]))
        self.counters["rows: no negative left"] += int(bad.sum())
        return ~bad

    def _error(self, name: str, index: int, why: str, remedy: str) -> UserError:
        return UserError(f"{self.path}: row {self.block.rows[index]}, column {self.block.names.get(name, name)!r} {why}; {remedy}")


def no_negative(path: str, row: int) -> UserError:
    return UserError(
        f"{path}: row {row} has no negative, and this kind of task trains on nothing else; give it one, or leave out --strict to have "
        "such rows skipped"
    )
