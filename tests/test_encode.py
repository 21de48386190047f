"""Encoding, embedding and retrieval: order, row lengths, prompts, files and errors."""

import json
import threading

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from f2llm_jax import embed, recall, sharding
from f2llm_jax.errors import UserError
from f2llm_jax.evaluation.retrieval import hits_at_1, read_pairs
from f2llm_jax.inference import encode as encoding
from f2llm_jax.inference.encode import TextEncoder, load_encoder, truncate_and_normalize
from f2llm_jax.release import hf_folder
from f2llm_jax.text import query_prompt
from f2llm_jax.weights.embedding_config import DEFAULT_PROMPTS


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    return tiny.origin(tmp_path_factory.mktemp("encode"))


@pytest.fixture(scope="module")
def encoder(origin):
    return load_encoder(origin)


@pytest.fixture(scope="module")
def folder(origin, tmp_path_factory):
    out = tmp_path_factory.mktemp("release") / "model"
    hf_folder.export(origin, out, hf_folder.ReleaseForm(golden=False))
    return out


def test_each_text_gets_its_own_vector_whatever_stands_beside_it(encoder):
    together = encoder.encode(tiny.TEXTS)
    alone = np.concatenate([encoder.encode([text]) for text in tiny.TEXTS])
    assert together.dtype == np.float32 and together.shape == (len(tiny.TEXTS), 64)
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-4)
    np.testing.assert_allclose(together[0], together[5], rtol=0, atol=1e-4)  # the same text twice
    assert np.abs(together - together[0]).max(axis=1)[1:5].min() > 0.1
    assert encoder.encode([]).shape == (0, 64)


def test_vectors_are_raw(encoder):
    norms = np.linalg.norm(encoder.encode(tiny.TEXTS), axis=1)
    assert norms.min() > 2  # the final norm leaves about sqrt(64)


def test_a_prompt_stands_before_every_text(encoder):
    prompt = query_prompt("Find it.")
    np.testing.assert_allclose(encoder.encode(tiny.TEXTS, prompt), encoder.encode([prompt + t for t in tiny.TEXTS]), rtol=0, atol=1e-5)


def test_row_lengths_blocks_and_chunks_do_not_show(origin, monkeypatch):
    """Long texts take longer rows; nothing of the shapes can be seen in the vectors."""
    texts = [f"{i} " * (i % 23) for i in range(60)] + tiny.TEXTS
    plain = load_encoder(origin, max_length=200)
    want = plain.encode(texts)
    monkeypatch.setattr(encoding, "ROW_TOKENS", (16, 64))
    monkeypatch.setattr(encoding, "BLOCK_TEXTS", 17)
    seen, programs = [], encoding._program._cache_size()
    small = load_encoder(origin, max_length=200, chunk_tokens=64)
    np.testing.assert_allclose(small.encode(texts, report=lambda *done: seen.append(done)), want, rtol=0, atol=1e-4)
    assert seen == [(17, 69), (34, 69), (51, 69), (68, 69), (69, 69)]
    assert encoding._program._cache_size() == programs + 3  # one program a row length, however many chunks


def test_the_next_block_is_tokenised_while_this_one_is_encoded(origin, monkeypatch):
    tokenised, second, kind = [], threading.Event(), type(origin.tokenizer)
    encode, encode_ids = kind.encode, TextEncoder.encode_ids

    def recorded(self, texts, max_length):
        tokenised.append(list(texts))
        if len(tokenised) == 2:
            second.set()
        return encode(self, texts, max_length)

    def waits(self, ids):
        assert second.wait(60)  # for ever, if the second block were tokenised after the first is encoded
        return encode_ids(self, ids)

    want = load_encoder(origin).encode(tiny.TEXTS[:6], "Q: ")
    monkeypatch.setattr(encoding, "BLOCK_TEXTS", 2)
    monkeypatch.setattr(kind, "encode", recorded)
    monkeypatch.setattr(TextEncoder, "encode_ids", waits)
    np.testing.assert_allclose(load_encoder(origin).encode(tiny.TEXTS[:6], "Q: "), want, rtol=0, atol=1e-5)
    assert [text for block in tokenised for text in block] == ["Q: " + text for text in tiny.TEXTS[:6]]


def test_a_mesh_gives_the_same_vectors(origin, encoder):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    np.testing.assert_allclose(load_encoder(origin, mesh=mesh).encode(tiny.TEXTS), encoder.encode(tiny.TEXTS), rtol=0, atol=1e-4)


def test_bfloat16_is_close(origin, encoder):
    half = load_encoder(origin, dtype=jnp.bfloat16)
    a, b = (truncate_and_normalize(e.encode(tiny.TEXTS), 64) for e in (half, encoder))
    assert (a * b).sum(1).min() > 0.999


def test_truncation_comes_before_normalisation():
    x = np.array([[3.0, 4.0, 12.0], [0.0, 0.0, 5.0]], np.float64)
    cut = truncate_and_normalize(x, 2)
    assert cut.dtype == np.float32
    np.testing.assert_allclose(cut, [[0.6, 0.8], [0.0, 0.0]])


