"""Rows that a caller of the Python API has in memory, as a file that the one reader of files reads."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath

from f2llm_jax.errors import UserError
from f2llm_jax.storage.files import write_bytes


def write_rows(rows: Iterable[Mapping[str, Any]], folder: epath.PathLike) -> str:
    """The path of `FOLDER/rows.jsonl`, written unless it is there with this content.

    Raises:
      UserError: `rows` is one row or a table, a row is no dict, or a value is neither a text nor a number nor a list of them.
    """
    if isinstance(rows, Mapping) or getattr(rows, "ndim", 1) != 1:
        raise UserError(f"data is a {type(rows).__name__}; give a list of rows (of a pandas table: table.to_dict('records'))")
    lines = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise UserError(f'data[{number}] is {row!r}; a row is a dict, such as {{"query": ..., "passage": ...}}')
        lines.append(json.dumps(dict(row), ensure_ascii=False, default=_plain) + "\n")
    content = "".join(lines).encode(errors="surrogatepass")  # the reader of the file names the row
    file = epath.Path(folder) / "rows.jsonl"
    if not file.exists() or file.read_bytes() != content:
        write_bytes(file, content)
    return str(file)


def _plain(value: object) -> object:
    """What JSON does not know: arrays and numbers of NumPy."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise UserError(f"data has the value {value!r} ({type(value).__name__}); rows hold texts, numbers and lists of them")
