"""Parquet, JSONL and CSV files as blocks of text columns, streamed; what a value means is for `cleaning` to say.

JSONL may be compressed (`.jsonl.gz`, `.jsonl.zst`). All are read through `epath`, so a file may lie in `gs://`.
"""

import contextlib
import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from f2llm_jax.errors import UserError

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".csv")
# A row may carry 65 documents of thousands of characters, so few rows a block keep memory small; texts enough for a tokenizer.
BLOCK_ROWS = 1_000
# A released file may be one row group of gigabytes: its columns are read through buffers, not whole.
PARQUET_BUFFER = 1 << 20
PEEKED_LINES = 1_000  # of a JSONL file, to learn its columns

NULL, ABSENT, NOT_UTF8 = "is null", "is absent", "is not valid UTF-8"


class RawDataError(UserError):
    """Raw data that cannot be used; the message, one line a problem, names file, row, field and remedy."""


@dataclasses.dataclass(frozen=True)
class RawFile:
    """What is known of a file before its rows are read.

    Attributes:
      path: local or `gs://`.
      names: of its columns.
      types: of the columns that are declared as something other than text.
      rows: number of rows.
      groups: rows of each piece that can be read without what comes before it; they add up to `rows`.
    """

    path: str
    names: tuple[str, ...]
    types: dict[str, str]
    rows: int
    groups: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Block:
    """Consecutive rows of a file.

    Attributes:
      first_row: number in the file of the first of them, from 0.
      columns: valid large strings `[rows]` by column; null where the file has no text.
      broken: by column and index in the block, what is there instead, where that is something other than null.
    """

    first_row: int
    columns: dict[str, pa.Array]
    broken: dict[str, dict[int, str]]

    def reason(self, column: str, index: int) -> str:
        """Why there is no text."""
        return self.broken.get(column, {}).get(index, NULL)


def source_name(path: epath.PathLike) -> str | None:
    """File name without its suffix; None for a file of another format."""
    name = epath.Path(path).name
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), None)


def open_file(path: epath.PathLike) -> RawFile:
    """Reads the schema and counts the rows.

    Raises:
      RawDataError: the file cannot be read.
    """
    with _explained(path, f"not a readable {_format(path)} file", "it may be truncated, fetch or write it again"):
        if str(path).endswith(".parquet"):
            with epath.Path(path).open("rb") as file:
                parquet = pq.ParquetFile(file)
                schema, metadata = parquet.schema_arrow, parquet.metadata
                types = {field.name: str(field.type) for field in schema if not _is_text(field.type)}
                groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
                return RawFile(str(path), tuple(schema.names), types, metadata.num_rows, groups)
        if str(path).endswith(".csv"):
            with _csv_rows(path) as (names, lines):
                rows = sum(1 for _ in lines)
            return RawFile(str(path), tuple(names), {}, rows, (rows,))
        with _lines(path) as lines:
            peeked = list(itertools.islice(lines, PEEKED_LINES))
            names = dict.fromkeys(name for number, line in enumerate(peeked) for name in _json_row(path, number, line))
            rows = len(peeked) + sum(1 for _ in lines)
        return RawFile(str(path), tuple(names), {}, rows, (rows,))


def read_blocks(path: epath.PathLike, names: Sequence[str], start: int, stop: int) -> Iterator[Block]:
    """Rows `start <= row < stop` of the columns `names`, in order.

    Raises:
      RawDataError: rows cannot be read; it says from which one on.
    """
    read = _parquet_blocks if str(path).endswith(".parquet") else _csv_blocks if str(path).endswith(".csv") else _json_blocks
    row = start
    blocks = read(path, names, start, stop)
    while True:
        with _explained(path, f"rows from {row} on cannot be read", "the file is damaged, fetch or write it again"):
            block = next(blocks, None)
        if block is None:
            return
        yield block
        row = block.first_row + len(block.columns[names[0]])


