"""Users' own files, catalogues, the stages' rules, and everything that may be wrong with a row."""

import csv
import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_raw import INSTRUCTION, WORDS, command, rows, write, write_tokenizer

from f2llm_jax import prepare
from f2llm_jax.data import inspect, records

QUERY_PREFIX = "Instruct: Retrieve translations of the following text.\nQuery: "


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bpe")


def run(folder, tokenizer, *more, code=0, name="out"):
    assert prepare.main(command(folder / "raw", tokenizer, folder / name, *more)) == code
    return records.load_dataset(folder / name) if code == 0 else None


def contents(dataset, source):
    """Everything stored of a source, as plain values."""
    found = {}
    for split in records.QUERY_SPLITS:
        tables, reader = dataset.tables(source, split), dataset.reader(source, split)
        count = len(tables.query_length)
        found[split] = (
            [ids.tolist() for ids in reader.read(range(count))],
            reader.languages(range(count)) if count else [],
            tables.documents.tolist(),
            tables.query_length.tolist(),
        )
    found["corpus"] = [ids.tolist() for ids in dataset.reader(source, "corpus").read(range(dataset.sources[source].documents))]
    return found


def write_lines(file, table, names):
    lines = b"".join(
        json.dumps({names.get(name, name): table[name][i] for name in table}, ensure_ascii=False).encode() + b"\n"
        for i in range(len(table["query"]))
    )
    if file.suffix == ".zst":
        with pa.CompressedOutputStream(str(file), "zstd") as stream:
            stream.write(lines)
    else:
        file.write_bytes(gzip.compress(lines) if file.suffix == ".gz" else lines)


def write_csv(file, table):
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))


MAPPED = {"query": "question", "passage": "answer", "negative_1": "wrong", "lang": "tongue"}


@pytest.mark.parametrize("negatives", [0, 1, 3])
def test_the_same_rows_in_every_format_give_the_same_records(negatives, tokenizer, tmp_path):
    table = rows(120, max(1, negatives))
    if not negatives:
        del table["negative_1"]
    table["passage"][7] = 'several lines,\n"quoted", with commas'
    kinds = {"same": "retrieval"}
    expected = None
    formats = {
        "parquet": lambda file: write(file, "same", table),
        "jsonl.zst": lambda file: write_lines(file / "same.jsonl.zst", table, MAPPED),
        "jsonl.gz": lambda file: write_lines(file / "same.jsonl.gz", table, {"query": "anchor", "passage": "positive"}),
        "jsonl": lambda file: write_lines(file / "same.jsonl", table, {"negative_1": "negative"} if negatives == 1 else {}),
        "csv": lambda file: write_csv(file / "same.csv", table),
    }
    for name, put in formats.items():
        raw = tmp_path / name / "raw"
        raw.mkdir(parents=True)
        put(raw)
        (raw / "tasks.json").write_text(json.dumps(kinds))
        mapping = ",".join(f"{key}={value}" for key, value in MAPPED.items() if key in table)
        found = contents(run(tmp_path / name, tokenizer, *(["--columns", mapping] if name == "jsonl.zst" else [])), "same")
        expected = expected or found
        assert found == expected, name


def test_an_instruction_of_the_source_is_that_of_the_file(tokenizer, tmp_path):
    table = rows(60, 2)
    write(tmp_path / "raw", "own", table)
    expected = contents(run(tmp_path, tokenizer, name="with"), "own")
    bare = table | {"query": [query.removeprefix(INSTRUCTION) for query in table["query"]]}
    write(tmp_path / "raw", "own", bare)
    text = QUERY_PREFIX.removeprefix("Instruct: ").removesuffix("\nQuery: ")
    assert contents(run(tmp_path, tokenizer, "--instruction", f"own={text}", name="given"), "own") == expected


