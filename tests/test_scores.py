"""Scores: from a user's file to the batch, and the losses on them against float64 torch and sentence-transformers."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from random_samples import B, D, N, masks, of, random_embeddings
from sentence_transformers.sentence_transformer.losses import AnglELoss, CoSENTLoss, DistillKLDivLoss, MarginMSELoss, MatryoshkaLoss
from sentence_transformers.util import pairwise_cos_sim

from f2llm_jax import api, prepare, sharding
from f2llm_jax.configs import common
from f2llm_jax.data.pipeline import BatchConfig, Pipeline
from f2llm_jax.data.records import load_dataset
from f2llm_jax.errors import UserError
from f2llm_jax.evaluation import retrieval
from f2llm_jax.inputs.cells import number_lists, numbers
from f2llm_jax.inputs.columns import ColumnChoice
from f2llm_jax.mining import inputs as mining_inputs
from f2llm_jax.objectives import Embeddings, Objective, candidates, matryoshka_weights, total
from f2llm_jax.objectives.config import ContrastiveConfig

WIDTHS = (8, D)
RNG = np.random.default_rng(40)
SCORES = RNG.normal(size=(B, 1 + N)).astype(np.float32) * 5
SCORES[1, 3] = SCORES[5, 1:] = SCORES[6, 0] = np.nan  # one document, all negatives, and a positive without a score
GRADES = np.array([0.0, 2.0, 1.0, 5.0, 2.0, np.nan, 3.0, 4.0], np.float32)  # two alike, one without
NAMES = {"kl": "scores", "margin_mse": "scores", "cosent": "graded", "angle": "graded"}


def objective(name, **more):
    terms = {"scores": name, "scores_weight": 1.0, "scores_temperature": 3.0} if NAMES[name] == "scores" else {"graded": name}
    return Objective(contrastive=ContrastiveConfig(dims=WIDTHS, **more), **terms)


def samples_of(name, full=False):
    found = of(*masks(full))
    scores = SCORES if NAMES[name] == "scores" else np.concatenate([GRADES[:, None], np.full((B, N), np.nan, np.float32)], axis=1)
    scores = np.nan_to_num(scores, nan=1.5) if full else scores
    return dataclasses.replace(found, scores=jnp.asarray(scores), graded_weight=jnp.float32(NAMES[name] == "graded"))


def term(e, samples, chosen):
    return total(e, samples, chosen)[1]["scores" if chosen.scores_weight else "graded"].value


compiled = jax.jit(jax.value_and_grad(term), static_argnums=2)


def in_torch(e):
    return Embeddings(*(torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True) for x in e))


def oracle(e, samples, name, tau=0.05, score_tau=3.0):
    """Row by row and pair by pair, with lists of what exists."""
    here, there, scores = (np.asarray(x) for x in (samples.sample_mask, samples.negative_mask, samples.scores))
    value = torch.zeros((), dtype=torch.float64)
    for width, weight in zip(WIDTHS, matryoshka_weights(WIDTHS), strict=True):
        q, p, n = (F.normalize(x[..., :width], dim=-1) for x in e)
        rows, margins, terms = [], [], [torch.zeros((), dtype=torch.float64)]
        for b in np.flatnonzero(here):
            documents = [(p[b], scores[b, 0])] + [(n[b, i], scores[b, 1 + i]) for i in range(N) if there[b, i]]
            documents = [(q[b] @ vector / tau, score / score_tau, i) for i, (vector, score) in enumerate(documents) if np.isfinite(score)]
            if len(documents) > 1:
                ours, target = torch.stack([d[0] for d in documents]), torch.tensor([d[1] for d in documents], dtype=torch.float64)
                rows.append(F.kl_div(F.log_softmax(ours, 0), F.log_softmax(target, 0), log_target=True, reduction="sum"))
            if documents and documents[0][2] == 0:
                margins += [(documents[0][0] - d[0] - (documents[0][1] - d[1])) ** 2 for d in documents[1:]]

        def likeness(b, q=q, p=p, width=width):
            if name == "cosent":
                return q[b] @ p[b] / tau
            z, w = (torch.complex(x[b][: width // 2], x[b][width // 2 :]) for x in (q, p))
            inner = (z * w.conj()).sum()
            return torch.abs(inner.real + inner.imag) / tau

        graded = [b for b in np.flatnonzero(here) if np.isfinite(scores[b, 0])]
        terms += [likeness(j) - likeness(i) for i in graded for j in graded if scores[j, 0] < scores[i, 0]]
        found = {"kl": rows and sum(rows) / len(rows), "margin_mse": margins and sum(margins) / len(margins)}
        value = value + weight * (found[name] if name in found else torch.logsumexp(torch.stack(terms), 0))
    return value


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient(name):
    e, samples = random_embeddings(41), samples_of(name)
    got, gradients = compiled(e, samples, objective(name))
    there = in_torch(e)
    want = oracle(there, samples, name)
    want.backward()
    np.testing.assert_allclose(got, want.item(), rtol=5e-6)
    for ours, x in zip(gradients, there, strict=True):
        wanted = np.zeros(x.shape) if x.grad is None else x.grad.numpy()
        np.testing.assert_allclose(ours, wanted, atol=2e-5 * max(np.abs(wanted).max(), 1e-3), rtol=0)


class Given(torch.nn.Module):
    """What sentence-transformers' losses take for a model: embeddings go in and come out."""

    def forward(self, features):
        return {"sentence_embedding": features["embedding"]}

    def get_embedding_dimension(self):
        return D


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_losses_are_those_of_sentence_transformers(name):
    """Its KL is of both over one temperature, whose square it multiplies with; its margins are of similarities as they are."""
    e, samples, given = random_embeddings(42), samples_of(name, full=True), Given()
    scores = torch.tensor(np.asarray(samples.scores), dtype=torch.float64)
    peer, labels, factor = {
        "kl": (lambda: DistillKLDivLoss(given, similarity_fct=pairwise_cos_sim, temperature=0.05), scores * 0.05 / 3.0, 0.05**2),
        "margin_mse": (lambda: MarginMSELoss(given, similarity_fct=lambda a, b: pairwise_cos_sim(a, b) / 0.05), scores / 3.0, 1.0),
        "cosent": (lambda: CoSENTLoss(given, scale=20.0), scores[:, 0], 1.0),
        "angle": (lambda: AnglELoss(given, scale=20.0), scores[:, 0], 1.0),
    }[name]
    if NAMES[name] == "graded":
        labels = torch.tensor(np.nan_to_num(GRADES, nan=1.5), dtype=torch.float64)
    there = in_torch(e)
    columns = [there.query, there.passage, *(there.negatives[:, i] for i in range(N) if NAMES[name] == "scores")]
    loss = MatryoshkaLoss(given, peer(), WIDTHS, matryoshka_weights(WIDTHS))
    want = loss([{"embedding": column} for column in columns], labels) / factor
    want.backward()
    got, gradients = compiled(e, samples, objective(name))
    np.testing.assert_allclose(got, want.item(), rtol=5e-6)
    for ours, x in zip(gradients, there, strict=True):
        wanted = np.zeros(x.shape) if x.grad is None else x.grad.numpy()
        np.testing.assert_allclose(ours, wanted, atol=2e-5 * max(np.abs(wanted).max(), 1e-3), rtol=0)


