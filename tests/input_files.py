"""Small files of a user's, and what the readers of pairs make of them."""

import json

import pytest

from f2llm_jax.errors import UserError
from f2llm_jax.inputs import pairs
from f2llm_jax.inputs.columns import ColumnChoice
from f2llm_jax.mining.inputs import read_pairs


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refused(path, *parts, choice=None):
    """Every command refuses the file, with these parts in the message."""
    for read in (lambda: pairs.open_pairs(path, choice or ColumnChoice()), lambda: read_pairs(path, None, choice or ColumnChoice())):
        with pytest.raises(UserError) as error:
            read()
        for part in (path.name, *parts):
            assert part in str(error.value)


def rows_of(path, **given):
    """Query, positive and negatives of each row, as `mine` reads them."""
    found = read_pairs(path, None, ColumnChoice(given))
    return [*zip(found.queries, found.passages, found.given, strict=True)]