def test_a_catalogue_gives_units_row_ranges_kinds_and_stage_one(tokenizer, tmp_path):
    head = {"unit": "head", "files": [{"path": "x.parquet", "row_start": 0, "row_stop": 40}]}
    tail = {"unit": "tail", "batch": "unit", "files": [{"path": "x.parquet", "row_start": 40, "row_stop": 100}, "y.parquet"]}
    three = {"source": "three", "task": "clustering", "units": [head]}
    rest = {"source": "rest", "task": "retrieval", "stage1": True, "units": [tail]}
    catalogue = {"sources": [three, rest]}
    (tmp_path / "mine.json").write_text(json.dumps(catalogue))
    write(tmp_path / "raw", "x", rows(100, 3))
    write(tmp_path / "raw", "y", rows(50, 2, start=100))  # fewer negatives than the other file
    flags = ["--catalogue", str(tmp_path / "mine.json")]
    whole = run(tmp_path, tokenizer, *flags)
    assert {name: (info.kind, sum(info.rows.values()), info.negatives) for name, info in whole.sources.items()} == {
        "head": ("clustering", 40, 3),
        "tail": ("retrieval", 110, 3),
    }
    assert list(run(tmp_path, tokenizer, *flags, "--stage", "1", name="one").sources) == ["tail"]
    capped = run(tmp_path, tokenizer, *flags, "--cap", "70", name="capped")
    assert {name: sum(info.rows.values()) for name, info in capped.sources.items()} == {"head": 40, "tail": 70}
    everything, chosen = (
        {tuple(ids) for split in records.QUERY_SPLITS for ids in contents(found, "tail")[split][0]} for found in (whole, capped)
    )
    assert chosen < everything
    assert contents(run(tmp_path, tokenizer, *flags, "--cap", "70", name="again"), "tail") == contents(capped, "tail")
    assert run(tmp_path, tokenizer, *flags, "--strict", code=1, name="strict") is None


def test_a_share_of_symmetric_documents_gets_the_instruction(tokenizer, tmp_path):
    write(tmp_path / "raw", "topics", rows(400, 2), {"topics": "clustering"})
    plain = run(tmp_path, tokenizer)
    some = run(tmp_path, tokenizer, "--instruct-documents", "0.3", name="some")
    decode = plain.tokenizer().decode
    before, after = ({decode(ids) for ids in contents(found, "topics")["corpus"]} for found in (plain, some))
    instructed = {text for text in after if text.startswith("Instruct: ")}
    assert len(after) == len(before) and not any(text.startswith("Instruct: ") for text in before)
    assert 0.2 < len(instructed) / len(after) < 0.4
    assert contents(some, "topics")["train"][0] == contents(plain, "topics")["train"][0]
    kept = run(tmp_path, tokenizer, "--instruct-documents", "0.3", "--stage", "2", "--cap", "0", name="tasks")
    (tmp_path / "raw" / "tasks.json").write_text('{"topics": "retrieval"}')
    assert contents(kept, "topics") == contents(some, "topics")
    assert contents(run(tmp_path, tokenizer, "--instruct-documents", "0.3", name="retrieval"), "topics") == contents(plain, "topics")


def put(name, row, value):
    def change(table):
        table[name][row] = value

    return change


def every_negative(value):
    def change(table):
        for i in (1, 2, 3):
            table[f"negative_{i}"][5] = value(table)

    return change


def same(name, other):
    """The text of column `other` in row 9."""
    return lambda table: put(name, 9, table[other][9])(table)


