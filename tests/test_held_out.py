"""Accuracy on held-out rows against a row-by-row oracle."""

import numpy as np
import pytest
import tiny

from f2llm_jax.evaluation.held_out import accuracies
from f2llm_jax.inference.encode import load_encoder


def test_accuracy_counts_rows_whose_positive_comes_first(tmp_path, small_dataset):
    dataset = small_dataset
    encoder = load_encoder(tiny.origin(tmp_path / "tiny"))
    found = accuracies(encoder, dataset)
    assert set(found) == {name for name, source in dataset.sources.items() if source.rows["validation"]}
    for name, value in found.items():
        tables, hits = dataset.tables(name, "validation"), []
        for row, documents in enumerate(tables.documents):
            ids = dataset.reader(name, "validation").read([row]) + dataset.reader(name, "corpus").read([d for d in documents if d >= 0])
            vectors = encoder.encode_ids(ids).astype(np.float64)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            scores = vectors[1:] @ vectors[0]
            hits.append(scores[0] > scores[1:].max())
        assert value == pytest.approx(np.mean(hits)), name
    assert 0 < np.mean(list(found.values())) < 1