@pytest.mark.slow
def test_blocks_and_devices_change_nothing(monkeypatch):
    e, here = random_embeddings(43), [samples_of("kl"), samples_of("cosent")]
    chosen = [objective("kl"), objective("margin_mse")], [objective("cosent"), objective("angle")]

    def loss(e, samples):
        return sum(term(e, one, c) for one, of_kind in zip(samples, chosen, strict=True) for c in of_kind)

    want = jax.jit(jax.value_and_grad(loss))(e, here)
    monkeypatch.setattr(candidates, "BLOCK", 3)
    mesh = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        everywhere = jax.tree.map(lambda x: sharding.to_global(np.asarray(x), mesh, sharding.P()), e)
        specs = jax.tree.map(lambda x: sharding.P(sharding.BATCH, *[None] * (x.ndim - 1)) if x.ndim else sharding.P(), here)
        split = jax.tree.map(lambda x, spec: sharding.to_global(np.asarray(x), mesh, spec), here, specs)
        got = jax.jit(jax.value_and_grad(loss))(everywhere, split)
    for one, many in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(many, one, rtol=2e-5, atol=2e-6)


@pytest.mark.slow
def test_batches_without_scores_have_no_term():
    """A batch of a source without scores, next to sources that have some, and one of graded pairs of one grade alone."""
    e, none = random_embeddings(44), jnp.full((B, 1 + N), jnp.nan)
    samples = dataclasses.replace(of(*masks()), scores=none, graded_weight=jnp.float32(0))
    for name in NAMES:
        value, gradients = compiled(e, samples, objective(name))
        assert value == 0 and not any(np.asarray(gradient).any() for gradient in gradients), name
    alike = dataclasses.replace(samples, scores=none.at[:, 0].set(2.0), graded_weight=jnp.float32(1))
    value, gradients = compiled(e, alike, objective("cosent"))
    assert value == 0 and not any(np.asarray(gradient).any() for gradient in gradients)


