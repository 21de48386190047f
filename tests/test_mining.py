"""Mining finds what brute force finds, selects what sentence-transformers selects, and never works twice."""

import json
from collections import Counter

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_mining import LOOSE, assert_same, export_model, run, shrink, shrink_all, text, write_pairs

from f2llm_jax import sharding
from f2llm_jax.cli.command import INTERRUPTED
from f2llm_jax.mining import search, selection
from f2llm_jax.mining.nearest import nearest
from f2llm_jax.mining.selection import NegativeRules
from f2llm_jax.preparation.sources import find_sources
from f2llm_jax.storage.vectors import VectorStore


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return export_model(tmp_path_factory.mktemp("mining"))


@pytest.fixture
def small(monkeypatch):
    shrink_all(monkeypatch)


# Nearest documents


def brute_force(queries, documents, k, excluded):
    """Scores in float64, sorted by score and then by index; a plain reading of the definition."""
    scores = queries.astype(np.float64) @ documents.astype(np.float64).T
    for row, numbers in enumerate(excluded):
        scores[row, numbers[numbers >= 0]] = -np.inf
    index = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    found = np.take_along_axis(scores, index, axis=1)
    index = np.where(np.isneginf(found), -1, index)
    pad = ((0, 0), (0, k - index.shape[1]))
    return np.pad(found, pad, constant_values=-np.inf), np.pad(index, pad, constant_values=-1)


@pytest.mark.parametrize(("devices", "dtype"), [(1, "float16"), (8, "float32")])
@pytest.mark.parametrize(("documents", "block", "k"), [(1000, 192, 10), (1000, 1000, 100), (37, 16, 10), (5, 16, 8)])
def test_nearest_are_those_of_brute_force(monkeypatch, devices, dtype, documents, block, k):
    """Exactly, ties included: small whole numbers make sums without rounding and equal scores in plenty."""
    shrink(monkeypatch, tile=8, group=16)
    draw = np.random.default_rng(0)
    d, q = draw.integers(-2, 3, (documents, 12)).astype(dtype), draw.integers(-2, 3, (43, 12)).astype(dtype)
    excluded = np.where(draw.random((43, 4)) < 0.7, draw.integers(0, documents, (43, 4)), -1).astype(np.int32)
    excluded[0, 0] = np.argmax(d @ q[0])
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    scores, index = nearest(q, (d[a : a + block] for a in range(0, documents, block)), k, excluded, mesh)
    want_scores, want_index = brute_force(q, d, k, excluded)
    np.testing.assert_array_equal(index, want_index)
    np.testing.assert_array_equal(scores, want_scores)


@pytest.mark.parametrize("order", ["random", "best last", "best together", "all equal"])
def test_nearest_in_any_order_of_documents(monkeypatch, order):
    """The cheap paths, that few groups or few documents change, are only ever taken where they are exact."""
    shrink(monkeypatch, tile=8, group=16)
    draw = np.random.default_rng(1)
    d, q = draw.standard_normal((2048, 16)).astype(np.float32), draw.standard_normal((16, 16)).astype(np.float32)
    if order == "best last":
        d = d[np.argsort(d @ q[0])]
    elif order == "best together":
        d[512:544] = q[0] * np.linspace(3, 4, 32, dtype=np.float32)[:, None]
    elif order == "all equal":
        d[:] = d[0]
    excluded = np.full((16, 1), -1, np.int32)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    scores, index = nearest(q, (d[a : a + 512] for a in range(0, 2048, 512)), 20, excluded, mesh)
    want_scores, want_index = brute_force(q, d, 20, excluded)
    np.testing.assert_array_equal(index, want_index)
    np.testing.assert_allclose(scores, want_scores, rtol=1e-5, atol=1e-5)


# Selection


