"""A user's file as columns of cells, streamed: parquet, Arrow, JSON lines, CSV, TSV and lines of text.

Text forms may be compressed (`.gz`, `.zst`). All are read through `epath`, so a file may be in `gs://` or `hf://`. The columns of a
JSON-lines file are those of all its rows: opening one reads it whole.
"""

import contextlib
import csv
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
from etils import epath

from f2llm_jax.errors import UserError
from f2llm_jax.inputs import arrow_files, text_files
from f2llm_jax.inputs.cells import Cells

FORMATS = ("parquet", "arrow", "jsonl", "ndjson", "json", "csv", "tsv", "txt")
COMPRESSED = ("jsonl", "ndjson", "json", "csv", "tsv", "txt")
SUFFIXES = (*(f".{name}" for name in FORMATS), *(f".{name}{end}" for name in COMPRESSED for end in (".gz", ".zst")))


@dataclasses.dataclass(frozen=True)
class File:
    """What is known of a file before its rows are read.

    Plain values all of them, since it travels to other processes and into a dataset's settings.
    """

    path: str  # local or a URL
    names: tuple[str, ...]  # of its columns
    rows: int
    groups: tuple[int, ...]  # rows of each piece that can be read without what comes before it; they add up to `rows`
    lists: tuple[str, ...] = ()  # columns with a list in some cell
    types: dict[str, str] = dataclasses.field(default_factory=dict)  # of columns declared as neither texts nor lists of texts
    classes: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # names of the labels of a `datasets.ClassLabel` column
    constants: dict[str, str | None] = dataclasses.field(default_factory=dict)  # columns that folder names give, as `lang=de/`


@dataclasses.dataclass(frozen=True)
class Block:
    """Consecutive rows of a file: their cells by column, and the number in the file of the first, from 0."""

    first_row: int
    cells: dict[str, Cells]


def split_suffix(path: epath.PathLike) -> tuple[str, str] | None:
    """The name of a file without its suffix, and its suffix; None for a file of no form that is read."""
    name = epath.Path(path).name
    suffix = max((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), key=len, default=None)
    return (name[: -len(suffix)], suffix) if suffix and len(name) > len(suffix) else None


def open_file(path: epath.PathLike, constants: dict[str, str | None] | None = None) -> File:
    """Reads the schema and counts the rows.

    Raises:
      UserError: the file cannot be read, or has two columns of one name.
    """
    found = split_suffix(path)
    if found is None:
        raise UserError(f"{path} is of no form that is read by its suffix; write it as one of *{', *'.join(SUFFIXES[: len(FORMATS)])}")
    with _explained(path, f"is not a readable {found[1][1:]} file", "it may be truncated; fetch or write it again"):
        opened = (arrow_files.open_file if _is_arrow(found[1]) else text_files.open_file)(path, found[1])
    file = File(str(path), **opened, constants=constants or {})
    if twice := [name for name in file.constants if name in file.names]:
        raise UserError(f"{path}: the column {twice[0]!r} is in the file and in the name of its folder; drop one of the two")
    return dataclasses.replace(file, names=(*file.names, *file.constants))


def read_blocks(file: File, names: Sequence[str], start: int = 0, stop: int | None = None) -> Iterator[Block]:
    """Rows `start <= row < stop` of the columns `names`, in order; a column that the file does not have is absent in every row.

    Raises:
      UserError: rows cannot be read; it says from which one on.
    """
    found = split_suffix(file.path)
    assert found
    stop = file.rows if stop is None else stop
    stored = [name for name in names if name not in file.constants]
    read = arrow_files.read_cells if _is_arrow(found[1]) else text_files.read_cells
    blocks: Iterator[tuple[int, int, dict[str, Any]]] = read(file.path, found[1], stored, start, stop)
    row = start
    while True:
        with _explained(file.path, f"rows from {row} on cannot be read", "the file is damaged; fetch or write it again"):
            block = next(blocks, None)
        if block is None:
            return
        row, count, cells = block
        constants = {name: pa.array([file.constants[name]] * count, pa.large_string()) for name in names if name in file.constants}
        yield Block(row, cells | constants)
        row += count


def _is_arrow(suffix: str) -> bool:
    return suffix in (".parquet", ".arrow")


@contextlib.contextmanager
def _explained(path: epath.PathLike, problem: str, remedy: str) -> Iterator[None]:
    """Turns what readers raise into a UserError."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; name a file or folder that does") from error
    except (pa.ArrowException, OSError, EOFError, csv.Error, UnicodeError) as error:
        raise UserError(f"{path}: {problem} ({' '.join(str(error).split())}); {remedy}") from error
