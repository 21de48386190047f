"""A score on held-out rows of any task kind: does the positive come before every stored hard negative of its row?"""

import numpy as np

from f2llm_jax.data.records import CORPUS, Dataset
from f2llm_jax.evaluation.encode import TextEncoder, truncate_and_normalize
from f2llm_jax.text import truncate

SPLIT = "validation"


def accuracies(encoder: TextEncoder, dataset: Dataset) -> dict[str, float]:
    """By source, the share of its validation rows whose positive alone is nearest to the query by cosine; a tie is a miss.

    Chance is 1 / (1 + negatives). Texts are cut at the encoder's `max_length`; sources without validation rows are left out.
    """
    return {name: _accuracy(encoder, dataset, name) for name, source in dataset.sources.items() if source.rows[SPLIT]}


def _accuracy(encoder: TextEncoder, dataset: Dataset, source: str) -> float:
    documents = np.asarray(dataset.tables(source, SPLIT).documents)
    distinct, place = np.unique(documents, return_inverse=True)
    absent = int(distinct[0] < 0)  # -1 stands for a negative that a row does not have
    queries = _encode(encoder, dataset, dataset.reader(source, SPLIT).read(range(len(documents))))
    found = _encode(encoder, dataset, dataset.reader(source, CORPUS).read(distinct[absent:]))
    found = np.concatenate([np.zeros((absent, encoder.width), np.float32), found])
    scores = np.einsum("bd,bnd->bn", queries, found[place.reshape(documents.shape)])
    scores[documents < 0] = -np.inf
    return float((scores[:, 0] > scores[:, 1:].max(axis=1, initial=-np.inf)).mean())


def _encode(encoder: TextEncoder, dataset: Dataset, ids: list[np.ndarray]) -> np.ndarray:
    cut = [truncate(one, encoder.max_length, dataset.eos_id) for one in ids]
    return truncate_and_normalize(encoder.encode_ids(cut), encoder.width)