RULES = {
    "published": NegativeRules(nearest=30, negatives=6, skip=2),
    "thresholds": NegativeRules(nearest=30, negatives=6, skip=0, max_score=0.6, max_relative=0.9, absolute_margin=0.05, min_score=0.1),
    "none": NegativeRules(nearest=30, negatives=6, skip=4, max_score=None, max_relative=None),
}


@pytest.mark.parametrize("name", RULES)
def test_selection_is_a_plain_reading_of_the_rules(name):
    rules, draw = RULES[name], np.random.default_rng(0)
    scores = -np.sort(-draw.uniform(-0.2, 1, (50, 30)).astype(np.float32), axis=1)
    scores[3:6, 20:] = -np.inf
    positive = draw.uniform(-0.1, 1, 50).astype(np.float32)
    got = selection.choose_negatives(rules, selection.allowed(rules, scores, positive, counted := Counter()), [""] * 50)
    removed = 0
    for row, p, chosen in zip(scores, positive, got, strict=True):
        left = []
        for column, score in enumerate(row):
            if score == -np.inf:
                continue
            near = [
                rules.max_score is not None and score > rules.max_score,
                rules.min_score is not None and score < rules.min_score,
                rules.max_relative is not None and score > p - abs(p) * (1 - rules.max_relative),
                rules.absolute_margin is not None and score > p - rules.absolute_margin,
            ]
            left += [] if any(near) else [column]
            removed += any(near)
        want = left[rules.skip :][: rules.negatives]
        assert chosen.tolist() == want + [-1] * (6 - len(want))
    assert counted.total() == removed


def test_a_sample_depends_on_the_query_and_the_seed_alone():
    left = np.ones((40, 50), bool)
    names = [f"query {i}" for i in range(40)]
    sample = lambda **change: selection.choose_negatives(NegativeRules(take="sample", negatives=6, **change), left, names)  # noqa: E731
    first = sample()
    assert (np.diff(first) > 0).all() and first.min() >= 5  # nearest first, the skipped ranks never
    assert (selection.choose_negatives(NegativeRules(take="sample", negatives=6), left[:7], names[10:17]) == first[10:17]).all()
    assert (sample(seed=1) != first).any(axis=1).all()
    counts = np.bincount(first.ravel(), minlength=50)[5:]
    assert counts.max() < 20 and (counts > 0).sum() > 40  # spread over all ranks


def test_near_duplicates_are_jaccard_of_five_grams():
    texts = ["The quick brown fox jumps over the lazy dog.", "the QUICK brown fox -- jumps over the lazy dog", "The lazy dog", "Katze"]
    grams = lambda i: selection.character_grams(texts[i])  # noqa: E731
    repeats = lambda share: selection.near_duplicates(np.ones((1, 3), bool), np.array([[1, 2, 3]]), [np.array([0])], grams, share)[0]  # noqa: E731
    assert repeats(1.0).tolist() == [True, False, False]
    assert repeats(0.1).tolist() == [True, True, False]  # 6 of 31 are shared
    assert repeats(0.2).tolist() == [True, False, False]
    assert not repeats(2).any()


# The command


