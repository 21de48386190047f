"""Cells of users' files as texts, lists of texts, labels and numbers, and why a cell is none.

Nothing is inferred: `007`, `true` and `1.0` in a text column are texts, and a JSON number that serves as a label keeps its digits.
"""

import ast
import dataclasses
import datetime
import json
import math
import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

Cells: TypeAlias = pa.Array | list[Any]  # of one column: Arrow's, or Python's for JSON lines

NULL, ABSENT, NOT_UTF8, EMPTY = "is null", "is absent", "is not valid UTF-8", "is empty"
MOST = float(np.finfo(np.float32).max)
NOT_A_LIST = "is not a JSON list of texts"
_LITERAL = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)  # a text as Python writes it
PASSAGE_IDS = ("docid", "doc_id", "_id", "id", "pid")  # of a passage that is an object: they tell nothing of its text


class Missing:
    """The cell of a JSON row that leaves its column out."""


MISSING = Missing()


class Number(float):
    """A number of a JSON file, with its spelling: as labels `1.10` and `1.1` are two."""

    literal: str

    def __new__(cls, literal: str) -> "Number":
        number = super().__new__(cls, literal)
        number.literal = literal
        return number


@dataclasses.dataclass(frozen=True)
class Texts:
    """A column of texts: valid large strings, null where a cell holds none; `broken` says why, unless the cell is null."""

    values: pa.Array
    broken: dict[int, str]

    def reason(self, index: int) -> str:
        return self.broken.get(index, NULL)


@dataclasses.dataclass(frozen=True)
class TextLists:
    """A column of lists of texts, all lists after one another; `broken` by row says what is no list. Null and absent are empty.

    Items may be objects with a title and a text, as Tevatron writes passages.
    """

    flat: Texts
    lengths: Int[np.ndarray, " B"]
    broken: dict[int, str]

    @property
    def starts(self) -> Int[np.ndarray, " B"]:
        return np.cumsum(self.lengths) - self.lengths

    def item(self, number: int) -> Texts:
        """The text `number` of every list, null where a list is shorter."""
        there, at = self.lengths > number, self.starts + number
        values = self.flat.values.take(pa.array(np.where(there, at, 0), mask=~there))
        broken = {row: ABSENT for row in np.flatnonzero(~there).tolist()}
        broken |= {row: self.flat.broken[at[row]] for row in np.flatnonzero(there).tolist() if at[row] in self.flat.broken}
        return Texts(values, broken | {row: why for row, why in self.broken.items() if number == 0})


