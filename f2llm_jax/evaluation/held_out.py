"""Scores of a finished model on held-out rows: does the positive come first, and of graded pairs, are they in the order of their scores?"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from f2llm_jax.data.pipeline import BatchConfig, Pipeline
from f2llm_jax.data.records import CORPUS, Dataset
from f2llm_jax.inference.encode import TextEncoder, truncate_and_normalize
from f2llm_jax.text import truncate
from f2llm_jax.training.held_out import draw
from f2llm_jax.training.validation import accuracies as accuracies_of_rows
from f2llm_jax.training.validation import correlations, rank_correlation

SPLIT = "validation"


def as_in_training(encoder: TextEncoder, dataset: Dataset, config: Mapping[str, Any], dims: Sequence[int]) -> dict[str, float]:
    """The accuracies and rank correlations that training logs (`training.validation`), of the batches that it scores at every time.

    Args:
      encoder: the model, cutting texts where the run cut them.
      dataset: the run's.
      config: the run's resolved configuration (`config.json`).
      dims: widths, ascending; the last is the full one.
    """
    shape, firsts, languages, spearman = BatchConfig(**config["batch"]), {}, {}, {}
    kinds = {name: dataset.sources[name].kind for name in sources(dataset)}
    pipelines = {name: Pipeline(dataset, SPLIT, shape, config["seed"], None, [name]) for name in kinds}
    sizes = {name: pipeline.plan.steps_per_epoch for name, pipeline in pipelines.items()}
    for name, count in draw(sizes, config["eval"]["batches"], config["seed"], 0)[0].items():
        pipeline, steps = pipelines[name], range(count)
        if kinds[name] == "graded":
            rows = np.concatenate([pipeline.planned(step).plan.rows for step in steps])
            spearman[name] = _correlation(encoder, dataset, name, rows, dims)
            continue
        firsts[name] = np.concatenate([_first(encoder, dataset, pipeline, step, dims) for step in steps], axis=1)
        languages[name] = [language for step in steps for language in pipeline.languages(step)]
    return accuracies_of_rows(firsts, languages, kinds, dims) | correlations(spearman, kinds, dims)


def _correlation(encoder: TextEncoder, dataset: Dataset, source: str, rows: Int[np.ndarray, " B"], dims: Sequence[int]) -> list[float]:
    """Of graded validation rows, Spearman's correlation of their scores and cosines by width."""
    tables = dataset.tables(source, SPLIT)
    assert tables.scores is not None
    queries = encode_stored(encoder, dataset, dataset.reader(source, SPLIT).read(rows))
    passages = encode_stored(encoder, dataset, dataset.reader(source, CORPUS).read(np.asarray(tables.documents)[rows, 0]))
    pairs = ([truncate_and_normalize(vectors, dim) for vectors in (queries, passages)] for dim in dims)
    return [rank_correlation(np.einsum("bd,bd->b", *pair), np.asarray(tables.scores)[rows, 0]) for pair in pairs]


def _first(encoder: TextEncoder, dataset: Dataset, pipeline: Pipeline, step: int, dims: Sequence[int]) -> Bool[np.ndarray, "J B"]:
    """`objectives.ranked_first` of one batch by plain comparison of cosines in numpy."""
    planned = pipeline.planned(step)
    name, retrieval = planned.plan.source, planned.plan.kind == "retrieval"
    distinct, place = np.unique(planned.documents, return_inverse=True)
    absent = int(distinct[0] < 0)
    queries = encode_stored(encoder, dataset, dataset.reader(name, SPLIT).read(planned.plan.rows))
    found = encode_stored(encoder, dataset, dataset.reader(name, CORPUS).read(distinct[absent:]))
    own = place.reshape(planned.documents.shape) - absent  # of each row: its positive, then its negatives; -1 for none
    rivals = np.zeros((len(queries), len(found)), bool)
    rivals[:] = retrieval
    for row, documents in enumerate(own):
        rivals[row, documents[documents >= 0]] = True
    rows = np.arange(len(queries))
    rivals[rows, own[:, 0]] = False
    first = []
    for dim in dims:
        cosines = truncate_and_normalize(queries, dim) @ truncate_and_normalize(found, dim).T
        first.append(cosines[rows, own[:, 0]] > np.where(rivals, cosines, -np.inf).max(axis=1))
    return np.stack(first)


def accuracies(encoder: TextEncoder, dataset: Dataset) -> dict[str, float]:
    """By source, the share of its validation rows whose positive alone is nearest to the query by cosine; a tie is a miss.

    Chance is 1 / (1 + negatives). Texts are cut at the encoder's `max_length`; sources of graded pairs, or without validation rows, are
    left out.
    """
    names = [name for name in sources(dataset) if dataset.sources[name].kind != "graded"]
    return {name: _accuracy(encoder, dataset, name) for name in names}


