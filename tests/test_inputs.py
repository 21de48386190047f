"""Every form of file through every command that reads it."""

import json

import formats
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny

from f2llm_jax import embed, mine, prepare, recall
from f2llm_jax.data import records
from f2llm_jax.evaluation import retrieval
from f2llm_jax.evaluation.local_tasks import read_manifest
from f2llm_jax.inputs.fields import TEXTS, read_fields
from f2llm_jax.mining import builders
from f2llm_jax.mining.inputs import read_pairs
from f2llm_jax.release import hf_folder
from f2llm_jax.text import DEFAULT_QUERY_INSTRUCTION, query_prompt

pytestmark = [pytest.mark.filterwarnings(f"ignore:::{module}") for module in ("tensorflow_datasets", "apache_beam")]
name = lambda path: path.name  # noqa: E731


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    hf_folder.export(tiny.origin(folder / "tokenizer"), folder / "model", hf_folder.ReleaseForm(golden=False))
    return folder / "model"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """All forms that a folder is searched for, as sources of one run of the command."""
    folder = tmp_path_factory.mktemp("prepared")
    tiny.write_tokenizer(folder / "tokenizer")
    flags = ["--raw", str(formats.FOLDER / "pairs"), "--tokenizer", str(folder / "tokenizer"), "--out", str(folder / "out")]
    assert prepare.main([*flags, "--workers", "1", "--cap", "0"]) == 0
    return records.load_dataset(folder / "out")


def stored(dataset, source):
    """Query, positive, negatives and language of every row of a source, decoded, in any order."""
    decode = dataset.tokenizer().decode
    rows = []
    for split in records.QUERY_SPLITS:
        documents = dataset.tables(source, split).documents
        reader, corpus = dataset.reader(source, split), dataset.reader(source, "corpus")
        for row, numbers in enumerate(documents):
            query, *texts = [
                decode(ids[:-1]) for ids in (*reader.read([row]), *corpus.read([number for number in numbers.tolist() if number >= 0]))
            ]
            rows.append((query, texts[0], tuple(texts[1:]), reader.languages([row])[0]))
    return sorted(rows)


def instructed(path):
    """Queries of a BEIR folder carry the default instruction."""
    return query_prompt(DEFAULT_QUERY_INSTRUCTION) if path.name == "beir" else ""


def source_of(path):
    return path.name.split(".")[0]


PAIR_PATHS = formats.paths("pairs")


def test_every_form_has_a_source(prepared):
    assert sorted(prepared.sources) == sorted(source_of(path) for path in PAIR_PATHS if path.name not in formats.NAMED_ONLY)
    assert {info.kind for info in prepared.sources.values()} == {"retrieval"}


@pytest.mark.parametrize("path", [path for path in PAIR_PATHS if path.name not in formats.NAMED_ONLY], ids=name)
def test_prepare_reads_every_form(prepared, path):
    assert stored(prepared, source_of(path)) == sorted((instructed(path) + query, *rest) for query, *rest in formats.pairs(path))


@pytest.mark.parametrize("path", PAIR_PATHS, ids=name)
def test_mine_and_recall_read_every_form(path):
    expected = formats.pairs(path)
    found = read_pairs(path)
    assert [*zip(found.queries, found.passages, map(tuple, found.given), found.languages, strict=True)] == [
        (instructed(path) + query, *rest) for query, *rest in expected
    ]
    ranked = retrieval.read_pairs(path)
    assert ranked.queries == found.queries and ranked.language.tolist() == found.languages
    assert [ranked.documents[target] for target in ranked.target] == found.passages
    assert set(ranked.documents) >= {text for _, passage, negatives, _ in expected for text in (passage, *negatives)}


def test_the_commands_say_what_they_understood(model, tmp_path, capsys):
    """Two forms through the whole of mine, whose rows keep the negatives that they have, and recall."""
    queries = [str(formats.FOLDER / "pairs" / form) for form in ("flag_embedding.jsonl", "json_in_a_cell.csv")]
    loose = ("--negatives", "3", "--skip", "0", "--max-score", "none", "--max-relative", "none", "--near-duplicate", "2")
    assert mine.main(["--model", str(model), "--queries", *queries, "--out", str(tmp_path / "out"), *loose]) == 0
    printed = capsys.readouterr().out
    assert "passage=pos (lists of up to 1), lang, negatives=neg (lists of up to 2); 2 negatives a row" in printed
    for form in ("flag_embedding", "json_in_a_cell"):
        rows = pq.read_table(tmp_path / "out" / f"{form}.parquet").to_pylist()
        assert [(row["query"], row["passage"], (row["negative_1"], row["negative_2"]), row["lang"]) for row in rows] == formats.ROWS
        assert all(row["negative_3"] not in (row["passage"], row["negative_1"], row["negative_2"], row["query"]) for row in rows)
    assert recall.main(["--model", str(model), "--pairs", *queries]) == 0
    assert "json_in_a_cell: 4 queries, 12 documents, 3 languages" in capsys.readouterr().out


@pytest.mark.parametrize("path", formats.paths("labels"), ids=name)
def test_labels_of_every_form_are_their_spelling(path, tmp_path):
    """`007` and `7` are two labels; whatever spells a number, a truth value or a date stays a text, in training and in measuring."""
    built, _ = builders.build("clustering", path, "", 1, 0)
    assert set(zip(built.queries, built.passages, strict=True)) == {("one", "six"), ("six", "one")}
    task = {"name": "Labels", "type": "Classification", "train": str(path), "test": str(path)}
    (tmp_path / "tasks.json").write_text(json.dumps({"tasks": [task]}))
    (evaluated,), _ = read_manifest(tmp_path / "tasks.json")
    evaluated.load_data()
    labels = evaluated.dataset["train"]["label"]
    assert evaluated.dataset["train"]["text"][:] == [text for text, _ in formats.LABELS]
    assert [labels[i] == labels[k] for i in range(6) for k in range(6)] == [a == b for _, a in formats.LABELS for _, b in formats.LABELS]


@pytest.mark.parametrize("path", formats.paths("texts"), ids=name)
def test_embed_gives_every_text_of_every_form_its_vector(model, path, tmp_path, capsys):
    assert read_fields(path, TEXTS, {"text": "any text", "title": "optional text"}).joined() == formats.TEXTS
    if path.name in ("bom_and_crlf.txt", "column.jsonl", "saved_to_disk"):  # the others are the same texts by the line above
        for source, out in ((path, "a.npy"), (formats.FOLDER / "texts" / "lines.txt", "b.npy")):
            assert embed.main(["--model", str(model), "--input", str(source), "--output", str(tmp_path / out)]) == 0
        assert "wrote 5 vectors of 64 dimensions" in (printed := capsys.readouterr().out) and "1 of them of empty texts" in printed
        np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))
