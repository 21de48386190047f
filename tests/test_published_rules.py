"""The data path against the published rules: from the files of the release, by the README's commands, to the texts of an epoch."""

import re

import jax
import numpy as np
import published_rules
import pytest
import release_rehearsal
import tiny

from f2llm_jax import prepare
from f2llm_jax.data import records
from f2llm_jax.data.order import Sampling
from f2llm_jax.data.pipeline import BatchConfig, Pipeline

pytestmark = [pytest.mark.filterwarnings(f"ignore:::{module}") for module in ("tensorflow_datasets", "apache_beam")]
BATCH = 8
CAPS = {1: 0, 2: 60}


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    tiny.write_tokenizer(folder / "tokenizer")
    release_rehearsal.write(folder / "raw")
    return folder


def prepared(release, stage, name, *flags):
    command = ["--raw", release / "raw", "--tokenizer", release / "tokenizer", "--out", release / name, "--stage", stage, "--workers", 1]
    assert prepare.main([str(part) for part in (*command, "--cap", CAPS[stage], *flags)]) == 0
    return records.load_dataset(release / name)


@pytest.fixture(scope="module", params=[1, 2])
def dataset(release, request):
    return prepared(release, request.param, f"stage{request.param}")


def texts_of(batch, decode):
    """The texts of a batch as `published_rules` wants them, read back from the packed rows."""
    packed = jax.tree.map(np.asarray, batch.texts)
    found = {}
    for place in np.argwhere(packed.text[: packed.chunks] < batch.text_count):
        chunk, row, _ = place
        last = packed.last[tuple(place)]
        ids = packed.token_ids[chunk, row, last - packed.positions[chunk, row, last] : last + 1]
        found[int(packed.text[tuple(place)])] = decode(ids[:-1].tolist())
    B, N = batch.samples.negative_mask.shape
    negatives = lambda b: [found[2 * B + b * N + n] for n in range(N) if batch.samples.negative_mask[b, n]]  # noqa: E731
    return bool(batch.samples.in_batch_weight), [(found[b], found[B + b], negatives(b)) for b in range(B) if batch.samples.sample_mask[b]]


def an_epoch(dataset, epoch=0, split="train", order="published", **batch):
    config = BatchConfig(size=BATCH, row_tokens=128, microbatch_rows=8, max_length=128, **batch)
    pipeline = Pipeline(dataset, split, config, seed=0, mesh=None, sampling=Sampling(order=order))
    decode = dataset.tokenizer().decode
    steps = range(epoch * pipeline.plan.steps_per_epoch, (epoch + 1) * pipeline.plan.steps_per_epoch)
    return [texts_of(pipeline.step(step).batch, decode) for step in steps]


def held_out(dataset):
    return {query for _, samples in an_epoch(dataset, split="validation") for query, _, _ in samples}


def check(release, dataset, batches, repeated_negatives=False):
    return published_rules.check(
        release / "raw",
        dataset.stage,
        batches,
        batch_size=BATCH,
        cap=CAPS[dataset.stage],
        held_out=held_out(dataset),
        repeated_negatives=repeated_negatives,
    )


def test_an_epoch_follows_the_published_rules(release, dataset):
    for epoch in range(2):
        found = check(release, dataset, an_epoch(dataset, epoch))
        own = {source.name for source in dataset.sources.values()}
        if dataset.stage == 1:
            stems = {stem for stem in release_rehearsal.FILES if stem.startswith(published_rules.STAGE_1)}
            assert found["files"] == stems and len(own) == len(stems)
        else:
            assert found["files"] == {*release_rehearsal.FILES, "mela"}
            assert {"mela", "scala", "dala"} <= found["units"].keys() and found["units"]["scala"] == CAPS[2]
            assert CAPS[2] - 1 <= found["units"]["paracrawl"] <= CAPS[2]  # three files of 40 rows, one with an empty positive
        assert sum(found["steps"].values()) == sum(-(-s.rows["train"] // BATCH) for s in dataset.sources.values() if s.rows["train"])
        many = [columns for stem, columns in found["columns"].items() if published_rules.kind_of(stem) != "classification"]
        assert set().union(*many) == set(range(24))


def test_the_file_decides_the_batch_and_the_unit_the_cap(dataset):
    units = {}
    for source in dataset.sources.values():
        units.setdefault(source.unit, []).append(sum(source.rows.values()) + source.skipped)
    assert all(sum(counts) <= (CAPS[dataset.stage] or 10**9) for counts in units.values())
    assert len(units["paracrawl"]) == 3 and len(units["ocgi"]) == 2
    if dataset.stage == 2:
        kinds = [source.kind for source in dataset.sources.values()]
        assert (kinds.count("clustering"), kinds.count("classification")) == (2, 4)
        assert dataset.sources["fiqa2018"].unit == "fiqa2018"


def test_known_oddities_are_counted_and_a_flag_turns_recognition_off(release, tmp_path, capsys):
    prepared(release, 1, "again")
    told = capsys.readouterr()
    assert "8 files have names of the F2LLM-v2 release" in told.err
    assert re.search(r"rows: passage is empty: 2\b", told.out) and re.search(r"negatives: is null: 2\b", told.out)
    release_rehearsal.write(tmp_path / "raw", files=("webfaq_kor", "squad"), mela=False)
    flags = ["--raw", tmp_path / "raw", "--tokenizer", release / "tokenizer", "--out", tmp_path / "none", "--catalogue", "none"]
    assert prepare.main([str(part) for part in (*flags, "--stage", 1)]) == 1
    assert "give it a text or drop the row" in capsys.readouterr().err


def test_the_published_recipe_keeps_what_repeats_and_adds_no_instruction(release):
    dataset = prepared(release, 2, "published", "--recipe", "published")
    found = check(release, dataset, an_epoch(dataset, single_negative="first"), repeated_negatives=True)
    assert found["files"] == {*release_rehearsal.FILES, "mela"}
    assert not any("repeats" in reason or "positive" in reason for source in dataset.sources.values() for reason in source.counters)


VIOLATIONS = {
    "a sample of another file": lambda batches: swap(batches, 0, 1),
    "a row twice": lambda batches: [*batches, batches[0]],
    "a row less": lambda batches: batches[1:],
    "another positive": lambda batches: [(weight, [(q, "else", n) for q, _, n in samples]) for weight, samples in batches],
    "a negative less": lambda batches: [(weight, [(q, p, n[1:]) for q, p, n in samples]) for weight, samples in batches],
    "no in-batch negatives": lambda batches: [(False, samples) for _, samples in batches],
}


def swap(batches, one, other):
    """Puts the first sample of a batch into the first batch of another file."""
    files = [file_of(batch) for batch in batches]
    other = next(i for i, name in enumerate(files) if name != files[one])
    batches = [(weight, list(samples)) for weight, samples in batches]
    batches[one][1][0], batches[other][1][0] = batches[other][1][0], batches[one][1][0]
    return batches


def file_of(batch):
    return batch[1][0][0].split(" q")[0]


@pytest.mark.parametrize("name", VIOLATIONS)
def test_the_referee_sees(name, release, dataset):
    with pytest.raises(AssertionError):
        check(release, dataset, VIOLATIONS[name](an_epoch(dataset)))