NUMBER, LIST = (f"is {name}, not a text" for name in ("a number", "a list"))
# What is wrong; kind of task; what the error names (None: none by default); rows left of 50 and what is counted with --skip-invalid.
ROWS = {
    "null query": (put("query", 3, None), "retrieval", "row 3, column 'query' is null", 49, "rows: query is null"),
    "empty query": (put("query", 3, " "), "retrieval", "row 3, column 'query' is empty", 49, "rows: query is empty"),
    "instruction alone": (put("query", 3, INSTRUCTION), "retrieval", "row 3, column 'query' is empty", 49, "rows: query is empty"),
    "null passage": (put("passage", 49, None), "retrieval", "row 49, column 'passage' is null", 49, "rows: passage is null"),
    "empty passage": (put("passage", 0, "\n"), "retrieval", "row 0, column 'passage' is empty", 49, "rows: passage is empty"),
    "number": (put("passage", 4, 12), "retrieval", f"'passage' {NUMBER}", 49, f"rows: passage {NUMBER}"),
    "list": (put("query", 4, ["a"]), "retrieval", f"'query' {LIST}", 49, f"rows: query {LIST}"),
    "surrogate": (put("query", 4, "a\udc80b"), "retrieval", "'query' is not valid UTF-8", 49, "rows: query is not valid UTF-8"),
    "null negative": (put("negative_2", 9, None), "retrieval", "row 9, column 'negative_2' is null", 50, "negatives: is null"),
    "empty negative": (put("negative_2", 9, ""), "clustering", "row 9, column 'negative_2' is empty", 50, "negatives: is empty"),
    "number for negative": (put("negative_3", 9, 1.5), "retrieval", f"'negative_3' {NUMBER}", 50, f"negatives: {NUMBER}"),
    "negative is positive": (same("negative_1", "passage"), "retrieval", None, 50, "negatives: is the positive"),
    "repeated negative": (same("negative_2", "negative_1"), "retrieval", None, 50, "negatives: repeats an earlier one"),
    "no negative left": (every_negative(lambda table: table["passage"][5]), "clustering", None, 49, "rows: no negative left"),
    "none left, retrieval": (every_negative(lambda table: table["passage"][5]), "retrieval", None, 50, "negatives: is the positive"),
}


def clean_rows():
    """Fifty rows in which nothing is wrong."""
    table = rows(50, 3, start=1000)
    for n in (1, 2, 3):
        table[f"negative_{n}"] = [f"dog {i} {n} {WORDS[n]}" for i in range(50)]
    return table