def _accuracy(encoder: TextEncoder, dataset: Dataset, source: str) -> float:
    documents = np.asarray(dataset.tables(source, SPLIT).documents)
    distinct, place = np.unique(documents, return_inverse=True)
    absent = int(distinct[0] < 0)  # -1 is a negative that a row does not have
    queries = encode_stored(encoder, dataset, dataset.reader(source, SPLIT).read(range(len(documents))))
    found = encode_stored(encoder, dataset, dataset.reader(source, CORPUS).read(distinct[absent:]))
    found = np.concatenate([np.zeros((absent, encoder.width), np.float32), found])
    scores = np.einsum("bd,bnd->bn", queries, found[place.reshape(documents.shape)])
    scores[documents < 0] = -np.inf
    return float((scores[:, 0] > scores[:, 1:].max(axis=1, initial=-np.inf)).mean())


@dataclasses.dataclass(frozen=True)
class Search:
    """How well the held-out queries of a source find their documents among all documents of the source."""

    queries: int  # Q
    documents: int  # U, distinct
    recalls: dict[int, float]  # by k: the share of a query's documents among the k nearest by cosine, mean over queries

    @property
    def counted(self) -> str:
        return f"{self.queries:,} queries, {self.documents:,} documents"

    @property
    def figures(self) -> dict[str, float]:
        return {f"recall@{k}": recall for k, recall in self.recalls.items()}


@dataclasses.dataclass(frozen=True)
class Correlation:
    """How well the order of cosines is that of the scores of a source's held-out pairs."""

    pairs: int
    spearman: float  # NaN where all scores are alike

    @property
    def counted(self) -> str:
        return f"{self.pairs:,} graded pairs"

    @property
    def figures(self) -> dict[str, float]:
        return {"spearman": self.spearman}


def sources(dataset: Dataset) -> list[str]:
    """Those that have validation rows."""
    return [name for name, source in dataset.sources.items() if source.rows[SPLIT]]


def measure(encoder: TextEncoder, dataset: Dataset, source: str, dim: int | None = None) -> Search | Correlation:
    """What the kind of a source asks for, of its validation rows."""
    info = dataset.sources[source]
    if info.kind != "graded":
        return search(encoder, dataset, source, dim=dim)
    rows = info.rows[SPLIT]
    return Correlation(rows, _correlation(encoder, dataset, source, np.arange(rows), [dim or encoder.width])[0])


def search(encoder: TextEncoder, dataset: Dataset, source: str, ks: Sequence[int] = (1, 10), dim: int | None = None) -> Search:
    """Scores the validation rows of a source; rows of one query are one query with several right documents.

    Of equal cosines the wrong document is nearer, so a model that collapsed scores 0. `dim` truncates vectors; None for all dimensions.
    """
    ids = dataset.reader(source, SPLIT).read(range(dataset.sources[source].rows[SPLIT]))
    positives = np.asarray(dataset.tables(source, SPLIT).documents)[:, 0]
    right: dict[bytes, set[int]] = {}
    for query, document in zip(ids, positives.tolist(), strict=True):
        right.setdefault(query.tobytes(), set()).add(document)
    queries = encode_stored(encoder, dataset, [np.frombuffer(query, np.int32) for query in right], dim)
    documents = encode_stored(encoder, dataset, dataset.reader(source, CORPUS).read(range(dataset.sources[source].documents)), dim)
    found: dict[int, list[float]] = {k: [] for k in ks}
    for vector, own in zip(queries, right.values(), strict=True):
        cosines, mine = documents @ vector, np.array(sorted(own))
        wrong = np.delete(cosines, mine)
        above = np.array([(wrong >= cosine).sum() for cosine in cosines[mine]])
        ranks = above + np.argsort(np.argsort(above, kind="stable"), kind="stable")  # from 0, among all documents
        for k in ks:
            found[k].append((ranks < k).sum() / len(mine))
    return Search(len(queries), len(documents), {k: float(np.mean(shares)) for k, shares in found.items()})


def encode_stored(encoder: TextEncoder, dataset: Dataset, ids: list[np.ndarray], dim: int | None = None) -> Float[np.ndarray, "S D"]:
    """Normalised embeddings of texts as a dataset stores them, truncated where the encoder truncates, and to `dim` dimensions."""
    cut = [truncate(one, encoder.max_length, dataset.eos_id) for one in ids]
    return truncate_and_normalize(encoder.encode_ids(cut), dim or encoder.width)