@contextlib.contextmanager
def _explained(path: epath.PathLike, problem: str, remedy: str) -> Iterator[None]:
    """Turns what readers raise into a RawDataError."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, csv.Error, UnicodeError) as error:
        raise RawDataError(f"{path}: {problem} ({' '.join(str(error).split())}); {remedy}") from error


def _format(path: epath.PathLike) -> str:
    return next(suffix for suffix in SUFFIXES if str(path).endswith(suffix))[1:]


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _parquet_blocks(path: epath.PathLike, names: Sequence[str], start: int, stop: int) -> Iterator[Block]:
    with epath.Path(path).open("rb") as file:
        parquet = pq.ParquetFile(file, buffer_size=PARQUET_BUFFER)
        ends = list(itertools.accumulate(parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)))
        begins = [0, *ends[:-1]]
        groups = [i for i, (begin, end) in enumerate(zip(begins, ends, strict=True)) if begin < stop and start < end]
        row = begins[groups[0]] if groups else stop
        for batch in parquet.iter_batches(BLOCK_ROWS, row_groups=groups, columns=list(names)):
            first, last = max(row, start), min(row + len(batch), stop)
            if first < last:
                kept = batch.slice(first - row, last - first)
                yield _checked(first, {name: kept.column(name).cast(pa.large_binary()) for name in names})
            row += len(batch)


def _checked(first_row: int, binary: dict[str, pa.Array]) -> Block:
    """Parquet does not check that its strings are UTF-8; a value that is not becomes null."""
    columns, broken = {}, {}
    for name, values in binary.items():
        try:
            columns[name] = values.cast(pa.large_string())
        except pa.ArrowInvalid:
            found = [None if value is None else value.decode(errors="surrogateescape") for value in values.to_pylist()]
            columns[name], broken[name] = _texts(found)
    return Block(first_row, columns, broken)


def _texts(values: Sequence[object], absent: object = None) -> tuple[pa.Array, dict[int, str]]:
    """Large strings, null where a value is not a text, and what is there instead where that is something other than null."""
    broken = {}
    for i, value in enumerate(values):
        if isinstance(value, str):
            if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
                broken[i] = NOT_UTF8
        elif value is not None:
            broken[i] = ABSENT if value is absent else f"is of type {type(value).__name__}, not a string"
    return pa.array([None if i in broken else value for i, value in enumerate(values)], pa.large_string()), broken


def _json_blocks(path: epath.PathLike, names: Sequence[str], start: int, stop: int) -> Iterator[Block]:
    absent = object()
    with _lines(path) as lines:
        numbered = enumerate(lines)
        chosen = itertools.islice(numbered, start, stop)
        while block := list(itertools.islice(chosen, BLOCK_ROWS)):
            rows = [_json_row(path, number, line) for number, line in block]
            yield _block(block[0][0], names, ([row.get(name, absent) for row in rows] for name in names), absent)


def _json_row(path: epath.PathLike, number: int, line: bytes) -> dict:
    try:
        row = json.loads(line.decode(errors="surrogateescape"))
    except ValueError as error:
        raise RawDataError(f"{path}: row {number} is not JSON ({error}); mend the line or drop it") from error
    if not isinstance(row, dict):
        raise RawDataError(f"{path}: row {number} is not a JSON object; write one object a line")
    return row


def _csv_blocks(path: epath.PathLike, names: Sequence[str], start: int, stop: int) -> Iterator[Block]:
    with _csv_rows(path) as (header, lines):
        places = [header.index(name) for name in names]
        chosen = itertools.islice(enumerate(lines), start, stop)
        while block := list(itertools.islice(chosen, BLOCK_ROWS)):
            for number, cells in block:
                if len(cells) != len(header):
                    raise RawDataError(f"{path}: row {number} has {len(cells)} cells, the header {len(header)}; quote its texts or mend it")
            yield _block(block[0][0], names, ([cells[place] for _, cells in block] for place in places))


def _block(first_row: int, names: Sequence[str], columns: Iterable[list], absent: object = None) -> Block:
    read = {name: _texts(values, absent) for name, values in zip(names, columns, strict=True)}
    return Block(
        first_row, {name: texts for name, (texts, _) in read.items()}, {name: broken for name, (_, broken) in read.items() if broken}
    )


@contextlib.contextmanager
def _lines(path: epath.PathLike) -> Iterator[Iterator[bytes]]:
    """The lines of a file as bytes, decompressed. Arrow's streams, unlike Python's zstd ones, notice a truncated end."""
    compression = {"gz": "gzip", "zst": "zstd"}.get(str(path).rsplit(".", 1)[-1])
    with epath.Path(path).open("rb") as file:
        yield io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, mode="r"), compression), 1 << 20) if compression else file


@contextlib.contextmanager
def _csv_rows(path: epath.PathLike) -> Iterator[tuple[list[str], Iterator[list[str]]]]:
    """Header and rows. A document is often longer than the 131,072 characters that `csv` allows a cell."""
    csv.field_size_limit(1 << 30)
    with epath.Path(path).open("rb") as file, io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="") as text:
        rows = csv.reader(text, strict=True)
        yield next(rows, []), rows
