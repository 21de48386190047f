"""The benchmark within training: what it counts, against numpy; what it writes, against the saved checkpoint; the best is kept."""

import collections
import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_data
from hypothesis import given, settings
from hypothesis import strategies as st

from f2llm_jax import evaluate, sharding
from f2llm_jax.batch import Samples
from f2llm_jax.configs import stage2
from f2llm_jax.data.pipeline import BatchConfig, Pipeline
from f2llm_jax.evaluation.held_out import as_in_training
from f2llm_jax.inference.encode import load_encoder
from f2llm_jax.objectives import Embeddings, ranked_first
from f2llm_jax.release import hf_folder
from f2llm_jax.training import checkpoint
from f2llm_jax.training.run import run
from f2llm_jax.training.source_means import SourceMeans
from f2llm_jax.weights.models import find_model

pytestmark = pytest.mark.usefixtures("quick_compilation")
B, N, D = 8, 3, 8
DIMS = (2, 8)


def by_hand(embeddings, samples, dims):
    """A loop over samples and rivals, in float64."""
    query, passage, negatives = (np.asarray(e, np.float64) for e in embeddings)
    right = np.zeros((len(dims), len(query)), bool)
    for j, dim in enumerate(dims):
        for b in range(len(query)):
            rivals = [(negatives[b, n], samples.negative_ids[b, n]) for n in range(N) if samples.negative_mask[b, n]]
            if samples.in_batch_weight:
                rivals += [(passage[a], samples.passage_ids[a]) for a in range(B) if samples.sample_mask[a]]
                rivals += [(negatives[a, n], samples.negative_ids[a, n]) for a in range(B) for n in range(N) if samples.negative_mask[a, n]]
            cosine = lambda v: v[:dim] @ query[b, :dim] / np.linalg.norm(v[:dim]) / np.linalg.norm(query[b, :dim])  # noqa: B023, E731
            right[j, b] = all(cosine(v) < cosine(passage[b]) - 1e-9 for v, i in rivals if i != samples.passage_ids[b])
    return right


jitted = jax.jit(ranked_first, static_argnums=2)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), retrieval=st.booleans(), axes=st.sampled_from([None, (2, 2, 2)]))
def test_first_is_before_every_rival(seed, retrieval, axes):
    rng = np.random.default_rng(seed)
    vectors = Embeddings(*(rng.normal(size=shape).astype(np.float32) for shape in ((B, D), (B, D), (B, N, D))))
    vectors = vectors._replace(passage=vectors.query + rng.uniform(0, 3) * vectors.passage)  # so that some do come first
    samples = Samples(
        sample_mask=(rng.random(B) < 0.8).astype(np.float32),
        negative_mask=(rng.random((B, N)) < 0.7).astype(np.float32),
        in_batch_weight=np.float32(retrieval),
        passage_ids=rng.integers(0, 6, B).astype(np.int32),  # some texts are the same
        negative_ids=rng.integers(4, 40, (B, N)).astype(np.int32),
    )
    mesh = sharding.make_mesh(*axes) if axes else None
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        got = jitted(jax.tree.map(jnp.asarray, vectors), jax.tree.map(jnp.asarray, samples), DIMS)
    np.testing.assert_array_equal(got, by_hand(vectors, samples, DIMS))


def test_a_tie_is_lost():
    """A model that maps everything to one point is right nowhere."""
    same = Embeddings(jnp.ones((B, D)), jnp.ones((B, D)), jnp.ones((B, N, D)))
    ids = jnp.arange(B), B + jnp.arange(B * N).reshape(B, N)
    for weight in (0.0, 1.0):
        assert not jitted(same, Samples(jnp.ones(B), jnp.ones((B, N)), jnp.float32(weight), *ids), DIMS).any()