def test_a_term_without_data_for_it_is_refused():
    with pytest.raises(UserError, match="no source of the data has any; prepare files with a column of scores"):
        total(random_embeddings(0), of(*masks()), objective("kl"))
    with pytest.raises(UserError, match="graded='angle' takes halves of vectors, and the matryoshka width 5 is odd"):
        Objective(graded="angle", contrastive=ContrastiveConfig(dims=(5, 8)))


# --- from a file -----------------------------------------------------------------------------------------------------


def score(row, column):
    """A number that tells row and column."""
    return round(row + column / 100, 2)


def listed(form):
    """12 rows whose scores say of which row and column they are; row 3 repeats a negative, row 4 lacks one, row 5 has no scores."""
    rows = []
    for i in range(12):
        negatives = [f"dog {i} {n}" for n in range(1, 5)]
        found = [score(i, n) for n in range(5)]
        if i == 3:
            negatives[1] = negatives[0]
        if i == 4:
            negatives, found = negatives[:3], found[:4]
        row = {"query": f"cat {i}", "pos": [f"mat {i}"], "neg": negatives}
        if form == "scores":
            row = {**row, "pos": f"mat {i}", "scores": None if i == 5 else found}
        elif i != 5:
            row |= {"pos_scores": found[:1], "neg_scores": found[1:]}
        rows.append(row)
    return rows


