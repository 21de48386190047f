"""Recall@1 on files of pairs: is the nearest document, among all documents of the file, the right one?"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow.parquet as pq
from etils import epath
from jaxtyping import Bool, Float, Int

from f2llm_jax.errors import UserError
from f2llm_jax.inference.encode import TextEncoder, truncate_and_normalize
from f2llm_jax.progress import ProgressCallback
from f2llm_jax.text import query_prompt

COLUMNS = ("query", "instruction", "document", "language")
QUERIES_AT_ONCE = 1024  # bounds the score matrix


class PairsError(UserError):
    """A file of pairs that cannot be evaluated on; the message names the remedy."""


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Queries and the pool they are searched in.

    Attributes:
      name: of the file, without its ending.
      queries: `[B]`, instruction included.
      documents: `[S]`, distinct.
      target: int64 `[B]`, the right document of each query.
      language: str `[B]`, of each query.
    """

    name: str
    queries: list[str]
    documents: list[str]
    target: np.ndarray
    language: np.ndarray


@dataclasses.dataclass(frozen=True)
class Recall:
    """Recall@1 of one model on one file at one width.

    Attributes:
      overall: over all queries.
      languages: by language of the query, lowest first.
    """

    overall: float
    languages: Mapping[str, float]

    @property
    def mean_over_languages(self) -> float:
        """Every language counts the same."""
        return float(np.mean(list(self.languages.values())))


def read_pairs(path: epath.PathLike) -> Pairs:
    """Reads a parquet file with the string columns `COLUMNS`; its distinct documents are the pool.

    Raises:
      PairsError: the file is missing, unreadable, empty or lacks a column or a value.
    """
    path = epath.Path(path)
    try:
        table = pq.read_table(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are subclasses of these
        raise PairsError(f"{path} is not a readable parquet file ({error})") from error
    if missing := [column for column in COLUMNS if column not in table.column_names]:
        raise PairsError(f"{path} lacks the column {', '.join(missing)}; pairs need {', '.join(COLUMNS)}")
    if not table.num_rows:
        raise PairsError(f"{path} holds no pairs")
    if empty := [column for column in COLUMNS if table[column].null_count]:
        raise PairsError(f"{path} has nulls in {', '.join(empty)}; write an empty string for what is absent")
    query, instruction, document, language = (table[column].to_pylist() for column in COLUMNS)
    number = {text: i for i, text in enumerate(dict.fromkeys(document))}
    queries = [query_prompt(i) + q for i, q in zip(instruction, query, strict=True)]
    return Pairs(path.stem, queries, list(number), np.array([number[d] for d in document]), np.array(language))


def evaluate(encoder: TextEncoder, pairs: Pairs, dims: Sequence[int], report: ProgressCallback | None = None) -> dict[int, Recall]:
    """Recall@1 by width.

    Raises:
      PairsError: a width exceeds the model's.
    """
    if max(dims) > encoder.width:
        raise PairsError(f"the model has {encoder.width} dimensions, fewer than {max(dims)}; lower --dims")
    embeddings = encoder.encode(pairs.queries + pairs.documents, report=report)
    queries, documents = embeddings[: len(pairs.queries)], embeddings[len(pairs.queries) :]
    hits = hits_at_1(queries, documents, pairs.target, dims)
    return {dim: _recall(hit, pairs.language) for dim, hit in hits.items()}


def hits_at_1(
    queries: Float[np.ndarray, "B D"], documents: Float[np.ndarray, "S D"], target: Int[np.ndarray, "B"], dims: Sequence[int]
) -> dict[int, Bool[np.ndarray, "B"]]:
    """By width: whether the right document alone is nearest by cosine. A tie is a miss, so a model that collapsed scores 0."""
    hits = {}
    for dim in dims:
        q, d = truncate_and_normalize(queries, dim), truncate_and_normalize(documents, dim)
        blocks = [slice(start, start + QUERIES_AT_ONCE) for start in range(0, len(q), QUERIES_AT_ONCE)]
        hits[dim] = np.concatenate([_nearest_is_target(q[block] @ d.T, target[block]) for block in blocks])
    return hits


def _nearest_is_target(scores: np.ndarray, target: np.ndarray) -> np.ndarray:
    row = np.arange(len(target))
    right = scores[row, target]
    scores[row, target] = -np.inf
    return right > scores.max(axis=1)


def _recall(hit: np.ndarray, language: np.ndarray) -> Recall:
    names, of = np.unique(language, return_inverse=True)
    means = np.bincount(of, weights=hit) / np.bincount(of)
    order = np.argsort(means, kind="stable")
    return Recall(float(hit.mean()), {str(names[i]): float(means[i]) for i in order})