SETTINGS = {
    "steps": 9,
    "remat": "none",
    "batch.size": 24,
    "batch.max_length": small_data.MAX_LENGTH,
    "batch.row_tokens": small_data.MAX_LENGTH,
    "batch.row_texts": 8,
    "batch.microbatch_rows": 16,
    "objective.matryoshka_minimum": 64,
    "optimizer.learning_rate": 4e-3,
    "optimizer.warmup_steps": 2,
    "eval.every": 3,
    "log_every": 4,
    "checkpoint.every": 100,
    "checkpoint.keep": 1,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return small_data.write(tmp_path_factory.mktemp("validation"), languages=True)


def train(dataset, workdir, **more):
    config = stage2.get_config("runlocal")
    config.update_from_flattened_dict({"data.folder": str(dataset.folder), **SETTINGS, **more})
    run(config, workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return config, {line["step"]: line for line in lines if "validation/loss" in line}


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, *train(dataset, workdir, **{"checkpoint.best": "validation/accuracy/kind/retrieval"})


def test_numbers_are_those_of_the_saved_checkpoint(dataset, trained):
    """Encoded text by text from the checkpoint and ranked by hand."""
    workdir, config, found = trained
    encoder = load_encoder(find_model(str(workdir / "checkpoints" / "9")), max_length=small_data.MAX_LENGTH)
    shape = BatchConfig(**config.batch.to_dict())
    right, by_language = {}, collections.defaultdict(list)
    for name in dataset.sources:
        pipeline = Pipeline(dataset, "validation", shape, config.seed, None, [name])
        firsts = []
        for step in range(min(config.eval.batches, pipeline.plan.steps_per_epoch)):
            batch = pipeline.step(step).batch
            texts = unpacked(batch)
            vectors = np.zeros((len(texts), encoder.width), np.float32)
            present = [i for i, ids in enumerate(texts) if len(ids)]
            vectors[present] = encoder.encode_ids([texts[i] for i in present])
            b, n = batch.samples.negative_mask.shape
            embeddings = Embeddings(vectors[:b], vectors[b : 2 * b], vectors[2 * b :].reshape(b, n, -1))
            samples = jax.tree.map(np.asarray, batch.samples)
            firsts.append(ranked(embeddings, samples, (64, 128))[:, samples.sample_mask > 0])
            for language, first in zip(pipeline.languages(step), firsts[-1][-1], strict=True):
                by_language[language].append(first)
        right[name] = np.concatenate(firsts, axis=1).mean(axis=1)
    line = found[9]
    for name, accuracy in right.items():
        assert line[f"validation/accuracy/source/{name}"] == pytest.approx(accuracy[-1])
    for j, dim in enumerate((64, 128)):
        assert line[f"validation/accuracy/dim/{dim}"] == pytest.approx(np.mean([accuracy[j] for accuracy in right.values()]))
    assert set(by_language) == set(small_data.LANGUAGES)
    for language, firsts in by_language.items():
        assert line[f"validation/accuracy/language/{language}"] == pytest.approx(np.mean(firsts))
    again = as_in_training(encoder, dataset, json.loads((workdir / "config.json").read_text()), (64, 128))
    assert again == pytest.approx({name: value for name, value in line.items() if name.startswith("validation/accuracy")})
    assert line["validation/accuracy"] == line["validation/accuracy/dim/128"] > 1.2 * found[0]["validation/accuracy"]


def test_the_two_losses_apart_add_up(dataset, trained):
    """As the published trainer logs them: in-batch for retrieval alone, hard for every source, each averaged over the sources of a kind."""
    _, _, found = trained
    for line in found.values():
        hard = {name: line[f"validation/hard/source/{name}"] for name in small_data.KINDS}
        assert {name for name in line if name.startswith("validation/in_batch/source/")} == {"validation/in_batch/source/pairs"}
        assert line["validation/in_batch"] == line["validation/in_batch/kind/retrieval"] == line["validation/in_batch/source/pairs"] > 0
        for name, kind in small_data.KINDS.items():
            other = line["validation/in_batch"] if kind == "retrieval" else 0.0
            assert line[f"validation/source/{name}"] == pytest.approx(hard[name] + other)
            assert line[f"validation/hard/kind/{kind}"] == hard[name]
        assert line["validation/hard"] == pytest.approx(np.mean(list(hard.values())))


def test_losses_are_averaged_by_source_over_each_interval(dataset, trained):
    workdir, config, _ = trained
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in lines if "loss" in line}
    means = {line["step"]: line for line in lines if any(name.startswith("train/") for name in line)}
    assert list(means) == [step for step in steps if step % config.log_every == 0] == [4, 8]
    for end, line in means.items():
        interval = [steps[step] for step in range(end - config.log_every + 1, end + 1)]
        for name, kind in small_data.KINDS.items():
            mine = [step["hard"] for step in interval if step["source"] == name]
            assert line.get(f"train/hard/source/{name}") == (pytest.approx(np.mean(mine)) if mine else None)
            assert line.get(f"train/hard/kind/{kind}") == line.get(f"train/hard/source/{name}")
            assert (f"train/in_batch/source/{name}" in line) == (kind == "retrieval" and bool(mine))


def test_a_resumed_interval_is_averaged_whole():
    lines = [{"step": step, "source": "ab"[step % 2], "kind": "retrieval", "in_batch": step, "hard": 2.0 * step} for step in range(1, 9)]
    whole, cut = SourceMeans(4), SourceMeans(4, [*lines[:6], {"step": 6, "validation/loss": 1.0}])
    found = [whole.add(line["step"], line) for line in lines]
    assert [bool(means) for means in found] == [False, False, False, True] * 2
    assert found[7]["train/hard/source/a"] == 14 and found[7]["train/in_batch/kind/retrieval"] == 6.5
    assert [cut.add(line["step"], line) for line in lines[6:]] == found[6:]


def test_the_end_of_an_epoch_is_validated_and_kept(dataset, tmp_path):
    more = {"steps": 0, "epochs": 2, "eval.every": 1000, "checkpoint.merge_last": 0, "batch.size": 100, "optimizer.warmup_steps": 1}
    _, found = train(dataset, tmp_path / "run", **more)
    epoch = sum(-(-source.rows["train"] // 100) for source in dataset.sources.values())
    assert list(found) == [0, epoch, 2 * epoch]
    assert {int(folder.name) for folder in (tmp_path / "run" / "checkpoints").iterdir()} == {epoch, 2 * epoch}


def unpacked(batch):
    """The token ids of each text of a batch, in order; none for one that is absent."""
    texts = [np.empty(0, np.int32)] * batch.text_count
    token_ids, positions, last, text = (np.asarray(getattr(batch.texts, name)) for name in ("token_ids", "positions", "last", "text"))
    for chunk, row, slot in np.argwhere(text[: int(batch.texts.chunks)] < batch.text_count):
        end = last[chunk, row, slot]
        texts[text[chunk, row, slot]] = token_ids[chunk, row, end - positions[chunk, row, end] : end + 1]
    return texts


def ranked(embeddings, samples, dims):
    return np.asarray(jitted(jax.tree.map(jnp.asarray, embeddings), jax.tree.map(jnp.asarray, samples), dims))


def test_the_best_checkpoint_stays(trained):
    workdir, _, found = trained
    scores = {step: line["validation/accuracy/kind/retrieval"] for step, line in found.items()}
    best = max(scores, key=lambda step: (scores[step], step))
    kept = {int(folder.name) for folder in (workdir / "checkpoints").iterdir()}
    assert list(found) == [0, 3, 6, 9] and kept == {best, 9}


def test_a_lower_loss_is_better_and_names_are_checked():
    found = {"validation/loss": 2.0, "validation/kind/retrieval": 3.0, "validation/accuracy": 0.5, "validation/accuracy/dim/8": 0.25}
    assert checkpoint.score("validation/loss", found) == {"score": -2.0}
    assert checkpoint.score("validation/kind/retrieval", found) == {"score": -3.0}
    assert checkpoint.score("validation/accuracy/dim/8", found) == {"score": 0.25}
    assert checkpoint.score("", found) is None and checkpoint.score("validation/loss", {}) is None
    with pytest.raises(ValueError, match="no metric of a validation; take for example validation/accuracy"):
        checkpoint.score("validation/acuracy", found)


def test_evaluate_repeats_the_benchmark(trained, tmp_path, capsys):
    workdir, _, found = trained
    assert evaluate.main(["--model", str(workdir / "checkpoints" / "9"), "--held-out"]) == 0
    printed = dict(line.rsplit(None, 1) for line in capsys.readouterr().out.splitlines())
    logged = {name: value for name, value in found[9].items() if name.startswith("validation/accuracy")}
    assert {name: float(value) for name, value in printed.items()} == pytest.approx(logged, abs=5e-5)
    hf_folder.export(find_model(str(workdir)), tmp_path / "model", hf_folder.ReleaseForm(golden=False))
    assert evaluate.main(["--model", str(tmp_path / "model"), "--held-out"]) == 1
    assert "is no workdir and no checkpoint" in capsys.readouterr().err