def is_text(kind: pa.DataType) -> bool:
    """Whether a declared column holds texts (or nothing but nulls)."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or pa.types.is_null(kind)


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def texts(cells: Cells) -> Texts:
    """The texts of a column. Arrow does not check that its strings are UTF-8; here one that is not becomes null."""
    if isinstance(cells, list):
        return _texts(cells)
    if pa.types.is_dictionary(cells.type):
        cells = cells.dictionary_decode()
    if pa.types.is_null(cells.type):
        return Texts(pa.nulls(len(cells), pa.large_string()), {})
    if pa.types.is_string_view(cells.type):
        cells = cells.cast(pa.binary_view()).cast(pa.large_binary())
    if not (is_text(cells.type) or pa.types.is_large_binary(cells.type)):
        return _texts(cells.to_pylist())
    binary = cells.cast(pa.large_binary())
    try:
        return Texts(binary.cast(pa.large_string()), {})
    except pa.ArrowInvalid:
        return _texts([None if value is None else value.decode(errors="surrogateescape") for value in binary.to_pylist()])


def _texts(values: Sequence[Any]) -> Texts:
    broken = {}
    for i, value in enumerate(values):
        if isinstance(value, str):
            if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
                broken[i] = NOT_UTF8
        elif value is not None:
            broken[i] = ABSENT if value is MISSING else f"is {_named(value)}, not a text"
    return Texts(pa.array([None if i in broken else value for i, value in enumerate(values)], pa.large_string()), broken)


def _named(value: Any) -> str:
    names: dict[type, str] = {bool: "true or false", Number: "a number", int: "a number", float: "a number", list: "a list"}
    if isinstance(value, dict):
        return f"an object of {', '.join(map(str, value))}"
    return names.get(type(value), f"of type {type(value).__name__}")


def text_lists(cells: Cells) -> TextLists:
    """The lists of a column: lists, JSON lists (or Python's) in a text, and in JSON lines also a text alone."""
    if not isinstance(cells, list) and is_list(cells.type):
        lengths = pc.fill_null(pc.list_value_length(cells), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        items = cells.flatten()
        return TextLists(
            _texts([_passage(item) for item in items.to_pylist()]) if pa.types.is_struct(items.type) else texts(items), lengths, {}
        )
    alone = isinstance(cells, list)
    values = list(cells) if isinstance(cells, list) else texts(cells).values.to_pylist()
    flat: list[Any] = []
    broken, lengths = {}, np.zeros(len(values), np.int64)
    for row, value in enumerate(values):
        found = _as_list(value, alone)
        if found is None:
            broken[row], found = NOT_A_LIST, []
        flat += map(_passage, found)
        lengths[row] = len(found)
    return TextLists(_texts(flat), lengths, broken)


def _passage(item: Any) -> Any:
    """The title and the text of an object, as BEIR and mteb join them; the item itself where it is anything else."""
    if not isinstance(item, dict) or not isinstance(item.get("text"), str) or not item.keys() <= {"text", "title", *PASSAGE_IDS}:
        return item
    title = item.get("title")
    return " ".join(part for part in (title, item["text"]) if part) if title is None or isinstance(title, str) else item


def _as_list(value: Any, alone: bool) -> list[Any] | None:
    if value is None or value is MISSING or value == "":
        return []
    if isinstance(value, list):
        return value
    if isinstance(value, str):
        parsed = parse_list(value)
        return [value] if parsed is None and alone and not value.lstrip().startswith("[") else parsed
    return None


def in_brackets(text: str) -> bool:
    return text.lstrip().startswith("[") and text.rstrip().endswith("]")


def parse_list(text: str) -> list[Any] | None:
    """The list of texts or objects that `text` spells in JSON or, as pandas writes lists to CSV, in Python; None if it spells none.

    `['a' 'b']`, as NumPy writes arrays, is none: Python would take its texts for one.
    """
    if not in_brackets(text):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        joined = parse is ast.literal_eval and re.search(r"''\s*''", _LITERAL.sub("''", text))
        return found if isinstance(found, list) and not joined and all(isinstance(item, str | dict) for item in found) else None
    return None


def labels(cells: Cells, classes: Sequence[str] = ()) -> Texts:
    """Labels and ids as the texts that spell them: digits as written, `true` and `false`, dates in ISO form.

    Args:
      cells: of any type.
      classes: names of the whole numbers from 0 on, where the file carries them (`datasets.ClassLabel`); -1 means no label.
    """
    if not isinstance(cells, list) and is_text(cells.type):
        return texts(cells)
    values = [_label(value, classes) for value in (cells if isinstance(cells, list) else cells.to_pylist())]
    return _texts(values)


def _label(value: Any, classes: Sequence[str]) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Number):
        return classes[int(value)] if classes and 0 <= value < len(classes) else value.literal
    if isinstance(value, int) and classes:
        return classes[value] if 0 <= value < len(classes) else None
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return value if value is None or isinstance(value, str | Missing | list | dict | bytes) else str(value)


@dataclasses.dataclass(frozen=True)
class NumberLists:
    """A column of lists of numbers, NaN for null in a list; `broken` by row says what is none. Null and absent are empty."""

    values: list[list[float]]
    broken: dict[int, str]


def number_lists(cells: Cells) -> NumberLists:
    """The lists of a column: a number alone, lists, and texts that spell either, a list in JSON."""
    values: list[list[float]] = []
    broken: dict[int, str] = {}
    for row, cell in enumerate(cells if isinstance(cells, list) else cells.to_pylist()):
        if isinstance(cell, str):
            try:
                cell = None if not cell.strip() else json.loads(cell) if in_brackets(cell) else _number(cell)
            except ValueError:
                broken[row] = f"is {cell!r}, no number and no list of numbers"
        found = [] if cell is None or cell is MISSING or row in broken else cell if isinstance(cell, list) else [cell]
        wrong = [one for one in found if one is not None and (isinstance(one, bool | str | Missing) or not _finite(one))]
        if wrong:
            broken[row] = f"has {wrong[0]!r} among its numbers, not a finite one"
        values.append([] if row in broken else [math.nan if one is None else float(one) for one in found])
    return NumberLists(values, broken)


def _finite(value: Any) -> bool:
    """Whether it is a number that float32 holds."""
    try:
        return bool(abs(value) <= MOST)
    except TypeError:
        return False


def _number(value: Any) -> float:
    """A number, or the text that spells one.

    Raises:
      TypeError, ValueError: it is none. Python would read `1_0` as 10.
    """
    if "_" in str(value):
        raise ValueError
    return float(value)


def numbers(cells: Cells) -> tuple[list[float], dict[int, str]]:
    """Finite numbers, written as numbers or as texts; by row, what is none (its number is NaN)."""
    found, broken = [], {}
    for row, value in enumerate(cells if isinstance(cells, list) else cells.to_pylist()):
        try:
            number = math.nan if value is None or value is MISSING else _number(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            missing = NULL if value is None else ABSENT if value is MISSING else None
            broken[row] = missing or f"is {value.literal if isinstance(value, Number) else value!r}, not a finite number"
        found.append(number)
    return found, broken
