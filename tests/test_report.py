"""The page of runs: complete, self-contained, well-formed; and what its pictures show is what was recorded."""

import dataclasses
import html.parser
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from f2llm_jax import report
from f2llm_jax.inference.encode import TextEncoder
from f2llm_jax.model.decoder import init_decoder
from f2llm_jax.reporting import charts
from f2llm_jax.reporting.embedding_sample import principal_plane, sample_embeddings
from f2llm_jax.reporting.run_record import RunRecord
from f2llm_jax.storage.files import write_json
from f2llm_jax.training import checkpoint
from f2llm_jax.training.step import TrainState

STEPS = 30


@pytest.fixture(scope="module")
def dataset(small_dataset):
    return small_dataset


@pytest.fixture(scope="module")
def params():
    return init_decoder(tiny.CONFIG, 0)


def validation(step, accuracy):
    by_dim = {f"validation/accuracy/dim/{dim}": accuracy * share for dim, share in ((8, 0.5), (16, 0.75), (64, 1.0))}
    by_source = {f"validation/accuracy/source/{name}": accuracy for name in ("a & b", "c")}
    return {"step": step, "validation/loss": 3 - accuracy, "validation/accuracy": accuracy, **by_dim, **by_source}


def write_run(workdir, dataset, params, *, distilled=False):
    workdir.mkdir(parents=True)
    more = {"distillation": 0.5, "weighted/distillation": 0.5} if distilled else {}
    steps = [
        {"step": i, "source": "a & b", "loss": 9 / i, "hard": 3 / i, "in_batch": 6 / i, "grad_norm": 1.0, "learning_rate": 1e-3} | more
        for i in range(1, STEPS + 1)
    ]
    lines = [validation(0, 0.25), *steps, validation(STEPS, 0.75)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 31, "lo')
    rates = {"tokens_per_second": 100.0, "steps_per_second": 2.0, "token_efficiency": 0.9, "input_wait_seconds": 0.01}
    (workdir / "timings.jsonl").write_text("".join(json.dumps({"step": i, **rates}) + "\n" for i in range(1, STEPS + 1)))
    write_json(workdir / "config.json", {"data": {"folder": str(dataset.folder)}}, sealed=True)
    (workdir / "dataset.json").write_text((dataset.folder / "dataset.json").read_text())
    write_json(workdir / "environment.json", {"commit": "0123456789abcdef"}, sealed=True)
    dataset.tokenizer().save(workdir / "tokenizer")
    checkpoints = checkpoint.open_checkpoints(workdir / "checkpoints", checkpoint.CheckpointConfig(every=1, keep=1))
    facts = {"tokenizer_fingerprint": dataset.tokenizer_fingerprint, "max_length": 48, "matryoshka_dims": (8, 16, 64)}
    state = TrainState(jnp.int32(STEPS), params, {"count": jnp.int32(STEPS)})
    checkpoint.save(checkpoints, STEPS, state, {"decoder": dataclasses.asdict(tiny.CONFIG), **facts})
    checkpoints.close()
    return workdir


@pytest.fixture(scope="module")
def runs(dataset, params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [write_run(folder / "one" / "stage2", dataset, params), write_run(folder / "two" / "stage2", dataset, params, distilled=True)]


class Outline(html.parser.HTMLParser):
    """Tags that were left open, ids, what is loaded from elsewhere, and the text."""

    VOID = ("meta", "path", "use", "rect", "circle", "line", "image", "br")

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.loaded, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self._attributes(attrs)

    def handle_startendtag(self, tag, attrs):
        self._attributes(attrs)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def _attributes(self, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href") and not value.startswith("#"):
                self.loaded.append(value)


def test_the_page_is_whole_and_needs_nothing(runs, tmp_path, capsys):
    assert report.main([*map(str, runs), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    outline = Outline()
    outline.feed(page)
    assert outline.open == [] and outline.loaded == [] and "@import" not in page and "url(http" not in page
    assert len(set(outline.ids)) == len(outline.ids)
    referred = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page))
    assert referred and referred <= set(outline.ids)
    assert charts.INK not in page and "currentColor" in page and "prefers-color-scheme: dark" in page
    text = " ".join(outline.text)
    for part in ("one/stage2 · two/stage2", "25.00% → 75.00%", "2.75 → 2.25", "0123456789ab", "a & b", "Distillation"):
        assert part in text, part
    names = {file.stem for file in (tmp_path / "out").glob("*.png")}
    assert {"loss", "widths", "sources", "distillation", "throughput", "similarities-0", "map-1", "input_wait"} <= names
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in (tmp_path / "out").glob("*.png"))
    assert "spread_out" not in names  # nothing was recorded of it


def test_a_report_may_be_replaced_and_nothing_else(runs, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "precious").mkdir(parents=True)
    assert report.main([str(runs[0]), "--out", str(out)]) == 1
    assert "not known to be f2llm_jax's" in capsys.readouterr().err and (out / "precious").exists()
    for _ in range(2):
        assert report.main([str(runs[0]), "--out", str(tmp_path / "again")]) == 0


def test_what_is_missing_is_said(runs, tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 1
    assert "has no metrics.jsonl" in capsys.readouterr().err
    assert report.main([str(runs[0]), str(runs[0]), "--out", str(tmp_path / "out")]) == 1
    assert "given twice" in capsys.readouterr().err
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text((runs[0] / "metrics.jsonl").read_text())
    assert report.main([str(bare), "--out", str(tmp_path / "out")]) == 0
    assert "No picture of the space of bare" in (tmp_path / "out" / "report.html").read_text()


def test_a_glance_is_the_models_cosines(dataset, params):
    encoder = TextEncoder(tiny.CONFIG, params, dataset.tokenizer(), 48)
    glance = sample_embeddings(encoder, dataset)
    positives, negatives, start = [], [], 0
    for name, source in dataset.sources.items():
        documents = dataset.tables(name, "validation").documents[:, :4]
        assert glance.source[start : start + len(documents)] == [name] * source.rows["validation"]
        start += len(documents)
        queries = encoder.encode_ids([np.array(ids) for ids in dataset.reader(name, "validation").read(range(len(documents)))])
        for query, row in zip(queries, documents, strict=True):
            found = encoder.encode_ids([np.array(ids) for ids in dataset.reader(name, "corpus").read(row[row >= 0])])
            cosines = found @ query / np.linalg.norm(found, axis=1) / np.linalg.norm(query)
            positives.append(cosines[0])
            negatives += cosines[1:].tolist()
    np.testing.assert_allclose(glance.positive_cosine, positives, atol=1e-5)
    np.testing.assert_allclose(glance.negative_cosine, negatives, atol=1e-5)
    nearer = np.mean(np.asarray(positives)[:, None] > np.asarray(negatives)[None, :])
    assert glance.separation == pytest.approx(nearer, abs=1e-3)


def test_the_plane_holds_the_most_variance():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 5)) * [0.1, 3, 0.1, 2, 0.1] + 7
    plane = principal_plane(vectors)
    assert plane.shape == (200, 2) and plane[:, 0].std() > plane[:, 1].std()
    np.testing.assert_allclose(plane.var(axis=0).sum(), np.sort(np.linalg.eigvalsh(np.cov(vectors.T, ddof=0)))[-2:].sum(), rtol=1e-9)
    np.testing.assert_allclose(plane, principal_plane(vectors.copy()))


def test_few_languages_are_named_and_many_are_sorted_bars():
    def run(count):
        line = {f"validation/accuracy/language/l{i:03}": (i * 37 % count) / count for i in range(count)}
        sources = [{"name": "a", "languages": {f"l{i:03}": count - i for i in range(count)}}]
        return RunRecord(name="run", sources=sources, metrics=[{"step": 1, "validation/loss": 1.0, **line}])

    few = charts.by_language([run(9)]).axes[0]
    assert [label.get_text() for label in few.get_yticklabels()][-1] == "l000"
    many = charts.by_language([run(90)]).axes[0]
    heights = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in many.patches}
    assert [heights[i] for i in range(90)] == sorted(heights.values())
    scarce = [bar for bar in many.patches if bar.get_facecolor() == many.containers[1][0].get_facecolor()]
    assert len(scarce) == 30 and "fewest training rows" in many.get_legend().get_texts()[1].get_text()
    assert charts.by_language([RunRecord(name="none")]) is None


def test_smoothing_starts_at_the_first_value():
    assert charts.smoothed([5.0, 5.0, 5.0]) == pytest.approx([5.0, 5.0, 5.0])
    assert charts.smoothed([1.0, 0.0])[0] == 1.0 and charts.smoothed([1.0, 0.0])[1] == pytest.approx(0.95 * 0.05 / (0.05 + 0.95 * 0.05))
