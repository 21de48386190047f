"""`prepare` from raw parquet to records: what is stored, how rows are held out, and how it fails.

The oracle tokenises text by text with the `tokenizers` library and appends EOS by hand.
"""

import concurrent.futures
import json
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from small_raw import EOS, INSTRUCTION, MAX_LENGTH, command, labelled, rows, write, write_tokenizer

from f2llm_jax import prepare
from f2llm_jax.data import records


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bpe")


@pytest.fixture(scope="module")
def oracle(tokenizer):
    backend = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    eos = backend.token_to_id(EOS)

    def encode(text):
        return [*backend.encode(text).ids[: MAX_LENGTH - 1], eos]

    return encode


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    write(folder, "bitext", rows(250, 3), {"bitext": "retrieval", "topics": "clustering"})
    write(folder, "topics", rows(5, 2))
    write(folder, "labels", labelled(16))
    return folder


@pytest.fixture(scope="module")
def dataset(raw, tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "stage2"
    assert prepare.main(command(raw, tokenizer, out)) == 0
    return records.load_dataset(out)


def kept_documents(table, row):
    """Positive and negatives that a row keeps: none that is the positive, and none twice."""
    return list(dict.fromkeys(table[name][row] for name in table if name not in ("query", "lang")))


def raw_rows(dataset, source, split, table, encode, query=lambda text: text):
    """Raw row numbers of a split, after checking that its queries, documents and lengths are those of the raw rows."""
    numbers = {tuple(encode(query(text))): i for i, text in enumerate(table["query"])}
    assert len(numbers) == len(table["query"])
    tables = dataset.tables(source, split)
    queries = dataset.reader(source, split).read(range(len(tables.query_length)))
    corpus = dataset.reader(source, "corpus").read(range(len(tables.document_length)))
    assert all(ids.dtype == np.int32 for ids in [*queries, *corpus])
    assert tables.query_length.tolist() == [len(ids) for ids in queries]
    assert tables.document_length.tolist() == [len(ids) for ids in corpus]
    found = [numbers[tuple(ids.tolist())] for ids in queries]
    for row, positions in zip(found, tables.documents, strict=True):
        expected = kept_documents(table, row)
        assert [corpus[position].tolist() for position in positions[: len(expected)]] == [encode(text) for text in expected]
        assert (positions[len(expected) :] == -1).all()
    assert found == sorted(found)
    return found


def test_records_are_the_raw_rows_tokenised_text_by_text(dataset, raw, oracle):
    for source in ("bitext", "topics", "labels"):
        table = pq.read_table(raw / f"{source}.parquet").to_pydict()
        assert source != "bitext" or max(map(len, map(oracle, table["query"]))) == MAX_LENGTH
        train, held_out = (raw_rows(dataset, source, split, table, oracle) for split in records.QUERY_SPLITS)
        assert train and held_out
        assert sorted(train + held_out) == list(range(len(table["query"])))
        info = dataset.sources[source]
        assert info.rows == {"train": len(train), "validation": len(held_out)}
        columns = [name for name in table if name not in ("query", "lang")]
        documents = {text for name in table if name not in ("query", "lang") for text in table[name]}
        assert info.documents == len(documents)
        assert info.tokens["queries"] == sum(len(oracle(text)) for text in table["query"])
        assert info.tokens["documents"] == sum(len(oracle(text)) for text in documents)
        assert list(info.languages) == sorted(set(table["lang"])) and sum(info.languages.values()) == len(table["lang"])
        dropped = sum(len(columns) - len(kept_documents(table, i)) for i in range(len(table["query"])))
        assert sum(count for reason, count in info.counters.items() if reason.startswith("negatives: ")) == dropped


def test_kinds_come_from_the_tasks_file_or_the_columns(dataset):
    assert {name: info.kind for name, info in dataset.sources.items()} == {
        "bitext": "retrieval",
        "labels": "classification",
        "topics": "clustering",
    }


def test_the_dataset_carries_its_tokenizer(dataset):
    loaded = dataset.tokenizer()
    assert (loaded.fingerprint, loaded.end_id, loaded.vocab_size) == (dataset.tokenizer_fingerprint, dataset.eos_id, dataset.vocab_size)


def test_reads_are_in_the_order_asked_from_any_thread(dataset):
    reader = dataset.reader("bitext", "corpus")
    order = [7, 0, 7, 3, 12, 1]
    whole = reader.read(range(20))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for ids in pool.map(reader.read, [order] * 8):
            assert [part.tolist() for part in ids] == [whole[i].tolist() for i in order]
    assert reader.read([]) == []


def test_stage_1_takes_retrieval_sources_and_strips_instructions(raw, tokenizer, oracle, dataset, tmp_path):
    assert prepare.main(command(raw, tokenizer, tmp_path / "out", "--stage", "1")) == 0
    stage1 = records.load_dataset(tmp_path / "out")
    assert list(stage1.sources) == ["bitext"]
    table = pq.read_table(raw / "bitext.parquet").to_pydict()
    held_out = raw_rows(stage1, "bitext", "validation", table, oracle, lambda text: text.removeprefix(INSTRUCTION))
    assert held_out == raw_rows(dataset, "bitext", "validation", table, oracle)


def test_a_row_keeps_its_side_when_rows_are_appended(raw, tokenizer, oracle, dataset, tmp_path):
    before = pq.read_table(raw / "bitext.parquet").to_pydict()
    more = rows(150, 3, start=250)
    after = {name: before[name] + more[name] for name in before}
    write(tmp_path / "raw", "bitext", after)
    assert prepare.main(command(tmp_path / "raw", tokenizer, tmp_path / "out")) == 0
    longer = records.load_dataset(tmp_path / "out")
    for split in records.QUERY_SPLITS:
        kept = raw_rows(dataset, "bitext", split, before, oracle)
        assert [row for row in raw_rows(longer, "bitext", split, after, oracle) if row < 250] == kept


def test_a_source_of_one_row_has_nothing_held_out(tokenizer, tmp_path):
    write(tmp_path / "raw", "one", rows(1, 2))
    assert prepare.main(command(tmp_path / "raw", tokenizer, tmp_path / "out")) == 0
    dataset = records.load_dataset(tmp_path / "out")
    assert dataset.sources["one"].rows == {"train": 1, "validation": 0}
    assert dataset.tables("one", "validation").documents.shape == (0, 3)
    assert dataset.reader("one", "validation").read([]) == []


def spoil(name, row, value):
    def change(table):
        table[name][row] = value

    return change


MALFORMED = {
    "missing column": (lambda table: table.pop("passage"), ["has no column 'passage'", "--columns passage=NAME"]),
    "gap in negatives": (lambda table: table.pop("negative_2"), ["column 'negative_2' is missing"]),
    "null": (spoil("negative_2", 41, None), ["row 41, column 'negative_2' is null"]),
    "null query": (spoil("query", 3, None), ["row 3, column 'query' is null"]),
    "empty": (spoil("negative_3", 42, " \n\t"), ["row 42, column 'negative_3' is empty"]),
    "instruction without query": (spoil("query", 17, INSTRUCTION), ["row 17, column 'query' is empty"]),
    "wrong type": (lambda table: table.update(passage=list(range(50))), ["column 'passage' is int64, not string"]),
    "no rows": (lambda table: [column.clear() for column in table.values()], ["no rows"]),
    "invalid UTF-8": (
        lambda table: table.update(
            negative_1=pa.StringArray.from_buffers(50, pa.py_buffer(np.arange(51, dtype=np.int32).tobytes()), pa.py_buffer(b"\xff" * 50))
        ),
        ["row 0, column 'negative_1' is not valid UTF-8", "--skip-invalid"],
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_rows_and_schemas(case, tokenizer, tmp_path, capsys):
    change, expected = MALFORMED[case]
    table = rows(50, 3)
    change(table)
    write(tmp_path / "raw", "bad", table)
    assert_fails(tmp_path, tokenizer, capsys, "bad.parquet", *expected)


def test_truncated_parquet_and_all_schema_problems_at_once(tokenizer, tmp_path, capsys):
    write(tmp_path / "raw", "first", rows(5, 2))
    file = tmp_path / "raw" / "first.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    write(tmp_path / "raw", "second", {"query": ["q"], "passage": [1], "negative_2": ["n"]})
    missing = ["second.parquet: column 'negative_1' is missing"]
    assert_fails(tmp_path, tokenizer, capsys, "first.parquet: is not a readable parquet file", "truncated", *missing)


def test_damaged_pages(tokenizer, tmp_path, capsys):
    write(tmp_path / "raw", "bad", rows(500, 3))
    file = tmp_path / "raw" / "bad.parquet"
    content = bytearray(file.read_bytes())
    content[4:2000] = bytes(1996)
    file.write_bytes(content)
    assert_fails(tmp_path, tokenizer, capsys, "bad.parquet: rows from 0 on cannot be read", "damaged")


def test_tasks_files_and_empty_folders(tokenizer, tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    assert_fails(tmp_path, tokenizer, capsys, "holds no file of the forms *.parquet")
    write(tmp_path / "raw", "a", rows(5, 2), {"a": "guessing", "b": "retrieval"})
    assert_fails(
        tmp_path, tokenizer, capsys, "'b', but there is no b.parquet", "unknown kind 'guessing'", "retrieval, clustering, classification"
    )
    write(tmp_path / "raw", "a", rows(5, 2), {"a": "clustering"})
    assert_fails(tmp_path, tokenizer, capsys, "stage 1 trains on retrieval sources", more=["--stage", "1"])


def assert_fails(tmp_path, tokenizer, capsys, *expected, more=()):
    assert prepare.main(command(tmp_path / "raw", tokenizer, tmp_path / "out", *more)) == 1
    error = capsys.readouterr().err
    assert error.startswith("prepare: error: ") and "Traceback" not in error
    for part in expected:
        assert part in error
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial" / "dataset.json").exists()


def test_existing_output_is_reused_refused_or_replaced(tokenizer, tmp_path, capsys):
    write(tmp_path / "raw", "labels", rows(4, 1))
    out = tmp_path / "out"
    assert prepare.main(command(tmp_path / "raw", tokenizer, out)) == 0
    written = (out / "dataset.json").stat().st_mtime_ns
    assert prepare.main(command(tmp_path / "raw", tokenizer, out)) == 0
    assert (out / "dataset.json").stat().st_mtime_ns == written
    assert prepare.main(command(tmp_path / "raw", tokenizer, out, "--seed", "1")) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert records.load_dataset(out).seed == 0
    assert prepare.main(command(tmp_path / "raw", tokenizer, out, "--seed", "1", "--overwrite")) == 0
    assert records.load_dataset(out).seed == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    assert prepare.main(command(tmp_path / "raw", tokenizer, tmp_path, "--overwrite")) == 1
    assert "is read from there" in capsys.readouterr().err
    assert prepare.main(command(tmp_path / "raw", tokenizer, tmp_path / "mine", "--overwrite")) == 1
    assert "is not a prepared dataset" in capsys.readouterr().err
    assert (tmp_path / "raw" / "labels.parquet").exists()


def test_a_killed_run_continues_and_gives_the_same_dataset(raw, tokenizer, dataset, tmp_path, capfd):
    out = tmp_path / "out"
    run = [sys.executable, "-m", "f2llm_jax.prepare", *command(raw, tokenizer, out)]
    with subprocess.Popen(run, stderr=subprocess.PIPE, text=True) as process:
        assert "[1/3] bitext: 250 rows" in process.stderr.readline()
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    with pytest.raises(records.DatasetError, match="did not complete"):
        records.load_dataset(tmp_path / "out.partial")
    assert subprocess.run([*run, "--workers", "2"], timeout=120).returncode == 0
    error = capfd.readouterr().err
    assert "[1/3] bitext: 250 rows, complete from an earlier run" in error
    assert all(line.startswith(("[", "preparing: ")) or "took over the lock" in line for line in error.splitlines())
    for file in [dataset.folder / "dataset.json", *pathlib.Path(dataset.folder).rglob("*.npy")]:
        assert (out / file.relative_to(dataset.folder)).read_bytes() == file.read_bytes(), file
    continued = records.load_dataset(out)
    for source, info in dataset.sources.items():
        for split, count in (*info.rows.items(), ("corpus", info.documents)):
            ours, theirs = (opened.reader(source, split).read(range(count)) for opened in (continued, dataset))
            assert [ids.tolist() for ids in ours] == [ids.tolist() for ids in theirs]


def test_another_format_version_is_refused(dataset, tmp_path):
    content = json.loads((dataset.folder / "dataset.json").read_text())
    (tmp_path / "dataset.json").write_text(json.dumps(content | {"format_version": 99}))
    with pytest.raises(records.DatasetError, match="format_version 99"):
        records.load_dataset(tmp_path)
