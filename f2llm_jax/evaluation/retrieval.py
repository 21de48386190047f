"""Recall@1 on files of pairs: is the nearest document, among all documents of the file, the right one?"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int

from f2llm_jax.cli.progress import ProgressCallback
from f2llm_jax.errors import UserError
from f2llm_jax.inference.encode import TextEncoder, truncate_and_normalize
from f2llm_jax.inference.vector_cache import CachedEncoder
from f2llm_jax.inputs import folders, judged, pairs
from f2llm_jax.inputs.columns import BY_NAME, ColumnChoice

QUERIES_AT_ONCE = 1024  # bounds the score matrix


@dataclasses.dataclass(frozen=True)
class RetrievalTask:
    """Q queries and the U documents that they search in."""

    name: str  # of the file, without its suffix
    queries: list[str]  # instruction included
    documents: list[str]  # distinct
    target: Int[np.ndarray, " Q"]  # the right document of each query
    language: np.ndarray  # str, of each query
    described: list[str]  # what was understood of the files


@dataclasses.dataclass(frozen=True)
class Recall:
    """Recall@1 of one model on one file at one width."""

    overall: float  # over all queries
    languages: Mapping[str, float]  # by language of the query, lowest first

    @property
    def mean_over_languages(self) -> float:
        """Every language counts the same."""
        return float(np.mean(list(self.languages.values())))


def read_pairs(path: epath.PathLike, choice: ColumnChoice = BY_NAME, qrels: str = "test") -> RetrievalTask:
    """Reads a file of pairs or a folder that is one (`inputs.pairs`), whose positives are the pool, or a BEIR folder with its corpus.

    Negatives of a row are in the pool too.

    Raises:
      UserError: the file is missing, unreadable, empty, or lacks a column or a text.
    """
    files = pairs.open_pairs(path, choice, qrels)
    pairs.check_positives(files)
    queries: list[str] = []
    passages: list[str] = []
    languages: list[str] = []
    pool: dict[str, None] = dict.fromkeys(judged.read_documents(path).joined()) if files[0].split else {}
    for file in files:
        for block in pairs.read_pairs(file):
            columns = {name: block.required(file, name) for name in block.texts}
            queries += columns["query"]
            passages += columns["passage"]
            languages += columns.get("lang", [""] * len(block.rows))
            pool |= dict.fromkeys(text for name, texts in columns.items() if name not in ("query", "lang") for text in texts if text)
    number = {text: i for i, text in enumerate(pool)}
    target = np.array([number[passage] for passage in passages])
    return RetrievalTask(
        folders.table_name(path), queries, list(pool), target, np.array(languages), [described.describe() for described in files]
    )


def evaluate(
    encoder: TextEncoder | CachedEncoder, pairs: RetrievalTask, dims: Sequence[int], report: ProgressCallback | None = None
) -> dict[int, Recall]:
    """Recall@1 by width.

    Raises:
      UserError: a width exceeds the model's.
    """
    if max(dims) > encoder.width:
        raise UserError(f"the model has {encoder.width} dimensions, fewer than {max(dims)}; lower --dims")
    embeddings = encoder.encode(pairs.queries + pairs.documents, report=report)
    queries, documents = embeddings[: len(pairs.queries)], embeddings[len(pairs.queries) :]
    hits = hits_at_1(queries, documents, pairs.target, dims, _other_positives(pairs))
    return {dim: _recall(hit, pairs.language) for dim, hit in hits.items()}


def _other_positives(pairs: RetrievalTask) -> list[Int[np.ndarray, " _"]]:
    """By query, the right documents of the same query in other rows, which may be nearer without being wrong."""
    of_query: dict[str, set[int]] = {}
    for query, target in zip(pairs.queries, pairs.target.tolist(), strict=True):
        of_query.setdefault(query, set()).add(target)
    return [np.array(sorted(of_query[query] - {target}), int) for query, target in zip(pairs.queries, pairs.target.tolist(), strict=True)]


def hits_at_1(
    queries: Float[np.ndarray, "Q D"],
    documents: Float[np.ndarray, "U D"],
    target: Int[np.ndarray, " Q"],
    dims: Sequence[int],
    others: Sequence[Int[np.ndarray, " _"]] = (),
) -> dict[int, Bool[np.ndarray, " Q"]]:
    """By width: whether the right document alone is nearest by cosine, documents `others` left out of account.

    A tie is a miss, so a model that collapsed scores 0.
    """
    hits = {}
    for dim in dims:
        q, d = truncate_and_normalize(queries, dim), truncate_and_normalize(documents, dim)
        found = []
        for start in range(0, len(q), QUERIES_AT_ONCE):
            scores = q[start : start + QUERIES_AT_ONCE] @ d.T
            for row, numbers in enumerate(others[start : start + QUERIES_AT_ONCE]):
                scores[row, numbers] = -np.inf
            found.append(_nearest_is_target(scores, target[start : start + QUERIES_AT_ONCE]))
        hits[dim] = np.concatenate(found)
    return hits


def _nearest_is_target(scores: Float[np.ndarray, "Q U"], target: Int[np.ndarray, " Q"]) -> Bool[np.ndarray, " Q"]:
    row = np.arange(len(target))
    right = scores[row, target]
    scores[row, target] = -np.inf
    return right > scores.max(axis=1)


def _recall(hit: np.ndarray, language: np.ndarray) -> Recall:
    names, of = np.unique(language, return_inverse=True)
    means = np.bincount(of, weights=hit) / np.bincount(of)
    order = np.argsort(means, kind="stable")
    return Recall(float(hit.mean()), {str(names[i]): float(means[i]) for i in order})