def test_the_output_is_what_brute_force_says(model, tmp_path, small):
    """From files to files: order, positives of repeated queries excluded, scores, and `prepare` takes it."""
    from sentence_transformers import SentenceTransformer

    table = write_pairs(tmp_path / "pairs.parquet")
    assert run(model, [tmp_path / "pairs.parquet"], tmp_path / "out", "--negatives", "9", "--nearest", "40", "--skip", "3", *LOOSE) == 0
    got = pq.read_table(tmp_path / "out" / "pairs.parquet").to_pylist()
    peer = SentenceTransformer(str(model), device="cpu")
    documents, queries = list(dict.fromkeys(table["passage"])), table["query"]
    q, d = (peer.encode(texts, normalize_embeddings=True).astype(np.float64) for texts in (queries, documents))
    scores = q @ d.T
    assert [row["query"] for row in got] == queries and [row["lang"] for row in got] == table["lang"]
    for i, row in enumerate(got):
        positives = {p for other, p in zip(queries, table["passage"], strict=True) if other == queries[i]}
        order = [j for j in np.argsort(-scores[i], kind="stable") if documents[j] not in positives][3:12]
        names = [row[f"negative_{n}"] for n in range(1, 10)]
        theirs = [scores[i, documents.index(name)] for name in names]
        np.testing.assert_allclose(theirs, scores[i, order], atol=2e-6)  # the same documents, up to ties
        assert not positives & set(names) and len(set(names)) == 9
        np.testing.assert_allclose(row["scores"], [scores[i, documents.index(row["passage"])], *theirs], atol=2e-6)
    (source,) = find_sources(tmp_path / "out", stage=2)
    assert (source.name, source.kind, source.negatives, source.rows) == ("pairs", "retrieval", 9, 200)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["total"] == {"kept": 200, "rows": 200} and summary["documents"] == 200
    assert (tmp_path / "out" / "examples.txt").read_text().count("positive") == 10
    assert (tmp_path / "out" / "scores.png").stat().st_size > 5000


OPTIONS = {
    "top": dict(range_min=0, range_max=30, num_negatives=5),
    "skip": dict(range_min=4, range_max=20, num_negatives=5),
    "thresholds": dict(range_min=2, range_max=50, num_negatives=5, max_score=0.42, min_score=0.25, relative_margin=0.01),
    "margin": dict(range_min=0, range_max=60, num_negatives=3, absolute_margin=0.02),
}
NAMES = {"range_min": "--skip", "range_max": "--nearest", "num_negatives": "--negatives"}
NAMES |= {"max_score": "--max-score", "min_score": "--min-score", "absolute_margin": "--absolute-margin"}


