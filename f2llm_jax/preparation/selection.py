"""What is made of a source's rows: which are taken, which are held out, and what their texts say.

All of it is a function of the source, the recipe and the row alone, so workers need not talk to one another.
"""

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Iterator

import numpy as np

from f2llm_jax.preparation.cleaning import Policy, clean
from f2llm_jax.preparation.raw_files import RawDataError, read_blocks
from f2llm_jax.preparation.sources import Part, Source
from f2llm_jax.text import leading_prompt, query_prompt, strip_instruction

VALIDATION_SHARE = 0.01  # published split: 99/1 a source


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What determines the records of a dataset, sources and tokenizer aside.

    Attributes:
      stage: 1 (instructions stripped from queries) or 2 (kept).
      max_length: tokens a text at most, EOS included.
      seed: of what is random.
      cap: queries a unit at most; 0 for no cap.
      instruct_documents: share of the documents of symmetric sources that get an instruction, where they have none.
      policy: what becomes of malformed rows, see `cleaning`.
    """

    stage: int
    max_length: int
    seed: int
    cap: int
    instruct_documents: float
    policy: Policy


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of one block that are taken, ready for the tokenizer.

    Attributes:
      numbers: int64 `[rows]` in the source.
      queries: as in the raw file, or with the source's instruction.
      languages: "" where unknown.
      documents: int64 `[rows, 1 + n]`, positive then negatives, numbers into `texts`; -1 for none.
      texts: the distinct documents, as in the raw file.
      counters: see `cleaning.CleanRows`.
    """

    numbers: np.ndarray
    queries: list[str]
    languages: list[str]
    documents: np.ndarray
    texts: list[str]
    counters: Counter


def read_rows(source: Source, part: Part, recipe: Recipe, chosen: np.ndarray) -> Iterator[Rows]:
    """The rows of a part that are taken, cleaned, in order.

    Args:
      source: it belongs to.
      part: what to read.
      recipe: to follow.
      chosen: from `choose_rows`.

    Raises:
      RawDataError: the file is damaged, or a row is malformed and the policy says that is an error.
    """
    prompt = query_prompt(source.instruction)
    policy: Policy = "set-aside" if source.released and recipe.policy == "default" else recipe.policy
    for block in read_blocks(part.path, list(part.columns.values()), part.start, part.stop):
        numbers = part.number - part.start + block.first_row + np.arange(len(block.columns[part.columns["query"]]))
        wanted = chosen[numbers]
        if not wanted.any():
            continue
        rows = clean(part.path, block, part.columns, source.negatives, source.kind != "retrieval", policy, wanted)
        queries = [query if leading_prompt(query) else prompt + query for query in rows.queries] if prompt else rows.queries
        yield Rows(numbers[rows.index], queries, rows.languages, rows.documents, rows.texts, rows.counters)


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
class Rules:
    """The rules of one source that need a look at its rows first; `of` takes that look, nearly always at one block.

    Which rows are held out is a function of (seed, source name, query text, passage text): a row keeps its side when rows are
    appended, removed or moved, copies of a row share a side, and both stages hold out the same rows (the query is hashed with
    its instruction). The one exception keeps both sides from being empty where a small source has no row under, or none over,
    the threshold: then its row of smallest hash is held out, or its row of largest hash is trained on, until more rows
    arrive. A source of one row has no validation split.

    Attributes:
      recipe: to follow.
      salt: seed and source name.
      moved: the exceptions, from row number to split name.
      prompt: instruction that documents get, where they get one; "" otherwise.
    """

    recipe: Recipe
    salt: str
    moved: dict[int, str]
    prompt: str

    @classmethod
    def of(cls, source: Source, recipe: Recipe) -> "Rules":
        """Reads as many rows as it takes to see both sides.

        Raises:
          RawDataError: no row is left.
        """
        plain = cls(recipe, f"{recipe.seed}\0{source.name}", {}, "")
        numbers: list[int] = []
        values: list[int] = []
        prompt = ""
        chosen = choose_rows(source, recipe)
        for rows in (rows for part in source.parts for rows in read_rows(source, part, recipe, chosen)):
            if not numbers and rows.queries and recipe.stage == 2 and recipe.instruct_documents and source.symmetric:
                prompt = leading_prompt(rows.queries[0])
            numbers += rows.numbers.tolist()
            values += map(plain.value, rows.queries, (rows.texts[i] for i in rows.documents[:, 0]))
            if len({plain.side(value) for value in values}) == 2:
                return cls(recipe, plain.salt, {}, prompt)
        if not values:
            raise RawDataError(f"{source.parts[0].path}: no row of the source {source.name!r} is left after cleaning; mend or remove it")
        moved = {}
        if len(values) > 1:
            first = plain.side(values[0]) == "train"
            pick = int((np.argmin if first else np.argmax)(np.array(values, np.uint64)))
            moved = {numbers[pick]: "validation" if first else "train"}
        elif plain.side(values[0]) != "train":
            moved = {numbers[0]: "train"}
        return cls(recipe, plain.salt, moved, prompt)

    def split(self, number: int, query: str, passage: str) -> str:
        """The split of a row."""
        return self.moved.get(number) or self.side(self.value(query, passage))

    def value(self, query: str, passage: str) -> int:
        """What the side of a row depends on."""
        return _hash(f"{self.salt}\0{query}\0{passage}")

    @staticmethod
    def side(value: int) -> str:
        return "validation" if value < VALIDATION_SHARE * 2**64 else "train"

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
