r"""JSON lines, CSV, TSV and lines of text, compressed or not.

One rule of lines for all: UTF-8, a byte-order mark at the start is no text, only line feeds end a line, and `\r\n` is one end. Blank lines
at the end of JSON lines, CSV and TSV are none; in lines of text every line is a text.
"""

import contextlib
import csv
import io
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import IO, Any

import pyarrow as pa
from etils import epath

from f2llm_jax.errors import UserError
from f2llm_jax.inputs.arrow_files import BLOCK_ROWS
from f2llm_jax.inputs.cells import MISSING, Cells, Number

TEXT = "text"  # the column of lines of text
BOM = b"\xef\xbb\xbf"
OTHER_BOMS = {b"\xff\xfe\0\0": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
BINARY = {b"PAR1\x15": "parquet", b"ARROW1\0\0": "Arrow", b"PK\3\4": "zip (or Excel)", b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
DELIMITERS = {"csv": ",", "tsv": "\t"}
OTHER_DELIMITERS = ";,\t|"
# A carriage return that is no end of a line: `csv` would take it for one, so that it sees a character that UTF-8 cannot hold instead.
RETURN, _LONE_RETURN = "\udc0d", re.compile(r"\r(?!\n)")


def open_file(path: epath.PathLike, suffix: str) -> dict[str, Any]:
    """Fields of a `tables.File`.

    Raises:
      UserError: a row is not of the form, or two columns have one name.
    """
    names: dict[str, None] = {}
    lists: dict[str, None] = {}
    rows = 0
    with _rows(path, suffix, strict=True) as (header, found):
        names |= dict.fromkeys(header)
        if _form(suffix) in ("jsonl", "ndjson", "json"):
            for row in found:
                rows += 1
                if not row.keys() <= names.keys():
                    names |= dict.fromkeys(row)
                for name, value in row.items():
                    if isinstance(value, list):
                        lists[name] = None
        else:
            rows = sum(1 for _ in found)
    return {"names": tuple(names), "rows": rows, "groups": (rows,), "lists": tuple(lists)}


def read_cells(path: str, suffix: str, names: Sequence[str], start: int, stop: int) -> Iterator[tuple[int, int, dict[str, Cells]]]:
    """First row, number of rows and cells of each block of `start <= row < stop`."""
    with _rows(path, suffix) as (header, found):
        chosen, first = itertools.islice(found, start, stop), start
        while block := list(itertools.islice(chosen, BLOCK_ROWS)):
            cells: dict[str, Cells]
            if header:
                places = {name: header.index(name) for name in names if name in header}
                cells = {name: _strings([row[places[name]] for row in block]) if name in places else pa.nulls(len(block)) for name in names}
            else:
                cells = {name: [row.get(name, MISSING) for row in block] for name in names}
            yield first, len(block), cells
            first += len(block)


def _strings(values: list[str]) -> Cells:
    """As Arrow has them, so that a column of texts is known as such; as they are where one is not valid UTF-8."""
    try:
        return pa.array(values, pa.large_string())
    except UnicodeEncodeError:
        return values


@contextlib.contextmanager
def _rows(path: epath.PathLike, suffix: str, strict: bool = False) -> Iterator[tuple[list[str], Iterator[Any]]]:
    """The header and the rows: lists of cells under a header, or objects without one; `strict` looks for keys that repeat."""
    form = _form(suffix)
    with _opened(path, suffix) as file:
        if form in DELIMITERS:
            yield _csv(path, file, DELIMITERS[form])
        elif form == "txt":
            yield [TEXT], ([line.decode(errors="surrogateescape")] for line in _lines(file))
        else:
            yield [], _json(path, file, strict)


def _form(suffix: str) -> str:
    return suffix.split(".")[1]


@contextlib.contextmanager
def _opened(path: epath.PathLike, suffix: str) -> Iterator[IO[bytes]]:
    """The file as bytes, decompressed, behind its byte-order mark. Arrow's streams, unlike Python's of zstd, notice a truncated end."""
    compression = {"gz": "gzip", "zst": "zstd"}.get(suffix.rsplit(".", 1)[-1])
    with epath.Path(path).open("rb") as raw:
        stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), compression) if compression else raw
        file = io.BufferedReader(stream, 1 << 20)
        start = file.peek(8)[:8]
        if coding := next((name for mark, name in OTHER_BOMS.items() if start.startswith(mark)), None):
            raise UserError(f"{path} is {coding} and not UTF-8; convert it with `iconv -f {coding} -t UTF-8`")
        if form := next((name for mark, name in BINARY.items() if start.startswith(mark)), None):
            raise UserError(f"{path} is a {form} file by its first bytes and no text; give it the suffix of its form, or write it as text")
        file.read(len(BOM) if start.startswith(BOM) else 0)
        yield file


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    for line in file:  # iteration splits at line feeds alone
        yield line.removesuffix(b"\n").removesuffix(b"\r") if line.endswith(b"\n") else line