def prepared(tmp_path, rows, *flags, name="pairs", tasks=None):
    (tmp_path / "raw").mkdir(parents=True)
    (tmp_path / "raw" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if tasks:
        (tmp_path / "raw" / "tasks.json").write_text(json.dumps(tasks))
    tiny.write_tokenizer(tmp_path / "tokenizer")
    paths = {"--raw": tmp_path / "raw", "--tokenizer": tmp_path / "tokenizer", "--out": tmp_path / "data"}
    command = [str(part) for flag in paths.items() for part in flag]
    assert prepare.main([*command, "--max-length", "32", "--workers", "1", "--validation", "0", *flags]) == 0
    return load_dataset(tmp_path / "data")


def batch_texts(dataset, batch):
    """For each sample its query, and its documents with their scores."""
    tokenizer = dataset.tokenizer()
    texts, packed = {}, batch.texts
    for chunk, row, slot in np.argwhere(np.asarray(packed.text) < batch.text_count):
        segment = np.asarray(packed.segment_ids[chunk, row]) == slot + 1
        texts[int(packed.text[chunk, row, slot])] = tokenizer.decode(np.asarray(packed.token_ids[chunk, row])[segment][:-1])
    samples, negatives = batch.samples.negative_mask.shape
    for b in np.flatnonzero(np.asarray(batch.samples.sample_mask)):
        documents = [samples + b, *(2 * samples + b * negatives + n for n in range(negatives))]
        yield texts[b], [(texts.get(t), s) for t, s in zip(documents, np.asarray(batch.samples.scores[b]).tolist(), strict=True)]


@pytest.mark.parametrize("form", ["scores", pytest.param("pos_scores", marks=pytest.mark.slow)])
def test_scores_stay_with_their_documents(form, tmp_path):
    """Through cleaning, which drops a repeated negative and closes up, and through the draw of negative columns."""
    dataset = prepared(tmp_path, listed(form))
    config = BatchConfig(size=5, row_tokens=32, microbatch_rows=4, max_length=32, negatives={"retrieval": 3}, negatives_per_sample="row")
    pipeline, seen = Pipeline(dataset, "train", config, 0, None), 0
    for step in range(2 * pipeline.plan.steps_per_epoch):
        for query, documents in batch_texts(dataset, pipeline.step(step).batch):
            row = int(re.search(r"\d+", query)[0])
            for text, found in documents:
                seen += 1
                column = 0 if text.startswith("mat") else int(text.split()[2])
                assert text.split()[1] == str(row)
                want = np.nan if row == 5 else score(row, column)
                np.testing.assert_allclose(found, want, rtol=1e-6, err_msg=f"{query}: {text}")
    assert seen == 2 * 12 * 4


def test_graded_pairs_from_a_file(tmp_path, capsys):
    rows = [{"sentence1": f"cat {i}", "sentence2": f"mat {i}", "score": i / 4} for i in range(9)]
    dataset = prepared(tmp_path, rows, "--columns", "query=sentence1,passage=sentence2")
    assert "pairs: graded (guessed: sentences (sentence1) with a score" in capsys.readouterr().out
    batch = Pipeline(dataset, "train", BatchConfig(size=9, row_tokens=32, microbatch_rows=4, max_length=32), 0, None).step(0).batch
    for query, documents in batch_texts(dataset, batch):
        assert documents[0][1] == int(query.split()[1]) / 4
    assert (batch.samples.graded_weight, batch.samples.in_batch_weight) == (1, 0)
    e = Embeddings(*(x[jnp.arange(9) % B] for x in random_embeddings(45)))
    _, parts = total(e._replace(negatives=e.negatives[:, :1]), batch.samples, Objective())
    assert parts["graded"].value > 0 and parts["hard"].value == 0 == parts["in_batch"].value


def test_positives_in_lists_take_their_scores(tmp_path):
    rows = [{"query": f"cat {i}", "pos": [f"mat {i} {j}" for j in range(1 + i % 3)], "neg": [f"dog {i}"]} for i in range(6)]
    rows = [row | {"pos_scores": [score(i, j) for j in range(1 + i % 3)], "neg_scores": [score(i, 9)]} for i, row in enumerate(rows)]
    dataset = prepared(tmp_path, rows)
    batch = Pipeline(dataset, "train", BatchConfig(size=12, row_tokens=32, microbatch_rows=4, max_length=32), 0, None).step(0).batch
    found = list(batch_texts(dataset, batch))
    assert len(found) == 12
    for _, ((positive, first), (_, second)) in found:
        row, column = map(int, positive.split()[1:])
        np.testing.assert_allclose([first, second], [score(row, column), score(row, 9)], rtol=1e-6)


@pytest.mark.slow
def test_scores_are_part_of_what_the_data_is(tmp_path):
    """Other scores are other data, so that a run does not resume on them; a dataset without has neither table nor digest."""
    rows = listed("scores")
    plain = [{key: value for key, value in row.items() if key != "scores"} for row in rows]
    other = [row | {"scores": row["scores"] and [2 * s for s in row["scores"]]} for row in rows]
    found = [prepared(tmp_path / str(i), chosen) for i, chosen in enumerate((rows, other, plain))]
    assert len({dataset.digest for dataset in found}) == 3
    assert found[2].tables("pairs", "train").scores is None and not list((tmp_path / "2" / "data").rglob("*scores*"))


WRONG = {
    "too few": ({"scores": [1.0, 2.0]}, (), "row 0, column 'scores' has 2 scores for 1 positive and 4 negatives"),
    "a number for all": ({"score": 1.0}, (), "has 1 scores for 1 positive and 4 negatives"),
    "of more negatives": ({"scores": [1, 2, 3, 4, 5, 6]}, (), "has 6 scores for 1 positive and 4 negatives"),
    "too large": ({"scores": [1, 2, 3, 4, 1e300]}, (), "has 1e+300 among its numbers, not a finite one"),
    "decimal commas": ({"neg": [], "score": "0,5"}, {"pairs": "graded"}, "are alike (one is '0,5', no number and no list of numbers)"),
    "not finite": ({"scores": [1, 2, 3, 4, 1e999]}, (), "has inf among its numbers, not a finite one"),
    "a word": ({"scores": "high"}, (), "is 'high', no number and no list of numbers"),
    "two columns": ({"scores": [1, 2, 3, 4, 5], "pos_scores": [1]}, (), "'scores' and 'pos_scores' both hold scores"),
    "positives in lists": ({"pos": ["a", "b"], "scores": [1, 2, 3, 4, 5]}, (), "give scores as pos_scores and neg_scores"),
    "unlike positives": ({"pos": ["a", "b"], "pos_scores": [1]}, (), "has 1 scores for 2 positives"),
    "another name": ({"relevance": 3}, (), "'relevance' looks like a score and is not used; use it with --columns scores=relevance"),
    "graded or positives": (
        {"neg": [], "score": 1},
        (),
        'or positives; say which in tasks.json next to it, {"pairs": "graded"} or "retrieval"',
    ),
    "scores of lists of positives": (
        {"neg": [], "pos": ["a", "b"], "pos_scores": [1, 2]},
        (),
        "has a score (pos_scores) and no negatives, so that its rows are graded pairs, of which some are not alike, or positives; say",
    ),
    "graded, with negatives": ({"scores": [1, 2, 3, 4, 5]}, {"pairs": "graded"}, "of graded pairs and has negatives"),
    "graded, without scores": ({"neg": []}, {"pairs": "graded"}, "of graded pairs and has no scores"),
    "graded, all alike": ({"neg": [], "score": 1}, {"pairs": "graded"}, "all scores of the source 'pairs' are alike"),
}


@pytest.mark.parametrize("case", WRONG)
def test_scores_that_are_none_are_refused(case, tmp_path, capsys):
    more, tasks, message = WRONG[case]
    rows = [{"query": f"cat {i}", "pos": f"mat {i}", "neg": [f"dog {i} {n}" for n in range(4)]} | more for i in range(4)]
    for row in rows:
        if not row["neg"]:
            del row["neg"]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if tasks:
        (tmp_path / "raw" / "tasks.json").write_text(json.dumps(tasks))
    tiny.write_tokenizer(tmp_path / "tokenizer")
    command = ["--raw", tmp_path / "raw", "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "data", "--workers", 1]
    assert prepare.main(list(map(str, command))) != 0
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("read", [mining_inputs.read_pairs, retrieval.read_pairs])
@pytest.mark.parametrize("more", [{"pos": "mat", "score": 0}, {"pos": ["mat", "dog"], "pos_scores": [5, 0]}])
def test_a_pair_of_a_low_score_is_no_positive(read, more, tmp_path):
    """`mine` and `recall` take pairs for positives; where scores say that some are none, the user says which."""
    path, (column, _) = tmp_path / "a.jsonl", list(more.items())[1]
    path.write_text(json.dumps({"query": "cat", **more}) + "\n")
    with pytest.raises(UserError, match=rf"has a score \({column}\) and no negatives.*--ignore-columns {column}"):
        read(path)
    assert len(read(path, choice=ColumnChoice(ignored=(column,))).queries) == len(np.atleast_1d(more["pos"]))
    path.write_text(json.dumps({"query": "cat", "pos": "mat", "neg": ["dog"], "scores": [5, 0]}) + "\n")
    assert read(path).queries == ["cat"]


def test_a_table_of_which_one_file_has_scores(tmp_path, capsys):
    """Nothing says that its pairs are positives as those of the other file are; and a file's dots are part of the source's name."""
    (tmp_path / "raw" / "v1.2").mkdir(parents=True)
    for name, more in {"a": {}, "b": {"score": 0}}.items():
        (tmp_path / "raw" / "v1.2" / f"{name}.jsonl").write_text(json.dumps({"query": "cat", "pos": "mat", **more}) + "\n")
    tiny.write_tokenizer(tmp_path / "tokenizer")
    command = ["--raw", tmp_path / "raw", "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "data", "--workers", 1]
    assert prepare.main(list(map(str, command))) != 0
    assert '{"v1.2": "graded"}' in capsys.readouterr().err


def test_scores_behind_the_last_negative_are_nulls_or_an_error(tmp_path, capsys):
    """A row that lost a negative, though others have more: its scores are of other documents."""
    rows = [{"query": f"cat {i}", "pos": f"mat {i}", "neg": [f"dog {i} {n}" for n in range(2 - i % 2)]} for i in range(4)]
    padded = [row | {"scores": [3.0, 2.0, None if i % 2 else 1.0]} for i, row in enumerate(rows)]
    dataset = prepared(tmp_path / "padded", padded)
    np.testing.assert_array_equal(dataset.tables("pairs", "train").scores, [[3, 2, np.nan if i % 2 else 1] for i in range(4)])
    with pytest.raises(AssertionError):
        prepared(tmp_path / "shifted", [row | {"scores": [3.0, 2.0, 1.0]} for row in rows])
    assert "row 1, column 'scores' has 3 scores for 1 positive and 1 negatives" in capsys.readouterr().err


def test_a_number_is_read_alike_in_every_command():
    """Of Excel, R, SAS and sign: what `float` reads, but for Python's own spellings."""
    spelled = ["1", " 2.5 ", ".6", "+3", "05", "-1e-1"]
    read, broken = number_lists(spelled).values, number_lists(["1_0", "0,5", "10%", "NA", "true", "nan", "inf"]).broken
    assert read == [[number] for number in numbers(spelled)[0]] == [[1], [2.5], [0.6], [3], [5], [-0.1]]
    assert len(broken) == 7 and broken.keys() == numbers(["1_0", "0,5", "10%", "NA", "true", "nan", "inf"])[1].keys()


def test_invalid_scores_can_be_skipped(tmp_path):
    rows = listed("scores")
    rows[2]["scores"] = [1.0]
    dataset = prepared(tmp_path, rows, "--skip-invalid")
    assert np.isnan(dataset.tables("pairs", "train").scores).all(axis=1).tolist() == [i in (2, 5) for i in range(12)]
    assert dataset.sources["pairs"].counters["scores: has 1 scores for 1 positive and 4 negatives"] == 1


@pytest.mark.slow
def test_a_run_with_every_option_on(tmp_path):
    """Sources with scores, of graded pairs and without either, a teacher as guide, several depths: chunks of any size, the same numbers."""
    found = listed("scores") * 4
    rows = [row | {"query": f"{row['query']} {i % 7}"} for i, row in enumerate(found)]
    (tmp_path / "raw").mkdir()
    graded = [{"query": f"cat {i}", "passage": f"mat {i}", "score": i / 4} for i in range(30)]
    (tmp_path / "raw" / "tasks.json").write_text('{"graded": "graded"}')
    plain = [{"query": f"dog {i}", "passage": f"mat {i}", "negative_1": f"cat {i}"} for i in range(30)]
    for name, lines in {"scored": rows, "graded": graded, "plain": plain}.items():
        (tmp_path / "raw" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    tiny.write_tokenizer(tmp_path / "tokenizer")
    command = ["--raw", tmp_path / "raw", "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "data", "--workers", 1]
    assert prepare.main([*map(str, command), "--max-length", "32", "--validation", "0.2"]) == 0
    config = common.base("80m", runlocal=True, stage=2)
    fields = {
        "data.folder": str(tmp_path / "data"),
        "size": "toy-0.6b",
        "steps": 8,
        "loggers": (),
        "batch.size": 16,
        "batch.max_length": 32,
    }
    fields |= {"batch.row_tokens": 32, "batch.row_texts": 8, "batch.chunk_rows": 8, "batch.microbatch_rows": 8, "eval.every": 8}
    config.update_from_flattened_dict(fields)
    api.train(config, tmp_path / "teacher")
    options = {
        "guide": "relative",
        "guide_margin": 0.05,
        "hardness": 5.0,
        "focal": 0.5,
        "query_negatives": True,
        "document_negatives": True,
    }
    options |= {"positives": "joint", "scores_weight": 0.5, "graded": "angle", "layer_matryoshka": True, "matryoshka_minimum": 32}
    options |= {"in_batch_pool": "positives_and_negatives", "distillation": "scores", "distillation_weight": 0.5}
    config.update_from_flattened_dict(
        {f"objective.{name}": value for name, value in options.items()} | {"teacher": str(tmp_path / "teacher")}
    )
    runs = []
    for chunk in (8, 32):
        config.batch.update({"microbatch_rows": chunk, "chunk_rows": chunk})
        runs.append(api.train(config, tmp_path / f"run{chunk}"))
    for name in ("loss", "grad_norm", "scores", "graded", "masked_negatives", "distillation"):
        first, second = (run.values(name) for run in runs)
        assert any(first.values()) and first.keys() == second.keys(), name  # of the steps that have it
        np.testing.assert_allclose(list(first.values()), list(second.values()), rtol=1e-3, atol=1e-5, err_msg=name)
    last = runs[0].values("validation/graded")
    assert all(np.isfinite(list(last.values()))) and not runs[0].values("validation/accuracy/source/graded")
