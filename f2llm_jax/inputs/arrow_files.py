"""Parquet files, and Arrow files as `datasets.save_to_disk` writes them; the `datasets` library is not needed."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from f2llm_jax.errors import UserError
from f2llm_jax.inputs.cells import Cells, is_list, is_text
from f2llm_jax.storage.files import is_remote

# A row may carry 65 documents of thousands of characters, so few rows a block keep memory small; texts enough for a tokenizer.
BLOCK_ROWS = 1_000
# A released file may be one row group of gigabytes: its columns are read through buffers, not whole.
PARQUET_BUFFER = 1 << 20


def open_file(path: epath.PathLike, suffix: str) -> dict[str, Any]:
    """Fields of a `tables.File`.

    Raises:
      UserError: two columns have one name.
    """
    if suffix == ".parquet":
        with epath.Path(path).open("rb") as file:
            parquet = pq.ParquetFile(file)
            schema, metadata = parquet.schema_arrow, parquet.metadata
            rows, groups = metadata.num_rows, tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    else:
        with pa.memory_map(str(path)) if not is_remote(path) else epath.Path(path).open("rb") as file:
            batches = _batches(file)
            schema, rows = batches.schema, sum(len(batch) for batch in batches)
        groups = (rows,)
    if twice := [name for name, count in Counter(schema.names).items() if count > 1]:
        raise UserError(f"{path} has {schema.names.count(twice[0])} columns of the name {twice[0]!r}; rename or drop one")
    return {
        "names": tuple(schema.names),
        "rows": rows,
        "groups": groups,
        "lists": tuple(field.name for field in schema if _is_texts(field.type)),
        "types": {field.name: str(field.type) for field in schema if not (is_text(field.type) or _is_texts(field.type))},
        "classes": _classes(schema),
    }


def read_cells(path: str, suffix: str, names: Sequence[str], start: int, stop: int) -> Iterator[tuple[int, int, dict[str, Cells]]]:
    """First row, number of rows and cells of each block of `start <= row < stop`."""
    for row, batch in (_parquet_batches if suffix == ".parquet" else _arrow_batches)(path, names, start, stop):
        first, last = max(row, start), min(row + len(batch), stop)
        if first < last:
            kept = batch.slice(first - row, last - first)
            yield first, len(kept), {name: kept.column(name) if name in kept.schema.names else pa.nulls(len(kept)) for name in names}


def _parquet_batches(path: str, names: Sequence[str], start: int, stop: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    with epath.Path(path).open("rb") as file:
        parquet = pq.ParquetFile(file, buffer_size=PARQUET_BUFFER)
        ends = list(itertools.accumulate(parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)))
        begins = [0, *ends[:-1]]
        groups = [i for i, (begin, end) in enumerate(zip(begins, ends, strict=True)) if begin < stop and start < end]
        row = begins[groups[0]] if groups else stop
        # Arrow joins no dictionaries within lists, and each row group has one of its own.
        kinds = [field.type for field in parquet.schema_arrow if field.name in names and is_list(field.type)]
        alone = any(pa.types.is_dictionary(kind.value_type) for kind in kinds)
        for chosen in [[group] for group in groups] if alone else [groups]:
            for batch in parquet.iter_batches(max(1, min(BLOCK_ROWS, stop - row)), row_groups=chosen, columns=list(names)):
                yield row, batch
                row += len(batch)


def _arrow_batches(path: str, names: Sequence[str], start: int, stop: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    with pa.memory_map(path) if not is_remote(path) else epath.Path(path).open("rb") as file:
        row = 0
        for batch in _batches(file):
            for at in range(0, len(batch), BLOCK_ROWS):
                if row + at >= stop:
                    return
                if row + at + BLOCK_ROWS > start:
                    yield row + at, batch.slice(at, BLOCK_ROWS)
            row += len(batch)


def _batches(file: Any) -> pa.RecordBatchReader:
    """The batches of either form of Arrow's IPC files."""
    magic = file.read(6)
    file.seek(0)
    if magic != b"ARROW1":
        return pa.ipc.open_stream(file)
    reader = pa.ipc.open_file(file)
    return pa.RecordBatchReader.from_batches(reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches)))


def _is_texts(kind: pa.DataType) -> bool:
    """Whether cells are lists of texts, or of objects that have one."""
    if not is_list(kind):
        return False
    item = kind.value_type
    return is_text(item) or (pa.types.is_struct(item) and item.get_field_index("text") >= 0)


def _classes(schema: pa.Schema) -> dict[str, list[str]]:
    """Names of labels, from what the `datasets` library writes into a schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature["names"] for name, feature in features.items() if feature.get("_type") == "ClassLabel"}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