def _csv(path: epath.PathLike, file: IO[bytes], delimiter: str) -> tuple[list[str], Iterator[list[str]]]:
    csv.field_size_limit(1 << 30)  # a document is often longer than the 131,072 characters that `csv` allows a cell
    decoded = (_LONE_RETURN.sub(RETURN, line.decode(errors="surrogateescape")) for line in file)
    reader = csv.reader(decoded, delimiter=delimiter, strict=True)
    header = next(reader, [])
    _check_header(path, header, delimiter)
    if twice := [name for name in header if header.count(name) > 1]:
        raise UserError(
            f"{path} has {header.count(twice[0])} columns of the name {twice[0]!r}; rename or drop one, or write a header before the rows"
        )
    return header, _full_rows(path, reader, header, delimiter)


def _check_header(path: epath.PathLike, header: list[str], delimiter: str) -> None:
    """Raises a UserError for a header that is not one because lines or cells end otherwise here."""
    first = header[0] if header else ""
    if any(RETURN in name for name in header):
        raise UserError(f"{path} ends its lines in carriage returns alone; convert it with `tr '\\r' '\\n'`")
    other = next((mark for mark in OTHER_DELIMITERS if len(header) == 1 and mark != delimiter and mark in first), None)
    if other or first.startswith("sep="):
        raise UserError(
            f"{path} begins with {','.join(header)!r}: its cells are to have {delimiter!r} between them and no line of Excel's before "
            "the header; write it so, or as JSON lines"
        )


def _full_rows(path: epath.PathLike, reader: Iterator[list[str]], header: list[str], delimiter: str) -> Iterator[list[str]]:
    """Rows as wide as the header; one that repeats it comes of joining files, and of TSV a quote that was not meant as one is refused."""
    blank, width = None, len(header)
    for number, cells in enumerate(reader):
        if not cells:
            blank = number if blank is None else blank
            continue
        if blank is not None or len(cells) != width:
            wrong, found = (number, len(cells)) if blank is None else (blank, 0)
            raise UserError(f"{path}: row {wrong} has {found} cells, the header {width}; quote texts with delimiters or line ends in them")
        if cells == header:
            raise UserError(f"{path}: row {number} repeats the header, as in files that were joined; drop the row")
        if delimiter == "\t" and any("\t" in cell and "\n" in cell for cell in cells):
            raise UserError(
                f"{path}: row {number} has line ends and tabs within one pair of quotes: a quote that is text may merge rows; "
                'write such a quote as """", or the file as JSON lines'
            )
        yield [cell.replace(RETURN, "\r") for cell in cells] if any(RETURN in cell for cell in cells) else cells


def _json(path: epath.PathLike, file: Any, strict: bool) -> Iterator[dict[str, Any]]:
    decoder = json.JSONDecoder(parse_float=Number, parse_int=Number, object_pairs_hook=_once if strict else None)
    blank = None
    for number, line in enumerate(_json_rows(path, file, decoder)):
        if isinstance(line, bytes) and not line.strip():
            blank = number if blank is None else blank
            continue
        if blank is not None:
            raise UserError(f"{path}: row {blank} is a blank line; drop it")
        try:
            row = decoder.decode(line.decode(errors="surrogateescape")) if isinstance(line, bytes) else line
        except _RepeatedKey as error:
            raise UserError(f"{path}: row {number} has the key {error} twice; drop one of the two") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: row {number} is not JSON ({error}); correct the line or drop it") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}: row {number} is not a JSON object; write one object a line")
        yield row


def _json_rows(path: epath.PathLike, file: Any, decoder: json.JSONDecoder) -> Iterator[Any]:
    """Lines, or the items of a file that is one list."""
    if not file.peek(1 << 12).lstrip().startswith(b"["):
        yield from _lines(file)
        return
    try:
        yield from decoder.decode(file.read().decode(errors="surrogateescape"))
    except _RepeatedKey as error:
        raise UserError(f"{path} has an object with the key {error} twice; drop one of the two") from error
    except ValueError as error:
        raise UserError(f"{path}: row 0 is not a JSON object, and the file is no JSON list ({error}); write one object a line") from error


class _RepeatedKey(Exception):
    """The key that a JSON object has twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKey(repr(next(name for name in names if names.count(name) > 1)))
    return row
