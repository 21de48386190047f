"""Sources and the documents they search in, every text once and by number."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from f2llm_jax.mining.inputs import Pairs, distinct


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of one source.

    Attributes:
      name: of the source.
      kind: of task.
      query: int64 `[rows]`, number of the query.
      positive: int64 `[rows]`, number of the document.
      languages: `[rows]`.
      given: int64 `[rows, G]`, documents that are known negatives, -1 for none.
    """

    name: str
    kind: str
    query: np.ndarray
    positive: np.ndarray
    languages: list[str]
    given: np.ndarray


@dataclasses.dataclass(frozen=True)
class Pool:
    """Documents, and the queries that search in them.

    Attributes:
      documents: `[S]`, distinct: the corpus in its order, then what only rows name. Equal texts are one document whatever
        their ids, so whatever excludes a document excludes its copies.
      queries: `[B]`, distinct.
      sources: their rows.
      positives: `[B]`, int64 arrays: the known positives of each query over all sources, in order of appearance.
      excluded: `[B]`, int64 arrays: these and its given negatives, which are not mined again.
    """

    documents: pa.LargeStringArray
    queries: pa.LargeStringArray
    sources: list[Rows]
    positives: list[np.ndarray]
    excluded: list[np.ndarray]


def make_pool(sources: Sequence[Pairs], corpus: Sequence[str]) -> Pool:
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
        rows.append(Rows(source.name, source.kind, query_number[at : at + size], positive, source.languages, matrix))
        at, at_given = at + size, at_given + int(counts.sum())
    query = np.concatenate([source.query for source in rows])
    positive = np.concatenate([source.positive for source in rows])
    negative_query = np.concatenate([np.repeat(source.query, source.given.shape[1]) for source in rows])
    negative = np.concatenate([source.given.ravel() for source in rows])
    there = negative >= 0
    excluded = _by_query(np.append(query, negative_query[there]), np.append(positive, negative[there]), len(queries))
    return Pool(documents, queries, rows, _by_query(query, positive, len(queries)), excluded)


def _by_query(query: np.ndarray, document: np.ndarray, queries: int) -> list[np.ndarray]:
    """The distinct documents of each query, in order of appearance."""
    _, first = np.unique(np.stack([query, document]), axis=1, return_index=True)
    first = np.sort(first)
    query, document = query[first], document[first]
    order = np.argsort(query, kind="stable")
    return np.split(document[order], np.searchsorted(query[order], np.arange(1, queries)))