def prepared_with(change, kind, tokenizer, tmp_path, *flags, code=0):
    table = clean_rows()
    change(table)
    (tmp_path / "raw").mkdir(exist_ok=True)
    lines = [json.dumps({name: values[i] for name, values in table.items()}) for i in range(50)]
    (tmp_path / "raw" / "bad.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "raw" / "tasks.json").write_text(json.dumps({"bad": kind}))
    return run(tmp_path, tokenizer, *flags, code=code, name=f"out{len(flags)}")


QUICK = ("null passage", "empty query", "null negative", "list", "surrogate")  # of which `make test` has three runs of prepare each


@pytest.mark.parametrize("case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in ROWS])
def test_a_malformed_row_is_an_error_repaired_or_skipped(case, tokenizer, tmp_path, capsys):
    change, kind, message, left, counter = ROWS[case]
    if message:
        assert prepared_with(change, kind, tokenizer, tmp_path, code=1) is None
        error = capsys.readouterr().err
        assert "bad.jsonl: row" in error and message in error and "--skip-invalid" in error
        assert not (tmp_path / "out0").exists()
    strict = prepared_with(change, kind, tokenizer, tmp_path, "--strict", code=1)
    assert strict is None and "bad.jsonl: row" in capsys.readouterr().err
    dataset = prepared_with(change, kind, tokenizer, tmp_path, *(["--skip-invalid", "--overwrite"] if message else []))
    info = dataset.sources["bad"]
    assert sum(info.rows.values()) == left and info.skipped == 50 - left
    assert info.counters[counter] > 0
    assert counter in capsys.readouterr().out
    summary = json.loads((dataset.folder / "summary.json").read_text())["sources"][0]
    assert summary["skipped"] == 50 - left and summary["counters"] == info.counters
    assert (dataset.folder / "summary.png").read_bytes().startswith(b"\x89PNG")


def spoil_file(name, content):
    return lambda raw: (raw / name).write_bytes(content)


def two_formats(raw):
    for end in ("csv", "jsonl"):
        (raw / f"a.{end}").write_bytes(b"query,passage\na,b\n")


def many_negatives(raw):
    names = ["query", "passage", *(f"negative_{i}" for i in range(1, 66))]
    pq.write_table(pa.table({name: ["a"] for name in names}), raw / "a.parquet")


PAIRS = b'{"query": "q", "passage": "p"}\n' * 99
GZ, ZST = gzip.compress(PAIRS)[:-9], pa.compress(PAIRS, "zstd", asbytes=True)[:-4]
FILES = {
    "broken line": (spoil_file("a.jsonl", b'{"query": "q", "passage": "p"}\n{"query": \n'), "a.jsonl: row 1 is not JSON"),
    "not an object": (spoil_file("a.jsonl", b"[1]\n"), "a.jsonl: row 0 is not a JSON object"),
    "truncated gz": (spoil_file("a.jsonl.gz", GZ), "is not a readable jsonl.gz file"),
    "truncated zst": (spoil_file("a.jsonl.zst", ZST), "not a readable jsonl.zst file"),
    "cells": (spoil_file("a.csv", b"query,passage\na,b\nc\n"), "a.csv: row 1 has 1 cells, the header 2"),
    "header": (spoil_file("a.csv", b"frage,passage\na,b\n"), "has no column 'query' or 'anchor' or 'question', only frage, passage"),
    "empty": (spoil_file("a.csv", b"query,passage\n"), "a.csv: no rows"),
    "quotes": (spoil_file("a.csv", b'query,passage\n"a,b\n'), "not a readable csv file"),
    "two formats": (two_formats, "are one source by name"),
    "many negatives": (many_negatives, "has 65 negatives a row; keep 64 at most"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_malformed_file_is_always_an_error(case, tokenizer, tmp_path, capsys):
    spoil, message = FILES[case]
    (tmp_path / "raw").mkdir()
    spoil(tmp_path / "raw")
    for flags in ([], ["--skip-invalid"]):
        assert run(tmp_path, tokenizer, *flags, code=1) is None
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_sixty_four_negatives_and_lines_that_leave_some_out(tokenizer, tmp_path):
    (tmp_path / "raw").mkdir()
    many = {f"negative_{i}": f"no {i}" for i in range(1, 65)}
    lines = [{"query": f"q {i}", "passage": f"p {i}"} | (many if i % 2 else {"negative_1": "no 1"}) for i in range(20)]
    (tmp_path / "raw" / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    dataset = run(tmp_path, tokenizer)
    assert dataset.sources["a"].negatives == 64 and not dataset.sources["a"].counters
    stored = np.concatenate([dataset.tables("a", split).documents for split in records.QUERY_SPLITS])
    assert sorted((stored >= 0).sum(axis=1).tolist()) == [2] * 10 + [65] * 10


def test_looking_at_a_dataset(tokenizer, tmp_path, capsys):
    write(tmp_path / "raw", "bitext", rows(120, 3))
    run(tmp_path, tokenizer)
    out, picture = str(tmp_path / "out"), tmp_path / "packing.png"
    assert inspect.main([out, "--samples", "1"]) == 0
    shown = capsys.readouterr().out
    assert "bitext: retrieval, 120 rows, 8 languages, 3 negatives a row" in shown
    assert "language l" in shown and INSTRUCTION[:20] in shown
    assert inspect.main([out, "--step", "1", "--batch-size", "16", "--row-tokens", "128", "--picture", str(picture)]) == 0
    assert "step 1: epoch 0, source bitext (retrieval), 16 samples, 78 texts" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert inspect.main([out, "--source", "nothing"]) == 1
    assert "choose one of bitext" in capsys.readouterr().err
