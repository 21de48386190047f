"""Sources and the documents they search in, every text once and by number."""

import dataclasses
import unicodedata
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from f2llm_jax.mining.inputs import SourcePairs, distinct
from f2llm_jax.text import strip_instruction


@dataclasses.dataclass(frozen=True)
class PoolRows:
    """The R rows of one source, by numbers of texts."""

    name: str
    kind: str
    query: Int[np.ndarray, " R"]
    positive: Int[np.ndarray, " R"]  # a document
    languages: list[str]
    given: Int[np.ndarray, "R _"]  # documents that are known negatives, -1 for none


@dataclasses.dataclass(frozen=True)
class Pool:
    """Documents, and the queries that search in them."""

    # Distinct: the corpus in its order, then what only rows name. Equal texts are one document whatever their ids, so whatever excludes
    # a document excludes its copies.
    documents: pa.LargeStringArray
    queries: pa.LargeStringArray  # distinct
    sources: list[PoolRows]
    positives: list[Int[np.ndarray, " _"]]  # by query: its known positives over all sources, in order of appearance
    excluded: list[Int[np.ndarray, " _"]]  # by query: these, its given negatives, and what says the same (see `_same_texts`)


def make_pool(sources: Sequence[SourcePairs], corpus: Sequence[str]) -> Pool:
    """Numbers the texts of sources that search in one corpus; rows of one query share their positives, in all sources."""
    given = [[negative for negatives in source.given for negative in negatives] for source in sources]
    passages = [passage for source in sources for passage in source.passages]
    documents, number = distinct([*corpus, *passages, *(text for texts in given for text in texts)])
    queries, query_number = distinct([query for source in sources for query in source.queries])
    rows, at, at_given = [], 0, len(corpus) + len(passages)
    for source in sources:
        size, counts = len(source.queries), np.array([len(negatives) for negatives in source.given] or [0] * len(source.queries))
        matrix = np.full((size, max(counts, default=0)), -1, np.int64)
        matrix[np.arange(matrix.shape[1]) < counts[:, None]] = number[at_given : at_given + counts.sum()]
        positive = number[len(corpus) + at : len(corpus) + at + size]
        rows.append(PoolRows(source.name, source.kind, query_number[at : at + size], positive, source.languages, matrix))
        at, at_given = at + size, at_given + int(counts.sum())
    query = np.concatenate([source.query for source in rows])
    positive = np.concatenate([source.positive for source in rows])
    same_query, same = _same_texts(queries.to_pylist(), documents.to_pylist(), query, positive)
    known = np.append(query, same_query) * len(documents) + np.append(positive, same)
    for source in rows:  # a given negative that is a positive is none
        source.given[np.isin(source.query[:, None] * len(documents) + source.given, known)] = -1
    negative_query = np.concatenate([np.repeat(source.query, source.given.shape[1]) for source in rows])
    negative = np.concatenate([source.given.ravel() for source in rows])
    there = negative >= 0
    excluded = _by_query(
        np.concatenate([query, negative_query[there], same_query]), np.concatenate([positive, negative[there], same]), len(queries)
    )
    return Pool(documents, queries, rows, _by_query(query, positive, len(queries)), excluded)


def _same_texts(
    queries: list[str], documents: list[str], query: Int[np.ndarray, " R"], positive: Int[np.ndarray, " R"]
) -> tuple[np.ndarray, np.ndarray]:
    """Documents that say what a query says, as pairs of a query and a document besides those of the rows.

    They are the query's own text, what is paired with that text under any instruction, what is paired with one of its positives (the
    paraphrases of a paraphrase, where rows go both ways), and every copy of these but for instruction, outer spaces and Unicode form.
    """
    of_query, of_document = [_bare(text) for text in queries], [_bare(text) for text in documents]
    copies: dict[str, list[int]] = {}
    for number, text in enumerate(of_document):
        copies.setdefault(text, []).append(number)
    paired: dict[str, dict[str, None]] = {}  # texts that are paired with a text, as query or as positive
    for q, p in zip(query.tolist(), positive.tolist(), strict=True):
        paired.setdefault(of_query[q], {})[of_document[p]] = None
        if of_query[q] in copies:
            paired.setdefault(of_document[p], {})[of_query[q]] = None
    found_query, found = [], []
    for number, text in enumerate(of_query):
        partners = paired[text]
        near = dict.fromkeys([text, *partners, *(further for partner in partners for further in paired.get(partner, ()))])
        numbers = [document for one in near for document in copies.get(one, ())]
        found_query += [number] * len(numbers)
        found += numbers
    return np.array(found_query, np.int64), np.array(found, np.int64)


def _bare(text: str) -> str:
    return unicodedata.normalize("NFC", strip_instruction(text).strip())


def _by_query(query: np.ndarray, document: np.ndarray, queries: int) -> list[np.ndarray]:
    """The distinct documents of each query, in order of appearance."""
    _, first = np.unique(np.stack([query, document]), axis=1, return_index=True)
    first = np.sort(first)
    query, document = query[first], document[first]
    order = np.argsort(query, kind="stable")
    return np.split(document[order], np.searchsorted(query[order], np.arange(1, queries)))
