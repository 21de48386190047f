"""Held-out figures of graded pairs and of scores: while training, of a finished model, and on the run's page."""

import json

import numpy as np
import pytest
import scipy.stats
import tiny

from f2llm_jax import api, evaluate, prepare, recall, report
from f2llm_jax.configs import common
from f2llm_jax.data.pipeline import BatchConfig, Pipeline
from f2llm_jax.data.records import load_dataset
from f2llm_jax.evaluation.held_out import accuracies
from f2llm_jax.inference.encode import load_encoder
from f2llm_jax.training import checkpoint
from f2llm_jax.training.validation import rank_correlation
from f2llm_jax.weights.models import find_model

pytestmark = [pytest.mark.filterwarnings(f"ignore:::{module}") for module in ("tensorflow_datasets", "apache_beam")]
WIDTHS = (32, 64)
ROWS = 60


def written(folder, sources):
    """Prepares sources of JSON lines, a third of each held out."""
    (folder / "raw").mkdir(parents=True)
    for name, rows in sources.items():
        (folder / "raw" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "raw" / "tasks.json").write_text(json.dumps({name: "graded" for name in sources if name != "scored"}))
    tiny.write_tokenizer(folder / "tokenizer")
    given = {"--raw": folder / "raw", "--tokenizer": folder / "tokenizer", "--out": folder / "data", "--max-length": 32, "--workers": 1}
    assert prepare.main([*(str(word) for pair in given.items() for word in pair), "--validation", "0.35"]) == 0
    return load_dataset(folder / "data")


def graded(start):
    return [{"query": f"the cat {start + i} sat", "passage": f"a mat {i % 9} " * (1 + i % 4), "score": i % 6} for i in range(ROWS)]


def run(dataset, workdir, **more):
    config = common.base("80m", runlocal=True, stage=2)
    fields = {"data.folder": str(dataset.folder), "size": "toy-0.6b", "steps": 2, "loggers": (), "remat": "none", "batch.size": 8}
    fields |= {"batch.max_length": 32, "batch.row_tokens": 32, "batch.row_texts": 8, "batch.chunk_rows": 8, "batch.microbatch_rows": 8}
    fields |= {"eval.every": 2, "objective.matryoshka_minimum": WIDTHS[0]}
    config.update_from_flattened_dict(fields | more)
    return api.train(config, workdir)


def oracle(encoder, dataset, source, dim):
    """SciPy's correlation, from vectors of texts encoded one by one."""
    tables = dataset.tables(source, "validation")
    cosines = []
    for row, (document, *_) in enumerate(np.asarray(tables.documents)):
        ids = dataset.reader(source, "validation").read([row]) + dataset.reader(source, "corpus").read([document])
        a, b = (encoder.encode_ids([one])[0, :dim].astype(np.float64) for one in ids)
        cosines.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    return scipy.stats.spearmanr(cosines, np.asarray(tables.scores)[:, 0]).statistic


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on nothing but graded pairs, of two sources, as sentence-transformers' users have it."""
    folder = tmp_path_factory.mktemp("graded")
    dataset = written(folder, {"sts": graded(0), "sick": graded(100)})
    return dataset, folder / "run", run(dataset, folder / "run", **{"checkpoint.best": "validation/spearman", "objective.graded": "angle"})


@pytest.mark.slow
def test_while_training_and_after(trained, tmp_path, capsys):
    dataset, workdir, record = trained
    line = record.validations[-1]
    encoder = load_encoder(find_model(str(workdir)), max_length=32)
    widths = sorted(int(name.rsplit("/", 1)[1]) for name in line if name.startswith("validation/spearman/dim/"))
    assert len(widths) > 1 and widths[-1] == encoder.width
    want = {(name, dim): oracle(encoder, dataset, name, dim) for name in dataset.sources for dim in widths}
    for name in dataset.sources:
        assert line[f"validation/spearman/source/{name}"] == pytest.approx(want[name, widths[-1]], abs=1e-6)
    for dim in widths:
        assert line[f"validation/spearman/dim/{dim}"] == pytest.approx(np.mean([want[name, dim] for name in dataset.sources]), abs=1e-6)
    assert line["validation/spearman"] == line["validation/spearman/kind/graded"] == line[f"validation/spearman/dim/{widths[-1]}"]
    assert not [name for name in line if "accuracy" in name]
    assert evaluate.main(["--model", str(workdir), "--held-out"]) == 0
    printed = dict(line.rsplit(None, 1) for line in capsys.readouterr().out.splitlines())
    assert {name: float(value) for name, value in printed.items()} == pytest.approx(
        {name: value for name, value in line.items() if "spearman" in name}, abs=5e-5
    )
    flags = ["--model", str(workdir), "--data", str(dataset.folder), "--dims", f"{widths[0]},full", "--json", str(tmp_path / "found.json")]
    assert recall.main(flags) == 0
    assert "sts, held out: " in (out := capsys.readouterr().out) and "graded pairs" in out and "recall@" not in out
    (found,) = json.loads((tmp_path / "found.json").read_text()).values()
    for name in dataset.sources:
        for dim, width in (("full", widths[-1]), (str(widths[0]), widths[0])):
            assert found[name][dim] == {"spearman": pytest.approx(want[name, width], abs=1e-6)}
    assert accuracies(encoder, dataset) == {}