@pytest.mark.parametrize("repeats", [2, 201], ids=["two positives", "one positive"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.filterwarnings("ignore")
def test_rows_are_those_of_sentence_transformers(model, tmp_path, small, name, repeats):
    """Every query has as many positives: the peer sees a candidate more for each that a query has fewer than another."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    table, options = write_pairs(tmp_path / "pairs.parquet", repeats=repeats), OPTIONS[name]
    peer = SentenceTransformer(str(model), device="cpu")
    peer.prompts = {}
    pairs = Dataset.from_dict({"query": table["query"], "passage": table["passage"]})
    want = mine_hard_negatives(pairs, peer, output_format="n-tuple", output_scores=True, verbose=False, **options).to_list()
    flags = [part for key, value in options.items() if key in NAMES for part in (NAMES[key], str(value))]
    flags += ["--max-relative", str(1 - options["relative_margin"]) if "relative_margin" in options else "none", "--near-duplicate", "2"]
    assert run(model, [tmp_path / "pairs.parquet"], tmp_path / "out", *flags) == 0
    got = pq.read_table(tmp_path / "out" / "pairs.parquet").drop(["lang"]).to_pylist()
    key = lambda row: (row["query"], row["passage"])  # noqa: E731
    got, want = sorted(got, key=key), sorted(want, key=key)
    assert [key(row) for row in got] == [key(row) for row in want] and len(got) > 0
    assert len(got) < 200 or name in ("top", "skip")
    for mine_, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(mine_["scores"], theirs["scores"], atol=2e-6)
        for n in range(1, options["num_negatives"] + 1):
            tied = abs(np.array(theirs["scores"][1:]) - theirs["scores"][n]) < 4e-6
            assert mine_[f"negative_{n}"] == theirs[f"negative_{n}"] or tied.sum() > 1


def test_nothing_is_encoded_or_searched_twice(model, tmp_path, small, monkeypatch):
    """Interrupted anywhere, a run goes on; other rules, more documents or another source encode only what is new."""
    written = []
    write_vectors, write_neighbours = VectorStore.write, search.write_arrays

    def watch(before):
        def vectors_of(store, name, array):
            before(name)
            write_vectors(store, name, array)

        def neighbours_of(path, arrays):
            before(path.name)
            write_neighbours(path, arrays)

        monkeypatch.setattr(VectorStore, "write", vectors_of)
        monkeypatch.setattr(search, "write_arrays", neighbours_of)

    watch(written.append)
    write_pairs(tmp_path / "pairs.parquet")
    cache = ("--cache", str(tmp_path / "cache"), "--negatives", "5", *LOOSE)
    assert run(model, [tmp_path / "pairs.parquet"], tmp_path / "whole", "--cache", str(tmp_path / "other"), *cache[2:]) == 0
    whole, total = sorted(written), len(written)
    assert total == 7 + 5 + 3  # 200 documents, 160 queries, two shards of these at a time

    def dying(name):
        if len(written) % 3 == 2:
            written.append(None)
            raise KeyboardInterrupt
        written.append(name)

    written.clear()
    watch(dying)
    interrupted = 0
    while not (tmp_path / "out").exists():
        code = run(model, [tmp_path / "pairs.parquet"], tmp_path / "out", *cache)
        assert code in (0, INTERRUPTED)
        interrupted += code == INTERRUPTED
    assert interrupted > 5
    assert sorted(filter(None, written)) == whole
    assert_same(tmp_path / "out", tmp_path / "whole")
    watch(written.append)
    written.clear()
    assert run(model, [tmp_path / "pairs.parquet"], tmp_path / "again", *cache, "--skip", "2") == 0
    assert run(model, [tmp_path / "pairs.parquet"], tmp_path / "out", *cache) == 0  # it is there
    assert written == []
    pq.write_table(pa.table({"passage": [text(i) for i in range(220)]}), tmp_path / "more.parquet")
    assert run(model, [tmp_path / "pairs.parquet"], tmp_path / "more", *cache, "--corpus", str(tmp_path / "more.parquet")) == 0
    assert len(written) == 1 + 3  # the last shard of documents has grown, and there are other neighbours


def test_rows_with_too_few_are_set_aside_or_filled(model, tmp_path, small):
    write_pairs(tmp_path / "pairs.parquet")
    shared = ("--cache", str(tmp_path / "cache"), "--negatives", "8", "--nearest", "40", "--skip", "0", "--near-duplicate", "2")
    common = (*shared, "--max-relative", "0.995")
    assert run(model, [tmp_path / "pairs.parquet"], tmp_path / "drop", *common) == 0
    assert run(model, [tmp_path / "pairs.parquet"], tmp_path / "fill", *common, "--too-few", "fill") == 0
    drop, fill = (pq.read_table(tmp_path / name / "pairs.parquet").to_pylist() for name in ("drop", "fill"))
    counts = json.loads((tmp_path / "drop" / "summary.json").read_text())["total"]
    assert counts["skipped: too few negatives"] == 200 - len(drop) > 10 and len(drop) > 10 and len(fill) == 200
    assert [row for row in fill if row["passage"] in {kept["passage"] for kept in drop}] == drop
    for row in fill:
        names = [row[f"negative_{n}"] for n in range(1, 9)]
        assert len(set(names)) == 8 and row["passage"] not in names
    assert run(model, [tmp_path / "pairs.parquet"], tmp_path / "rank", *shared, "--max-relative", "none", "--max-positive-rank", "3") == 0
    everything = pq.read_table(tmp_path / "fill" / "pairs.parquet").to_pylist()
    kept = {row["passage"] for row in pq.read_table(tmp_path / "rank" / "pairs.parquet").to_pylist()}
    assert run(model, [tmp_path / "pairs.parquet"], tmp_path / "all", *shared, "--max-relative", "none") == 0
    for row in pq.read_table(tmp_path / "all" / "pairs.parquet").to_pylist():
        higher = sum(score > row["scores"][0] for score in row["scores"][1:])
        assert (row["passage"] in kept) == (higher < 3)
    assert 0 < len(kept) < len(everything)
