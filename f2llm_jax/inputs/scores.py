"""Columns of scores: how well a row's positive and its negatives answer the query, as a reranker or a person says.

    scores        a number, of the positive; or a list, of the positive and then of the negatives, in their order
    pos_scores    a number, or a list where the positives are one
    neg_scores    a list, of the negatives

A list is a list, or a text of JSON that spells one; null in it, and an empty cell, is no score.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

from f2llm_jax.errors import UserError
from f2llm_jax.inputs import cells
from f2llm_jax.inputs.cells import ABSENT, Cells, Texts

ROLES = {"scores": ("scores", "score"), "pos_scores": ("pos_scores",), "neg_scores": ("neg_scores",)}


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of B pairs."""

    values: Float[np.ndarray, "B 1+N"]  # float32, of the positive and of the negatives; NaN for none
    broken: dict[int, str]  # by pair, why its cells are no scores; its values are NaN


def check_roles(path: str, roles: Mapping[str, tuple[str, ...]], expands: bool) -> None:
    """Raises a UserError for columns of scores that contradict each other, or whose positives cannot be told apart."""
    found = [role for role in ROLES if role in roles]
    if "scores" in found and len(found) > 1:
        name, other = roles["scores"][0], roles[found[1]][0]
        raise UserError(f"{path}: the columns {name!r} and {other!r} both hold scores; leave one out with --ignore-columns {name}")
    if "scores" in found and expands:
        name = roles["scores"][0]
        raise UserError(
            f"{path}: column {name!r} is one list and the positives are lists; give scores as pos_scores and neg_scores, "
            f"or leave it out with --ignore-columns {name}"
        )


def read_scores(columns: Mapping[str, Cells], positives: Int[np.ndarray, " R"], negatives: Int[np.ndarray, " R"], most: int) -> Scores:
    """The scores of R rows of a file, as pairs of a query and a positive.

    Args:
      columns: by role.
      positives: of each row, which becomes so many pairs, at least one.
      negatives: of each row, places before its last one.
      most: N, negatives that a row has at most.
    """
    count = np.maximum(positives, 1)
    of = np.repeat(np.arange(len(count)), count)
    values = np.full((len(of), 1 + most), np.nan, np.float32)
    first = np.cumsum(count) - count
    broken: dict[int, str] = {}
    for role, column in columns.items():
        lists = cells.number_lists(column)
        own = 1 if role == "scores" else 0
        for row, found in enumerate(lists.values):
            pairs = slice(int(first[row]), int(first[row] + count[row]))
            why = lists.broken.get(row) or _mismatch(role, found, int(count[row]), int(negatives[row]), most)
            if why:
                broken |= dict.fromkeys(range(pairs.start, pairs.stop), why)
            elif role == "pos_scores" and found:
                values[pairs, 0] = found
            elif found:
                values[pairs, 1 - own : 1 - own + len(found)] = found
    values[sorted(broken)] = np.nan
    return Scores(values, broken)


def places(texts: Mapping[str, Texts], negatives: int) -> Int[np.ndarray, " R"]:
    """Of each row, how many of the columns `negative_1` to `negative_N` there are up to the last that it has."""
    found = np.zeros(len(texts["query"].values), np.int64)
    for number in range(1, negatives + 1):
        there = np.ones(len(found), bool)
        there[[row for row, why in texts[f"negative_{number}"].broken.items() if why == ABSENT]] = False
        found[there] = number
    return found


def _mismatch(role: str, found: list[float], positives: int, negatives: int, most: int) -> str:
    """Why a row's scores are not one for each document; behind the last may be nulls, up to the negatives of other rows."""
    if not found:
        return ""
    if role == "pos_scores":
        return "" if len(found) == positives else f"has {len(found)} scores for {positives} positives"
    own = role == "scores"
    wanted = own + negatives
    if wanted <= len(found) <= own + most and all(map(math.isnan, found[wanted:])):
        return ""
    return f"has {len(found)} scores for {'1 positive and ' * own}{negatives} negatives"
