"""What `prepare` says of its sources: kinds with their reason, what is remarkable in the rows, and which rows are held out."""

import json
import unicodedata

import numpy as np
import pytest
import tiny
from small_raw import EOS, MAX_LENGTH, command, write, write_tokenizer

from f2llm_jax import prepare
from f2llm_jax.data import records

pytestmark = [pytest.mark.filterwarnings(f"ignore:::{module}") for module in ("tensorflow_datasets", "apache_beam")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bpe")


def run(folder, tokenizer, *more, code=0, out="out"):
    assert prepare.main(command(folder / "raw", tokenizer, folder / out, *more)) == code
    return records.load_dataset(folder / out) if code == 0 else None


def texts(dataset, source, split):
    """Query and documents of each row of a split, decoded without their end."""
    decode = lambda ids: dataset.tokenizer().decode(ids[:-1])  # noqa: E731
    documents = dataset.tables(source, split).documents
    queries = dataset.reader(source, split).read(range(len(documents)))
    corpus = dataset.reader(source, "corpus").read(range(dataset.sources[source].documents))
    return [(decode(query), *(decode(corpus[n]) for n in row if n >= 0)) for query, row in zip(queries, documents, strict=True)]


def pairs(count, **changed):
    return {"query": [f"query {i}" for i in range(count)], "passage": [f"passage {i}" for i in range(count)]} | changed


def test_kinds_are_guessed_from_the_rows_and_say_why(tokenizer, tmp_path, capsys):
    """One negative alone makes no classification: triplets are retrieval, and train in both stages."""
    labels = ["good", "bad"]
    write(tmp_path / "raw", "triplets", pairs(60, negative=[f"negative {i}" for i in range(60)]))
    turns = {"passage": [labels[i % 2] for i in range(60)], "negative_1": [labels[1 - i % 2] for i in range(60)]}
    write(tmp_path / "raw", "labels", pairs(60) | turns)
    write(tmp_path / "raw", "few", pairs(4) | {name: values[:4] for name, values in turns.items()})
    dataset = run(tmp_path, tokenizer)
    assert {name: info.kind for name, info in dataset.sources.items()} == {
        "triplets": "retrieval", "labels": "classification", "few": "retrieval",
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "triplets: retrieval (guessed: 60 rows have more than 32 distinct passages and negatives" in printed
    assert "labels: classification (guessed: 60 rows have 2 distinct passages and negatives" in printed
    assert list(run(tmp_path, tokenizer, "--stage", "1", out="one").sources) == ["few", "triplets"]


def test_a_single_file_has_a_tasks_file_too(tokenizer, tmp_path, capsys):
    """Next to it, or as --tasks says; neither was read where --raw was a file. One that does not name it is somebody else's."""
    write(tmp_path / "raw", "topics", pairs(60, negative=[f"negative {i}" for i in range(60)]))
    raw = tmp_path / "raw" / "topics.parquet"
    kind = lambda *flags: run(tmp_path, tokenizer, "--raw", str(raw), "--overwrite", *flags).sources["topics"].kind  # noqa: E731
    (tmp_path / "raw" / "tasks.json").write_text('{"version": "2.0.0", "tasks": []}')
    assert kind() == "retrieval"
    (tmp_path / "mine.json").write_text('{"topics": "classification"}')
    assert kind("--tasks", str(tmp_path / "mine.json")) == "classification"
    (tmp_path / "raw" / "tasks.json").write_text('{"topics": "clustering", "others": "retrieval"}')
    assert kind() == "clustering"
    (tmp_path / "raw" / "tasks.json").write_text('{"topics": "clusters"}')
    run(tmp_path, tokenizer, "--raw", str(raw), "--overwrite", code=1)
    assert "unknown kind 'clusters'" in capsys.readouterr().err


def test_what_is_remarkable_is_counted(tokenizer, tmp_path, capsys):
    write(tmp_path / "raw", "same", {"query": ["one query"] * 50, "passage": ["one passage"] * 50})
    write(tmp_path / "raw", "echo", pairs(40) | {"passage": [f"query {i}" if i < 30 else f"passage {i}" for i in range(40)]})
    write(tmp_path / "raw", "long", pairs(40) | {"passage": [f"{i} " + "word " * 200 * (i < 35) + "end" for i in range(40)]})
    negatives = [["query 0", "x"], ["x", "passage 21"], ["x", "y"], ["x", " query 3"], *([["x", "y"]] * 36)]
    twice = {
        "query": [f"query {i % 20}" for i in range(40)],
        "negative_1": [a for a, _ in negatives],
        "negative_2": [b for _, b in negatives],
    }
    write(tmp_path / "raw", "false", pairs(40) | twice)  # row 21 is of query 1 too
    write(tmp_path / "raw", "shared", pairs(400) | {"query": [f"query {i % 4}" for i in range(400)]})
    dataset = run(tmp_path, tokenizer)
    printed = capsys.readouterr().out
    for line in (
        "warning: same: 49 of 50 rows that repeat an earlier one (98.0%)",
        "warning: echo: 30 of 40 rows whose query is their passage (75.0%)",
        "warning: false: 2 of 40 rows with a negative that is their query (5.0%)",
        "warning: false: 1 of 40 rows with a negative that is a positive of their query in another row (2.5%)",
        "warning: long: 35 of 40 documents cut at --max-length (87.5%)",
    ):
        assert line in printed
    assert dataset.sources["same"].rows == {"train": 50, "validation": 0}  # what is all alike cannot be held out
    held_out = dataset.sources["shared"].rows["validation"]
    assert f"warning: shared: {held_out} of {held_out} held-out rows whose query is also trained on (100.0%)" in printed
    by_query = run(tmp_path, tokenizer, "--split-by", "query", out="by_query")
    sides = [{row[0] for row in texts(by_query, "shared", split)} for split in records.QUERY_SPLITS]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert "held-out rows" not in capsys.readouterr().out


def test_the_share_that_is_held_out(tokenizer, tmp_path):
    write(tmp_path / "raw", "a", pairs(400))
    assert 60 < run(tmp_path, tokenizer, "--validation", "0.25", out="some").sources["a"].rows["validation"] < 140
    assert run(tmp_path, tokenizer, "--validation", "0", out="none").sources["a"].rows == {"train": 400, "validation": 0}


def test_held_out_rows_of_a_file(tokenizer, tmp_path, capsys):
    """All of them and nothing else are held out; cap and share do not touch them."""
    write(tmp_path / "raw", "a", pairs(30))
    write(tmp_path / "raw", "b", pairs(20))
    (tmp_path / "held").mkdir()
    rows = [{"question": f"held {i}", "answer": f"out {i}"} for i in range(5)] + [{"question": "query 3", "answer": "passage 3"}]
    (tmp_path / "held" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = run(tmp_path, tokenizer, "--validation", str(tmp_path / "held"), "--cap", "10")
    assert texts(dataset, "a", "validation") == [(row["question"], row["answer"]) for row in rows]
    assert dataset.sources["a"].rows == {"train": 10, "validation": 6}
    assert dataset.sources["b"].rows["validation"] <= 1  # it has no such file, and --validation gives no share
    assert "a.jsonl: query=question, passage=answer; 0 negatives a row (held out)" in capsys.readouterr().out
    assert (
        run(tmp_path, tokenizer, "--validation", str(tmp_path / "held" / "a.jsonl"), code=0, out="file").sources["a"].rows["validation"]
        == 6
    )
    (tmp_path / "held" / "a.jsonl").rename(tmp_path / "held" / "c.jsonl")
    assert run(tmp_path, tokenizer, "--validation", str(tmp_path / "held"), code=1, out="wrong") is None
    assert "holds 'c', which is no source (a, b)" in capsys.readouterr().err


def test_a_negative_that_is_the_positive_in_another_form_or_behind_the_limit(tokenizer, tmp_path, capsys):
    composed, decomposed = "caf\u00e9 cr\u00e8me", unicodedata.normalize("NFD", "caf\u00e9 cr\u00e8me")
    start = "long word " * MAX_LENGTH
    rows = pairs(8) | {
        "passage": [composed, decomposed, f"{start} one", *["p"] * 5],
        "negative_1": [decomposed, composed, f"{start} two", *["n"] * 5],
        "negative_2": ["other"] * 8,
    }
    write(tmp_path / "raw", "a", rows)
    dataset = run(tmp_path, tokenizer)
    stored = [row for split in records.QUERY_SPLITS for row in texts(dataset, "a", split)]
    kept = {query: negatives for query, _, *negatives in stored}
    assert kept["query 0"] == kept["query 1"] == kept["query 2"] == ["other"] and kept["query 3"] == ["n", "other"]
    counters = dataset.sources["a"].counters
    assert (counters["negatives: is the positive"], counters["negatives: has the token ids of the positive"]) == (2, 1)
    assert "negatives: has the token ids of the positive: 1" in capsys.readouterr().out
    assert run(tmp_path, tokenizer, "--strict", code=1, out="strict") is None


def test_a_text_that_spells_the_end_token_is_plain_text(tokenizer, tmp_path, capsys):
    """It ends no text early and is no second end: each text has one end token, the last, and reads as it was written."""
    rows = pairs(20) | {"passage": [f"{EOS}passage {i}{EOS}" if i % 2 else f"passage {i}" for i in range(20)]}
    write(tmp_path / "raw", "a", rows)
    dataset = run(tmp_path, tokenizer)
    for split, count in (*dataset.sources["a"].rows.items(), ("corpus", 20)):
        for ids in dataset.reader("a", split).read(range(count)):
            assert np.flatnonzero(ids == dataset.eos_id).tolist() == [len(ids) - 1]
    assert {passage for split in records.QUERY_SPLITS for _, passage in texts(dataset, "a", split)} == set(rows["passage"])
    assert "warning: a: 10 of 40 texts that spell a special token of the tokenizer, read as plain text (25.0%)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--columns", "pasage=passage"], "'pasage' is no role of a column; did you mean 'passage'?"),
        (["--columns", "passage=pasage"], "has no column 'pasage'; did you mean 'passage'?"),
        ([], "column 'hard_text' looks like a positive and is not used"),
    ],
)
def test_columns_are_never_dropped_by_the_command(tokenizer, tmp_path, capsys, flags, message):
    write(tmp_path / "raw", "a", pairs(9, hard_text=["x"] * 9))
    assert run(tmp_path, tokenizer, *flags, code=1) is None
    error = capsys.readouterr().err
    assert error.startswith("prepare: error: ") and message in error
    assert not (tmp_path / "out").exists()
    dataset = run(tmp_path, tokenizer, "--columns", "negative=hard_text")
    assert dataset.sources["a"].negatives == 1
    assert run(tmp_path, tokenizer, "--ignore-columns", "hard_*", out="without").sources["a"].negatives == 0


def test_what_a_folder_holds_besides_sources_is_said(tokenizer, tmp_path, capsys):
    write(tmp_path / "raw", "a", pairs(9))
    for name in ("._a.parquet", "notes.txt", "README.md"):
        (tmp_path / "raw" / name).write_bytes(b"\x00\x05\x16\x07")
    run(tmp_path, tokenizer)
    assert f"not read in {tmp_path / 'raw'}: README.md, notes.txt, 1 hidden" in capsys.readouterr().out


def test_a_tokenizer_that_is_no_folder_is_looked_for_on_the_hub(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write(tmp_path / "raw", "a", pairs(9))
    assert run(tmp_path, "nobody/nothing", code=1) is None
    assert "'nobody/nothing' is no folder and could not be downloaded from the Hub" in capsys.readouterr().err
    fetched = tiny.write_tokenizer(tmp_path / "snapshot") or tmp_path / "snapshot"
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(fetched))
    assert run(tmp_path, "somebody/something", out="fetched").sources["a"].rows