def test_embed_writes_what_the_encoder_says(encoder, folder, tmp_path, capsys):
    lines = ["one", "", "three \u2028 and no new line", "four"]
    (tmp_path / "in.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    run = lambda *more: embed.main(  # noqa: E731
        ["--model", str(folder), "--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "x.npy"), *more]
    )
    assert run() == 0
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), truncate_and_normalize(encoder.encode(lines), 64), atol=1e-5)
    assert run("--dim", "16", "--instruction", "Find it.") == 0
    want = truncate_and_normalize(encoder.encode(lines, query_prompt("Find it.")), 16)
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), want, atol=1e-5)
    assert run("--prompt", query_prompt("Find it."), "--dim", "16", "--batch-tokens", "96") == 0
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), want, atol=1e-5)
    assert run("--prompt", "query") == 0  # a prompt of the model by its name, which was put before every text
    want = truncate_and_normalize(encoder.encode(lines, DEFAULT_PROMPTS["query"]), 64)
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), want, atol=1e-5)
    assert "4 vectors of 16 dimensions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--dim": "65"}, "exceeds the 64 dimensions"),
        ({"--prompt": "qeury"}, "no prompt 'qeury'; it has query, document"),
        ({"--input": "empty.txt"}, "empty.txt has no rows"),
        ({"--input": "absent.txt"}, "absent.txt does not exist"),
        ({"--input": "latin.txt"}, "row 0, column 'text' is not valid UTF-8"),
        ({"--model": "./absent/model"}, "no local folder"),
        ({"--model": "absent"}, "could not be downloaded"),
    ],
)
def test_embed_errors_are_one_line_and_leave_nothing(folder, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "in.txt").write_text("one\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("Matratze für\n".encode("latin-1"))
    flags = {"--model": str(folder), "--input": "in.txt", "--output": "x.npy"} | change
    assert embed.main([part for flag in flags.items() for part in flag]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert not list(tmp_path.glob("x.npy*"))


def test_hits_are_cosine_and_ties_are_misses():
    documents = np.array([[1.0, 0.0], [0.0, 9.0], [1.0, 0.0]])
    queries = np.array([[5.0, 1.0], [0.1, 1.0], [1.0, 0.0]])
    hits = hits_at_1(queries, documents, np.array([0, 1, 1]), [2])
    assert hits[2].tolist() == [False, True, False]  # the first ties with document 2


def write_pairs(path, rows):
    columns = ("query", "instruction", "document", "language")
    pq.write_table(pa.table({name: [row[i] for row in rows] for i, name in enumerate(columns)}), path)
    return path


def test_recall_compares_models(folder, tmp_path, capsys, monkeypatch):
    words = ["cat", "dog", "mat", "Katze", "猫", "add"]
    rows = [(word, "", word if i % 3 else "x" + word, language) for i, word in enumerate(words) for language in ("en", "de")]
    path = write_pairs(tmp_path / "same.parquet", rows)
    pairs = read_pairs(path)
    assert len(pairs.documents) == 6 and pairs.target.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    out = tmp_path / "out.json"
    flags = ["--model", str(folder), "--model", f"{folder}/", "--pairs", str(path), "--dims", "32,full", "--json", str(out)]
    assert recall.main(flags) == 0
    printed = capsys.readouterr().out
    assert "12 queries, 6 documents, 2 languages" in printed and "full width, overall" in printed and "1.0x" in printed
    figures = json.loads(out.read_text())[str(folder)]["same"]["full"]
    assert figures["recall@1"] >= 8 / 12 and set(figures["languages"]) == {"en", "de"}  # identical texts find themselves


def test_recall_on_files_of_one_name(folder, tmp_path, capsys):
    """A folder for each language with a file `test` in it: each file has the figures that it has alone."""
    out, paths = tmp_path / "out.json", []
    for language, documents in {"en": ["cat", "dog", "mat", "sat"], "de": ["Katze", "xHund", "xMatte", "xsaß"]}.items():
        (tmp_path / language).mkdir()
        rows = [(document.removeprefix("x"), "", document, language) for document in documents]
        paths.append(str(write_pairs(tmp_path / language / "test.parquet", rows)))
    command = ["--model", str(folder), "--json", str(out), "--pairs"]
    alone = []
    for path in paths:
        assert recall.main([*command, path]) == 0
        alone.append(json.loads(out.read_text())[str(folder)]["test"])
    assert alone[0] != alone[1]
    assert recall.main([*command, *paths]) == 0
    assert json.loads(out.read_text())[str(folder)] == dict(zip(paths, alone, strict=True))
    assert f"{paths[0]}: 4 queries" in capsys.readouterr().out


def test_recall_errors_are_one_line(folder, tmp_path, capsys):
    path = write_pairs(tmp_path / "p.parquet", [("a", "", "b", "en")])
    pq.write_table(pq.read_table(path).drop_columns(["document"]), tmp_path / "lacks.parquet")
    for pairs, dims, message in [(path, "65", "fewer than 65"), (tmp_path / "lacks.parquet", "full", "has no column 'passage'")]:
        assert recall.main(["--model", str(folder), "--pairs", str(pairs), "--dims", dims]) == 1
        error = capsys.readouterr().err.strip()
        assert message in error.splitlines()[-1] and len(error.splitlines()) <= 2  # the first may say what is loaded
    with pytest.raises(UserError, match="no rows"):
        read_pairs(write_pairs(tmp_path / "none.parquet", []))


def test_an_encoder_of_bare_parts(origin, encoder):
    bare = TextEncoder(origin.config, origin.load(None), origin.tokenizer, 96)
    np.testing.assert_array_equal(bare.encode(tiny.TEXTS), encoder.encode(tiny.TEXTS))
