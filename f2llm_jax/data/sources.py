"""Raw parquet files, one a source: what they are, whether they can be used, and their rows in chunks.

The layout is that of the released F2LLM data (dataset card of codefuse-ai/F2LLM): columns `query` (instruction included),
`passage`, `negative_1` to `negative_n` without a gap, and optionally `lang`. Other columns are ignored.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from etils import epath

from f2llm_jax.text import strip_instruction

KINDS = ("retrieval", "clustering", "classification")
TASKS_FILE = "tasks.json"
LANGUAGE = "lang"
CHUNK_ROWS = 2_000  # a released file may be one row group of gigabytes, so rows are streamed inside row groups


class RawDataError(ValueError):
    """Raw data that cannot be used; the message, one line a problem, names file, row, field and remedy."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One parquet file whose schema has been checked.

    Attributes:
      name: file name without `.parquet`; the source's name everywhere.
      kind: one of `KINDS`.
      path: the file, local or `gs://`.
      rows: number of rows in it, at least 1.
      negatives: n, the number of `negative_` columns, at least 1.
    """

    name: str
    kind: str
    path: str
    rows: int
    negatives: int

    @property
    def document_columns(self) -> list[str]:
        """`passage`, `negative_1`, ..., `negative_n`."""
        return ["passage", *(f"negative_{i}" for i in range(1, self.negatives + 1))]


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Up to `CHUNK_ROWS` consecutive rows: `first_row`, 0-based in the file, and their checked columns as large strings."""

    first_row: int
    columns: dict[str, pa.Array]


def find_sources(raw: epath.PathLike, tasks: epath.PathLike | None = None) -> list[Source]:
    """The sources of a folder of parquet files, sorted by name.

    The kind of a source is what the tasks file (JSON, `{"name": "kind"}`) says. A source it does not name, or every source
    where there is no such file, gets it from its columns: one negative means classification (the opposite label), more
    mean retrieval. Clustering looks like retrieval in its columns, so only a tasks file can tell it.

    Args:
      raw: folder that holds `*.parquet`.
      tasks: the tasks file; default `raw/tasks.json` if it exists.

    Raises:
      RawDataError: no parquet file, an unusable tasks file, or one or more unusable schemas, all of them in one message.
    """
    raw = epath.Path(raw)
    files = sorted(raw.glob("*.parquet")) if raw.exists() else []
    if not files:
        raise RawDataError(f"{raw} holds no *.parquet file; point --raw at a folder with one parquet file a source")
    if tasks is None and (raw / TASKS_FILE).exists():
        tasks = raw / TASKS_FILE
    kinds = _read_tasks(epath.Path(tasks), {file.stem for file in files}) if tasks is not None else {}
    sources, problems = [], []
    for file in files:
        try:
            sources.append(_open_source(file, kinds.get(file.stem)))
        except RawDataError as error:
            problems.append(str(error))
    if problems:
        raise RawDataError("\n".join(problems))
    return sources


def read_chunks(source: Source, columns: Sequence[str] | None = None) -> Iterator[Chunk]:
    """The rows of a source in order, checked.

    Args:
      source: where to read.
      columns: text columns to read; default all of them, and `lang`, which is then always present ("" where unknown).

    Raises:
      RawDataError: a null, a text that is empty (for a query: once its instruction is gone), or bytes that do not decode.
    """
    texts = ["query", *source.document_columns] if columns is None else list(columns)
    first_row = 0
    with epath.Path(source.path).open("rb") as file:
        try:
            parquet = pq.ParquetFile(file)
            present = parquet.schema_arrow.names
            wanted = texts + [LANGUAGE] * (columns is None and LANGUAGE in present)
            for batch in parquet.iter_batches(CHUNK_ROWS, columns=wanted):
                read = {name: batch.column(name).cast(pa.large_string()) for name in wanted}
                for name in texts:
                    _check_texts(source, name, read[name], first_row)
                if columns is None:
                    read[LANGUAGE] = read[LANGUAGE].fill_null("") if LANGUAGE in present else pa.array([""] * len(batch), pa.large_string())
                yield Chunk(first_row, read)
                first_row += len(batch)
        except (pa.ArrowException, OSError) as error:
            message = " ".join(str(error).split())
            raise RawDataError(
                f"{source.path}: rows from {first_row} on cannot be read ({message}); the file is damaged, fetch or write it again"
            ) from error


def _check_texts(source: Source, name: str, texts: pa.Array, first_row: int) -> None:
    """Raises a RawDataError for the first of `texts` that is null or empty, if any."""
    if texts.null_count:
        row = first_row + pc.index(texts.is_null(), True).as_py()
        raise RawDataError(f"{source.path}: row {row}, column {name!r} is null; give it a text or drop the row")
    empty = pc.index(pc.equal(pc.utf8_trim_whitespace(texts), ""), True).as_py()
    if empty < 0 and name == "query":
        empty = next((i for i, text in enumerate(texts.to_pylist()) if not strip_instruction(text).strip()), -1)
    if empty >= 0:
        raise RawDataError(f"{source.path}: row {first_row + empty}, column {name!r} is empty; give it a text or drop the row")


def _open_source(file: epath.Path, kind: str | None) -> Source:
    """Checks the schema of one file; a RawDataError names everything that is wrong with it."""
    try:
        with file.open("rb") as handle:
            metadata = pq.ParquetFile(handle)
            schema, rows = metadata.schema_arrow, metadata.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        message = " ".join(str(error).split())
        raise RawDataError(f"{file}: not a readable parquet file ({message}); it may be truncated, fetch or write it again") from error
    numbers = {int(name[9:]) for name in schema.names if name.startswith("negative_") and name[9:].isdecimal()}
    negatives = max(numbers, default=1)
    required = ["query", "passage", *(f"negative_{i}" for i in range(1, negatives + 1))]
    problems = [
        f"{file}: column {name!r} is missing; add it or rename the column that holds it" for name in required if name not in schema.names
    ]
    for name in (*required, LANGUAGE):
        if name in schema.names and not _is_text(schema.field(name).type):
            problems.append(f"{file}: column {name!r} is {schema.field(name).type}, not string; cast it to string")
    if not rows:
        problems.append(f"{file}: no rows; fill the file or remove it")
    if problems:
        raise RawDataError("\n".join(problems))
    return Source(file.stem, kind or ("classification" if negatives == 1 else "retrieval"), str(file), rows, negatives)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _read_tasks(file: epath.Path, names: set[str]) -> dict[str, str]:
    """The checked contents of a tasks file; `names` are the sources that exist."""
    try:
        kinds = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise RawDataError(f'{file}: not a readable JSON file ({error}); write {{"source": "kind"}} there') from error
    if not isinstance(kinds, dict):
        raise RawDataError(f'{file}: not a JSON object; write {{"source": "kind"}} there')
    problems = [
        f"{file}: names {name!r}, but there is no {name}.parquet; remove the line or add the file" for name in kinds if name not in names
    ]
    problems += [
        f"{file}: {name!r} has the unknown kind {kind!r}; choose one of {', '.join(KINDS)}"
        for name, kind in kinds.items()
        if kind not in KINDS
    ]
    if problems:
        raise RawDataError("\n".join(problems))
    return kinds
