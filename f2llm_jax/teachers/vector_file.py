"""Vectors that any software has computed, in a file: parquet with a vector in each row, or `.npy` next to a table of its texts.

`write_texts` writes the texts of a dataset for that software. A vector is found by the text's `id`, which stands for the role and all
that is read, prompt included, so no vector of another text passes for it; without ids by the text itself.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath
from jaxtyping import Float

from f2llm_jax.data import teacher_cache
from f2llm_jax.data.records import Dataset
from f2llm_jax.errors import UserError
from f2llm_jax.inputs import tables
from f2llm_jax.storage.files import is_remote, new_file
from f2llm_jax.storage.vectors import texts_digest
from f2llm_jax.teachers.fill import read_ids, role_of
from f2llm_jax.teachers.texts import Prompts, StoredText, TextDecoder, stored_texts

VECTOR_COLUMNS = ("vector", "embedding")
ROLES = ("query", "document")
WRITE_TEXTS = "write the texts with --write-texts, and give the ids of that file with their vectors"


class VectorFile:
    """A file of vectors by text, as if it were the model that made them."""

    compute = ""

    def __init__(self, file: epath.PathLike, of: epath.PathLike | None, decoder: TextDecoder):
        """Reads ids or texts, and opens the vectors: a local `.npy` is memory-mapped, a parquet file is read.

        Args:
          file: parquet with a column `vector`, and `id` or `text`; or `.npy` `[texts, W]`.
          of: of an `.npy`, the table whose row i belongs to vector i, of any form that is read (parquet, JSON lines, CSV, lines of text).
          decoder: of the dataset.

        Raises:
          UserError: the file has no such columns or shapes, or two vectors for one text.
        """
        self.name, path = str(file), epath.Path(file)
        if not path.exists():
            raise UserError(f"--vectors {file} does not exist; name a parquet or .npy file")
        if path.suffix == ".npy" and of is None:
            raise UserError(f"--vectors {file} is an array alone: name the table of its texts, a row for each vector, with --vectors-of")
        self._vectors = _read_npy(path) if path.suffix == ".npy" else _read_parquet(path)
        self._places = self._index(tables.open_file(file if of is None else of), decoder)
        self.width = self._vectors.shape[1]
        self.digest = self._content_digest()

    def encode(self, texts: list[StoredText]) -> Float[np.ndarray, "S W"]:
        missing = [text for text in texts if text.id not in self._places]
        if missing:
            raise UserError(
                f"{self.name} has no vector for {len(missing)} of {len(texts)} texts, the first is the {missing[0].role} "
                f"{missing[0].read[:80]!r}; {WRITE_TEXTS}"
            )
        return np.asarray(self._vectors[[self._places[text.id] for text in texts]], np.float32)

    def _index(self, table: tables.File, decoder: TextDecoder) -> dict[str, int]:
        """The row of each id."""
        if table.rows != len(self._vectors):
            raise UserError(f"{table.path} has {table.rows} rows for the {len(self._vectors)} vectors of {self.name}; each row needs one")
        names = [name for name in ("id", "text", "role") if name in table.names]
        if not {"id", "text"} & set(names):
            raise UserError(f"{table.path} has the columns {', '.join(table.names)}; name one of them id or text: {WRITE_TEXTS}")
        places: dict[str, int] = {}
        for block in tables.read_blocks(table, names):
            for row, keys in enumerate(
                _keys(table, {name: list(map(_plain, block.cells[name])) for name in names}, decoder), block.first_row
            ):
                for key in keys:
                    before = places.setdefault(key, row)
                    if before != row and not np.array_equal(self._vectors[before], self._vectors[row]):
                        raise UserError(f"{table.path}: rows {before} and {row} have two vectors for one text; {WRITE_TEXTS}")
        return places

    def _content_digest(self) -> str:
        digest = hashlib.sha256("".join(f"{key} {row} " for key, row in self._places.items()).encode())
        for start in range(0, len(self._vectors), 2**14):
            digest.update(np.ascontiguousarray(self._vectors[start : start + 2**14]).data)
        return digest.hexdigest()


def write_texts(dataset: Dataset, file: epath.PathLike, decoder: TextDecoder, prompts: Prompts, max_length: int) -> int:
    """Writes each text of a dataset once, as parquet with the columns `id`, `role` and `text` (prompt included); how many there are."""
    schema, seen = pa.schema([("id", pa.string()), ("role", pa.string()), ("text", pa.large_string())]), set[str]()
    with new_file(file) as opened, pq.ParquetWriter(opened, schema) as writer:
        for shard in teacher_cache.shards(dataset):
            texts = stored_texts(decoder.decode(read_ids(dataset, shard, max_length)), role_of(shard), prompts)
            new = {text.id: text for text in texts if text.id not in seen}
            seen |= new.keys()
            columns = [list(new), [text.role for text in new.values()], [text.read for text in new.values()]]
            writer.write_batch(
                pa.record_batch([pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema)
            )
    return len(seen)


def _keys(table: tables.File, cells: dict[str, list[str]], decoder: TextDecoder) -> Iterator[list[str]]:
    """The ids that each row's vector belongs to."""
    if "id" in cells:
        yield from ([key] for key in cells["id"])
        return
    texts = decoder.as_stored(cells["text"])
    for text, role in zip(texts, cells.get("role", [""] * len(texts)), strict=True):
        if role not in ("", *ROLES):
            raise UserError(f"{table.path} has the role {role!r}; there are query and document")
        yield [texts_digest([one, text]) for one in ([role] if role else ROLES)]


def _plain(cell: object) -> str:
    value = cell.as_py() if isinstance(cell, pa.Scalar) else cell
    return "" if value is None else str(value)


def _read_npy(path: epath.Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            vectors = np.load(file, allow_pickle=False) if is_remote(path) else np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"--vectors {path} is no readable array ({error}); write it again with numpy.save") from error
    if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.floating):
        raise UserError(f"--vectors {path} holds {vectors.dtype} {list(vectors.shape)}; it needs numbers [texts, components]")
    return vectors


def _read_parquet(path: epath.Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            opened = pq.ParquetFile(file)
            found = [name for name in opened.schema_arrow.names if name in VECTOR_COLUMNS]
            if len(found) != 1:
                raise UserError(
                    f"--vectors {path} has the columns {', '.join(opened.schema_arrow.names)}; name the one of the vectors 'vector', "
                    "and no other 'embedding'"
                )
            (name,) = found
            column = opened.read(columns=[name]).column(0).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"--vectors {path} is no readable parquet file ({error}); write it again") from error
    try:
        lengths = set(column.value_lengths().to_pylist()) if not pa.types.is_fixed_size_list(column.type) else {column.type.list_size}
        numbers = column.flatten().to_numpy(zero_copy_only=False)
    except (AttributeError, pa.ArrowException) as error:
        raise UserError(f"--vectors {path}: the column {name!r} is of {column.type}; it needs lists of numbers") from error
    if (
        column.null_count
        or len(lengths) != 1
        or not max(lengths)
        or len(numbers) != len(column) * max(lengths)
        or not np.issubdtype(numbers.dtype, np.floating)
    ):
        raise UserError(f"--vectors {path}: the column {name!r} needs a list of equally many numbers in every row")
    return numbers.reshape(len(column), -1)
