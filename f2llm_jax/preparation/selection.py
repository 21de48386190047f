"""What is made of a source's rows: which are taken, which are held out, and what their texts say.

All of it is a function of the source, the recipe and the row alone, so workers need not talk to one another.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np

from f2llm_jax.errors import UserError
from f2llm_jax.inputs.pairs import read_pairs
from f2llm_jax.preparation.cleaning import CleanRows, Policy, clean
from f2llm_jax.preparation.sources import Part, Source
from f2llm_jax.text import leading_prompt, strip_instruction

SplitBy = Literal["row", "query"]
NEED_NEGATIVES = ("clustering", "classification")  # kinds whose loss is 0 without
VALIDATION_SHARE = 0.01  # published split: 99/1 a source


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What determines the records of a dataset, sources and tokenizer aside."""

    stage: int  # 1 (instructions stripped from queries) or 2 (kept)
    max_length: int  # tokens of a text at most, EOS included
    seed: int  # of what is random
    cap: int  # queries of a unit at most; 0 for no cap
    instruct_documents: float  # share of symmetric sources' documents that get an instruction, where they have none; not of the release
    policy: Policy  # what becomes of malformed rows, see `cleaning`
    repeated_negatives: bool = False  # whether negatives that repeat or are the positive stay, as published
    validation: float = VALIDATION_SHARE  # share of the rows that are held out
    split_by: SplitBy = "row"

    def __post_init__(self) -> None:
        within = {
            "stage": (self.stage in (1, 2), "1 or 2"),
            "max_length": (self.max_length >= 1, "at least 1"),
            "cap": (self.cap >= 0, "at least 0, which is all rows"),
            "instruct_documents": (0 <= self.instruct_documents <= 1, "between 0 and 1"),
            "validation": (0 <= self.validation <= 1, "between 0 and 1"),
            "split_by": (self.split_by in get_args(SplitBy), " or ".join(get_args(SplitBy))),
        }
        for name, (right, allowed) in within.items():
            if not right:
                raise UserError(f"{name}={getattr(self, name)!r} must be {allowed}")


def read_rows(source: Source, part: Part, recipe: Recipe, chosen: np.ndarray) -> Iterator[tuple[np.ndarray, CleanRows]]:
    """The rows of a part that are taken, cleaned, in order, with their numbers in the source, int64 `[B]`.

    Args:
      source: it belongs to.
      part: what to read.
      recipe: to follow.
      chosen: from `choose_rows`.

    Raises:
      UserError: the file is damaged, or a row is malformed and the policy says that is an error.
    """
    policy: Policy = "skip" if source.released and recipe.policy == "default" else recipe.policy
    for block in read_pairs(part.pairs, part.start, part.stop, source.instruction):
        numbers = part.number + block.first + np.arange(len(block.rows))
        wanted = np.ones(len(numbers), bool) if part.split else chosen[numbers]
        if wanted.any():
            rows = clean(
                part.pairs.file.path,
                block,
                source.negatives,
                source.kind in NEED_NEGATIVES,
                policy,
                wanted,
                recipe.repeated_negatives,
                source.kind == "graded",
            )
            yield numbers[rows.index], rows


def choose_rows(source: Source, recipe: Recipe) -> np.ndarray:
    """bool `[source.rows]`: its part of a random choice of `recipe.cap` rows over all sources of its unit, or all if they are no more."""
    if not 0 < recipe.cap < source.unit_rows:
        return np.ones(source.rows, bool)
    chosen = _choose(f"{recipe.seed}\0cap\0{source.unit}", source.unit_rows, recipe.cap)
    return chosen[source.unit_first : source.unit_first + source.rows]


@functools.lru_cache(maxsize=1)  # the sources of a unit come one after the other
def _choose(salt: str, rows: int, cap: int) -> np.ndarray:
    chosen = np.zeros(rows, bool)
    chosen[np.random.default_rng(_hash(salt)).permutation(rows)[:cap]] = True
    return chosen


@dataclasses.dataclass(frozen=True)
class SplitRules:
    """The rules of one source that need a look at its rows first; `of` takes that look, nearly always at one block.

    Which rows are held out is a function of (seed, source name, query text, passage text), or without the passage where the split is
    by query: a row keeps its side when rows are appended, removed or moved, copies of a row share a side, and both stages hold out the
    same rows (the query is hashed with its instruction). The one exception keeps both sides from being empty where a small source has
    no row under, or none over, the threshold: then what has the smallest hash is held out, or what has the largest is trained on, until
    more rows arrive. A source whose rows are all alike has no validation split.
    """

    recipe: Recipe
    salt: str  # seed and source name
    share: float  # of the rows that are held out; 0 where a file says which
    moved: dict[int, str]  # the exceptions, from hash to split
    prompt: str  # instruction that documents get, where they get one; "" otherwise

    @classmethod
    def of(cls, source: Source, recipe: Recipe) -> "SplitRules":
        """Reads as many rows as it takes to see both sides.

        Raises:
          UserError: no row is left.
        """
        share = 0.0 if source.held_out else recipe.validation
        plain = cls(recipe, f"{recipe.seed}\0{source.name}", share, {}, "")
        values: list[int] = []
        prompt = ""
        chosen = choose_rows(source, recipe)
        parts = [part for part in source.parts if not part.split]
        for _, rows in (found for part in parts for found in read_rows(source, part, recipe, chosen)):
            if not values and rows.queries and recipe.stage == 2 and recipe.instruct_documents and source.symmetric and not source.released:
                prompt = leading_prompt(rows.queries[0])
            values += map(plain.value, rows.queries, (rows.texts[i] for i in rows.documents[:, 0]))
            if len({plain.side(value) for value in values}) == 2 or (values and not share):
                return dataclasses.replace(plain, prompt=prompt)
        if not values:
            raise UserError(f"{source.files[0]}: no row of the source {source.name!r} is left after cleaning; correct or remove it")
        if len(set(values)) == 1:
            moved = {values[0]: "train"}
        else:
            moved = {min(values): "validation"} if plain.side(values[0]) == "train" else {max(values): "train"}
        return dataclasses.replace(plain, moved=moved, prompt=prompt)

    def split(self, value: int) -> str:
        """The split of a row, from its `value`."""
        return self.moved.get(value) or self.side(value)

    def value(self, query: str, passage: str) -> int:
        """What the side of a row depends on."""
        return self.query_value(query) if self.recipe.split_by == "query" else self.row_value(query, passage)

    def row_value(self, query: str, passage: str) -> int:
        return _hash(f"{self.salt}\0{query}\0{passage}")

    def query_value(self, query: str) -> int:
        return _hash(f"{self.salt}\0{query}")

    def side(self, value: int) -> str:
        return "validation" if value < self.share * 2**64 else "train"

    def query(self, text: str) -> str:
        """A query as it is trained on (paper, section 3.2: stage 1 is without instructions)."""
        return strip_instruction(text) if self.recipe.stage == 1 else text

    def document(self, text: str) -> str:
        """A document as it is trained on. Copies of a text get an instruction or do not together, so it is still stored once."""
        if not self.prompt or leading_prompt(text):
            return text
        return self.prompt + text if _hash(f"{self.salt}\0instruct\0{text}") < self.recipe.instruct_documents * 2**64 else text


def document_key(text: str) -> int:
    """The key of a document in its source's corpus: the upper 63 bits of the 8-byte BLAKE2b of its UTF-8 text.

    Among 100 million documents of one source two share a key with a chance of 1 in 2,000; they would be stored as one.
    """
    return _hash(text) >> 1


def _hash(text: str) -> int:
    """64-bit BLAKE2b, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
