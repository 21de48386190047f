"""What becomes of rows that are not as they should be: repaired, set aside and counted, or an error.

    anomaly                                         default             --set-aside         --strict
    query or passage null, empty, not a string,
      not valid UTF-8                               error               row set aside       error
    negative null, empty, not a string, not UTF-8   error               negative dropped    error
    negative is the positive, by text               negative dropped    negative dropped    error
    negative repeats an earlier one of its row      negative dropped    negative dropped    error
    no negative left in a clustering or
      classification row (its loss would be 0)      row set aside       row set aside       error

The files of the F2LLM-v2 release have a few empty texts; for them the default is `--set-aside`.

A query is empty if nothing is left once its instruction is gone. What is dropped leaves a row with fewer negatives: the rest
close up, and a step draws the missing ones from those its row has left (see `pipeline`). JSONL rows may leave out negatives.
A missing column, a column declared as another type, and a file that cannot be read are always errors.
"""

import dataclasses
from collections import Counter
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from f2llm_jax.preparation.raw_files import ABSENT, Block, RawDataError
from f2llm_jax.text import strip_instruction

Policy = Literal["default", "set-aside", "strict"]

EMPTY = "is empty"


@dataclasses.dataclass(frozen=True)
class CleanRows:
    """Rows that can be trained on.

    Attributes:
      index: int64 `[rows]`, which rows of the block they are.
      queries: their queries.
      languages: "" where unknown.
      documents: int64 `[rows, 1 + n]`, positive then negatives, numbers into `texts`; -1 for a negative that does not exist.
      texts: the distinct documents.
      counters: what was set aside ("rows: ...") and repaired ("negatives: ...").
    """

    index: np.ndarray
    queries: list[str]
    languages: list[str]
    documents: np.ndarray
    texts: list[str]
    counters: Counter


def clean(
    path: str, block: Block, columns: dict[str, str], negatives: int, needs_negatives: bool, policy: Policy, wanted: np.ndarray
) -> CleanRows:
    """Applies the rules above.

    Args:
      path: of the file, for messages.
      block: its rows.
      columns: from `query`, `passage`, `negative_1`, ..., `lang` to the file's columns; what the file has.
      negatives: n of the result, at least as many as the file has.
      needs_negatives: a row without any is set aside.
      policy: the column of the table above.
      wanted: bool `[rows]`; the other rows are left out, unseen and uncounted.

    Raises:
      RawDataError: an anomaly that is an error; names the first one, with row and field.
    """
    queries = block.columns[columns["query"]].to_pylist()
    names = ["passage", *(f"negative_{i}" for i in range(1, negatives + 1) if f"negative_{i}" in columns)]
    codes, texts, empty = _distinct([block.columns[columns[name]] for name in names])
    judge = _Judge(path, block, columns, policy, wanted)
    kept = judge.drop_rows("query", np.array([query is None for query in queries]), None)
    kept &= judge.drop_rows("query", np.array([query is not None and not strip_instruction(query).strip() for query in queries]), EMPTY)
    kept &= judge.drop_rows("passage", codes[0] < 0, None)
    kept &= judge.drop_rows("passage", (codes[0] >= 0) & empty[codes[0]], EMPTY)
    judge.rows = kept
    there = [judge.keep_negatives(name, codes[i], empty) for i, name in enumerate(names) if i]
    there = np.array(there, bool).reshape(len(names) - 1, len(queries))
    there &= judge.keep_others(names[1:], there & (codes[1:] == codes[0]), "is the positive")
    there &= judge.keep_others(names[1:], _repeats(np.where(there, codes[1:], -1)), "repeats an earlier one")
    if needs_negatives:
        kept = kept & judge.keep_rows_with_negatives(there.any(axis=0))
    order = np.argsort(~there, axis=0, kind="stable")
    closed = np.take_along_axis(np.where(there, codes[1:], -1), order, axis=0)
    documents = np.full((len(queries), 1 + negatives), -1, np.int64)
    documents[:, 0], documents[:, 1 : len(names)] = codes[0], closed.T
    index = np.flatnonzero(kept)
    languages = block.columns[columns["lang"]].fill_null("").to_pylist() if "lang" in columns else [""] * len(queries)
    return CleanRows(index, [queries[i] for i in index], [languages[i] for i in index], documents[index], texts, +judge.counters)


def _distinct(arrays: list[pa.Array]) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Numbers int64 `[columns, rows]` into the distinct texts (-1 for null), those texts, and which of them are empty (a False more)."""
    encoded = pa.concat_arrays(arrays).dictionary_encode()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64).reshape(len(arrays), -1)
    empty = pc.equal(pc.utf8_trim_whitespace(encoded.dictionary), "").to_numpy(zero_copy_only=False).astype(bool)
    return codes, encoded.dictionary.to_pylist(), np.append(empty, False)


def _repeats(codes: np.ndarray) -> np.ndarray:
    """bool like `codes` `[n, rows]`: an equal number, other than -1, stands above it."""
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
    block: Block
    columns: dict[str, str]
    policy: Policy
    rows: np.ndarray
    counters: Counter = dataclasses.field(default_factory=Counter)

    def drop_rows(self, name: str, bad: np.ndarray, reason: str | None) -> np.ndarray:
        """Rows that remain, bool `[rows]`; without a `reason` the block knows it."""
        bad = bad & self.rows
        for i in np.flatnonzero(bad).tolist():
            why = reason or self.block.reason(self.columns[name], i)
            if self.policy != "set-aside":
                raise self._error(name, i, why, "give it a text or drop the row, or pass --set-aside to leave such rows out")
            self.counters[f"rows: {name} {why}"] += 1
        self.rows = self.rows & ~bad
        return self.rows

    def keep_negatives(self, name: str, codes: np.ndarray, empty: np.ndarray) -> np.ndarray:
        """Negatives of one column that are texts, bool `[rows]`."""
        there = codes >= 0
        bad = (~there | empty[codes]) & self.rows
        for i in np.flatnonzero(bad).tolist():
            why = EMPTY if there[i] else self.block.reason(self.columns[name], i)
            if why == ABSENT:
                continue
            if self.policy != "set-aside":
                raise self._error(name, i, why, "give it a text or drop the row, or pass --set-aside to leave such negatives out")
            self.counters[f"negatives: {why}"] += 1
        return there & ~bad

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
            raise RawDataError(
                f"{self.path}: row {self.block.first_row + int(np.flatnonzero(bad)[0])} has no negative, and this kind of task trains on "
                "nothing else; give it one, or leave out --strict to have such rows set aside"
            )
        self.counters["rows: no negative left"] += int(bad.sum())
        return ~bad

    def _error(self, name: str, index: int, why: str, remedy: str) -> RawDataError:
        return RawDataError(f"{self.path}: row {self.block.first_row + index}, column {self.columns[name]!r} {why}; {remedy}")