def angle_loss(encoder, dataset, source, config):
    """The loss of AnglE (arXiv 2309.12871) over batches of held-out pairs, in float64."""
    pipeline, losses = Pipeline(dataset, "validation", BatchConfig(**config["batch"]), config["seed"], None, [source]), []
    tables = dataset.tables(source, "validation")
    for step in range(pipeline.plan.steps_per_epoch):
        rows = pipeline.planned(step).plan.rows
        queries, passages = (
            encoder.encode_ids(dataset.reader(source, split).read(numbers)).astype(np.float64)
            for split, numbers in (("validation", rows), ("corpus", np.asarray(tables.documents)[rows, 0]))
        )
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, passages))
        half, grades = a.shape[1] // 2, np.asarray(tables.scores)[rows, 0]
        product = ((a[:, :half] + 1j * a[:, half:]) * (b[:, :half] - 1j * b[:, half:])).sum(axis=1)
        s = np.abs(product.real + product.imag) / config["objective"]["temperature"]
        higher = grades[:, None] > grades[None, :]
        losses.append(np.log1p(np.exp(s[None, :] - s[:, None])[higher].sum()))
    return np.mean(losses)


@pytest.mark.slow
def test_the_held_out_loss_is_the_one_that_is_trained(trained):
    """AnglE where AnglE is chosen, and not the default."""
    dataset, workdir, record = trained
    encoder = load_encoder(find_model(str(workdir)), max_length=32)
    config, line = json.loads((workdir / "config.json").read_text()), record.validations[-1]
    for name in dataset.sources:
        assert line[f"validation/graded/source/{name}"] == pytest.approx(angle_loss(encoder, dataset, name, config), rel=1e-4)


@pytest.mark.slow
def test_the_page_of_a_run_without_accuracies(trained, tmp_path):
    assert report.main([str(trained[1]), "--out", str(tmp_path / "page")]) == 0


@pytest.mark.slow
def test_the_loss_on_held_out_scores_is_that_of_training(tmp_path):
    """In a run on scores and graded pairs; without a weight there is no such figure."""
    scored = [{"query": f"cat {i}", "pos": f"mat {i}", "neg": [f"dog {i}", f"mat {i} dog"], "scores": [3, i % 3, 1]} for i in range(ROWS)]
    dataset = written(tmp_path, {"sts": graded(0), "scored": scored})
    line = run(dataset, tmp_path / "run", **{"objective.scores_weight": 0.5}).validations[-1]
    assert line["validation/scores"] == line["validation/scores/source/scored"] > 0
    assert line["validation/accuracy"] == line["validation/accuracy/source/scored"] and line["validation/spearman/source/sts"]
    assert line["validation/source/scored"] == pytest.approx(line["validation/in_batch"] + line["validation/hard"])


def test_ranks_are_shared_by_equals():
    rng = np.random.default_rng(0)
    for _ in range(20):
        cosines, grades = rng.integers(0, 9, 30) / 9, rng.integers(0, 5, 30).astype(np.float32)
        assert rank_correlation(cosines, grades) == pytest.approx(scipy.stats.spearmanr(cosines, grades).statistic)
    grades[:4] = np.nan
    assert rank_correlation(cosines, grades) == pytest.approx(scipy.stats.spearmanr(cosines[4:], grades[4:]).statistic)
    assert all(map(np.isnan, (rank_correlation(cosines, np.ones(30)), rank_correlation(cosines[:1], grades[-1:]))))


def test_a_higher_correlation_is_better():
    found = {"validation/spearman": 0.25, "validation/spearman/source/sts": -0.5}
    assert [checkpoint.score(name, found) for name in found] == [{"score": 0.25}, {"score": -0.5}]
