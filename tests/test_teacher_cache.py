"""A teacher cache holds what the teacher says, resumes by whole shards, travels with the texts, and refuses what it is not of."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from f2llm_jax import cache_teacher as command
from f2llm_jax.data import teacher_cache
from f2llm_jax.data.pipeline import BatchConfig, Pipeline
from f2llm_jax.data.teacher_cache import TeacherCache, TeacherCacheError
from f2llm_jax.inference.encode import TextEncoder
from f2llm_jax.release import hf_folder
from f2llm_jax.storage import files
from f2llm_jax.storage.vectors import VectorStore
from f2llm_jax.teachers.fill import fill_cache
from f2llm_jax.teachers.own import OwnTeacher
from f2llm_jax.text import truncate

MAX_LENGTH, DIMS, SHARD = 12, 48, 512


@pytest.fixture(scope="module")
def dataset(small_dataset):
    return small_dataset


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    return tiny.origin(tmp_path_factory.mktemp("teacher"))  # small_data is prepared with the same tokenizer


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(teacher_cache, "SHARD_TEXTS", SHARD)


def fill(origin, dataset, out, **options):
    options = {"dims": DIMS, "max_length": MAX_LENGTH, "dtype": "float32", **options}
    return fill_cache(OwnTeacher(origin, dataset, MAX_LENGTH), dataset, out, **options)


def test_vectors_are_the_teachers(tmp_path, origin, dataset, small_shards):
    """For every stored text, cut to the first dims, whatever order is asked for."""
    fill(origin, dataset, tmp_path)
    cache = TeacherCache(tmp_path, dataset, MAX_LENGTH, student_width=32)
    encoder = TextEncoder(origin.config, origin.load(None), origin.tokenizer, MAX_LENGTH)
    for source in dataset.sources.values():
        for split, texts in (("corpus", source.documents), ("train", source.rows["train"])):
            wanted = np.random.default_rng(0).integers(0, texts, 50)
            ids = [truncate(i, MAX_LENGTH, dataset.eos_id) for i in dataset.reader(source.name, split).read(wanted)]
            np.testing.assert_allclose(cache.read(source.name, split, wanted), encoder.encode_ids(ids)[:, :DIMS], atol=2e-5)


def test_a_batch_carries_its_vectors(tmp_path, origin, dataset, small_shards):
    """Slot by slot those of the very texts that are packed, on one device and on eight."""
    fill(origin, dataset, tmp_path)
    cache = TeacherCache(tmp_path, dataset, MAX_LENGTH, student_width=DIMS)
    encoder = TextEncoder(origin.config, origin.load(None), origin.tokenizer, MAX_LENGTH)
    config = BatchConfig(size=8, row_tokens=16, microbatch_rows=8, max_length=MAX_LENGTH, negatives={"retrieval": 2})
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
    alone, spread = (Pipeline(dataset, "train", config, 0, m, teacher=cache).step(0).batch for m in (None, mesh))
    np.testing.assert_array_equal(alone.teacher, spread.teacher)
    texts, S = alone.texts, alone.text_count
    samples = alone.samples.sample_mask.shape[0]
    seen = 0
    for c, m, x in zip(*np.nonzero(np.asarray(texts.text) < S), strict=True):
        text, segment = int(texts.text[c, m, x]), np.asarray(texts.segment_ids[c, m]) == x + 1
        want = encoder.encode_ids([np.asarray(texts.token_ids[c, m])[segment]])[0, :DIMS]
        role, b = divmod(text, samples)
        b, slot = (b, role) if role < 2 else np.add(divmod(text - 2 * samples, S // samples - 2), (0, 2))
        np.testing.assert_allclose(alone.teacher[b, slot], want, atol=2e-5)
        seen += 1
    assert seen > samples
    absent = np.asarray(alone.samples.negative_mask) == 0
    assert (np.asarray(alone.teacher)[:, 2:][absent] == 0).all()


def test_an_interrupted_run_encodes_no_shard_twice(tmp_path, origin, dataset, small_shards, monkeypatch):
    written = []
    write = VectorStore.write

    def dying(store, name, vectors):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(name)
        write(store, name, vectors)

    monkeypatch.setattr(VectorStore, "write", dying)
    with pytest.raises(KeyboardInterrupt):
        fill(origin, dataset, tmp_path)
    with pytest.raises(TeacherCacheError, match="no complete teacher cache"):
        TeacherCache(tmp_path, dataset, MAX_LENGTH, 8)
    with pytest.raises(TeacherCacheError, match="lacks"):
        teacher_cache.finish(tmp_path, dataset)
    monkeypatch.setattr(VectorStore, "write", lambda store, name, vectors: (written.append(name), write(store, name, vectors)))
    fill(origin, dataset, tmp_path)
    assert len(written) == len(set(written)) == len(teacher_cache.shards(dataset))
    teacher_cache.finish(tmp_path, dataset)


def test_a_cache_of_something_else_is_refused(tmp_path, origin, dataset):
    fill(origin, dataset, tmp_path / "c")
    teacher_cache.finish(tmp_path / "c", dataset)
    with pytest.raises(TeacherCacheError, match=f"keeps {DIMS} dims, fewer than the student's 49"):
        TeacherCache(tmp_path / "c", dataset, MAX_LENGTH, 49)
    with pytest.raises(TeacherCacheError, match=f"truncated at {MAX_LENGTH} tokens, this run truncates at 13"):
        TeacherCache(tmp_path / "c", dataset, 13, 8)
    with pytest.raises(TeacherCacheError, match="--dims 65 must be between 1 and the teacher's width 64"):
        fill(origin, dataset, tmp_path / "d", dims=65)
    with pytest.raises(TeacherCacheError, match="another tokenizer"):
        fill(origin, dataclasses.replace(dataset, tokenizer_fingerprint="0"), tmp_path / "e")
    with pytest.raises(TeacherCacheError, match="dtype 'float32' "):
        fill(origin, dataset, tmp_path / "c", dtype="float16")
    content = files.read_json(tmp_path / "c" / "cache.json", sealed=True) | {"data": "0"}
    files.write_json(tmp_path / "c" / "cache.json", content, sealed=True)
    with pytest.raises(TeacherCacheError, match="made from other data"):
        TeacherCache(tmp_path / "c", dataset, MAX_LENGTH, 8)


def test_the_command_ends_in_a_cache_that_opens(tmp_path, origin, dataset, capsys):
    hf_folder.export(origin, tmp_path / "model", hf_folder.ReleaseForm(golden=False))
    flags = ["--model", str(tmp_path / "model"), "--data", str(dataset.folder), "--out", str(tmp_path / "cache"), "--max-length", "12"]
    assert command.main([*flags, "--dims", "99"]) == 1
    assert "cache_teacher: error: --dims 99" in capsys.readouterr().err
    assert command.main([*flags, "--dims", "16"]) == 0
    cache = TeacherCache(tmp_path / "cache", dataset, MAX_LENGTH, 16)
    assert cache.content.dtype == "float16" and cache.content.width == 16


def test_caches_are_named_with_commas_between_them(tmp_path):
    (tmp_path / "a,b").mkdir()
    named = f"{tmp_path}/a,b"
    assert teacher_cache.cache_folders(named) == [f"{tmp_path}/a", "b"]
    (tmp_path / "a,b" / "cache.json").touch()
    assert teacher_cache.cache_folders(named) == [named]
    assert teacher_cache.cache_folders("one, gs://bucket/two ,") == ["one", "gs://bucket/two"] and teacher_cache.cache_folders("") == []
