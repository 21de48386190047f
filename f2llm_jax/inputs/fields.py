"""Tables that are read whole: texts, labels and numbers by role, each checked."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from etils import epath

from f2llm_jax.errors import UserError
from f2llm_jax.inputs import cells
from f2llm_jax.inputs.columns import BY_NAME, ColumnChoice, Columns, FileLayout, match
from f2llm_jax.inputs.folders import open_table
from f2llm_jax.inputs.tables import Block, File, read_blocks

CellKind = Literal["text", "optional text", "any text", "label", "number"]  # "any text" may be empty; an optional one also null
TEXT_NAMES = ("text", "passage", "positive", "pos", "document")
# A file of texts to embed, one of documents to search in, and the three of a retrieval task.
TEXTS = FileLayout({"text": (*TEXT_NAMES, "sentence", "query"), "title": ("title",)}, ("title",), ("an id", "a score"))
DOCUMENTS = FileLayout(
    {"text": TEXT_NAMES, "title": ("title",)}, ("title",), ("a query", "a negative", "an id", "a score", "an instruction")
)


@dataclasses.dataclass(frozen=True)
class Fields:
    """The rows of a table, by role."""

    files: list[File]
    columns: list[Columns]  # of each file
    values: dict[str, list[Any]]
    places: list[tuple[str, int]]  # file and row of each row

    def __len__(self) -> int:
        return len(self.places)

    def place(self, row: int) -> str:
        """Where a row is, for messages."""
        return "{}: row {}".format(*self.places[row])

    def describe(self) -> list[str]:
        """What was understood, one line a file."""
        return [f"{file.path}: {columns.describe({})}" for file, columns in zip(self.files, self.columns, strict=True)]

    def joined(self) -> list[str]:
        """Documents: the title, where there is one, a space and the text, as BEIR and mteb join them."""
        titles = self.values.get("title")
        return join([titles, self.values["text"]]) if titles else self.values["text"]


def read_fields(path: epath.PathLike, form: FileLayout, kinds: Mapping[str, CellKind], choice: ColumnChoice = BY_NAME) -> Fields:
    """Reads a table whole.

    Args:
      path: of a file, or of a folder that is one table.
      form: its roles.
      kinds: of each role.
      choice: the user's columns.

    Raises:
      UserError: the table cannot be read, has no rows, or a value is not of its kind; names file, row and column.
    """
    files = open_table(path)
    if not sum(file.rows for file in files):
        raise UserError(f"{path} has no rows; fill it or leave it out")
    columns = [match(file.path, file.names, form, choice) for file in files]
    values: dict[str, list[Any]] = {role: [] for role in form.roles if any(role in of_file.roles for of_file in columns)}
    places: list[tuple[str, int]] = []
    for file, of_file in zip(files, columns, strict=True):
        names = list(dict.fromkeys(name for found in of_file.roles.values() for name in found))
        for block in read_blocks(file, names):
            count = len(block.cells[names[0]])
            for role, found in values.items():
                found += _read(file, block, of_file.roles[role], kinds[role]) if role in of_file.roles else [""] * count
            places += [(file.path, block.first_row + row) for row in range(count)]
    return Fields(files, columns, values, places)


def join(parts: Sequence[Sequence[str | None]]) -> list[str]:
    """Texts of several columns, row by row, with a space between those that are not empty."""
    return [" ".join(part for part in row if part).strip() for row in zip(*parts, strict=True)]


def joined_texts(block: Block, names: Sequence[str]) -> cells.Texts:
    """One column of texts, or several joined; of several, null and absent ones are empty."""
    if len(names) == 1:
        return cells.texts(block.cells[names[0]])
    columns = [cells.texts(block.cells[name]) for name in names]
    broken = {row: why for column in columns for row, why in column.broken.items() if why != cells.ABSENT}
    rows = join([column.values.to_pylist() for column in columns])
    return cells.Texts(pa.array([None if row in broken else text for row, text in enumerate(rows)], pa.large_string()), broken)


def check_types(file: File, names: Sequence[str]) -> None:
    """Raises a UserError for a column of texts that is declared as something else."""
    for name in names:
        if name in file.types:
            raise UserError(f"{file.path}: column {name!r} is {file.types[name]}, not string; cast it to string")


def _read(file: File, block: Block, names: Sequence[str], kind: CellKind) -> list[Any]:
    if kind == "number":
        numbers, broken = cells.numbers(block.cells[names[0]])
        _refuse(file, block, names, broken)
        return numbers
    if kind == "label":
        found = cells.labels(block.cells[names[0]], file.classes.get(names[0], ()))
    else:
        check_types(file, names)
        found = joined_texts(block, names)
    broken = dict(found.broken)
    if kind == "optional text":
        broken = {row: why for row, why in broken.items() if why != cells.ABSENT}
    else:
        broken |= {row: found.reason(row) for row in np.flatnonzero(found.values.is_null()).tolist()}
    if kind in ("text", "label"):
        blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(found.values), ""), False)
        broken |= dict.fromkeys(np.flatnonzero(blank).tolist(), cells.EMPTY)
    _refuse(file, block, names, broken)
    return pc.fill_null(found.values, "").to_pylist()


def _refuse(file: File, block: Block, names: Sequence[str], broken: Mapping[int, str]) -> None:
    if broken:
        row = min(broken)
        raise UserError(f"{file.path}: row {block.first_row + row}, column {'+'.join(names)!r} {broken[row]}; correct it or drop the row")
