"""What the files under `fixtures/formats` hold: the same four rows of pairs, six labels or five texts in every form."""

import csv
import gzip
import io
import json
import pathlib

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

FOLDER = pathlib.Path(__file__).parent / "fixtures" / "formats"
# Query, positive, negatives, language: with line ends in a cell, and texts that look like numbers.
ROWS = [
    ("who purrs", "the cat", ("the dog", "a mouse"), "en"),
    ("wer bellt", 'der Hund,\n"laut"', ("die Katze", "007"), "de"),
    ("où est-elle", "la maison", ("le chat\u2028noir", "true"), "fr"),
    ("007", "1.0", ("7", "1"), "en"),
]
LABELS = [("one", "007"), ("two", "7"), ("three", "true"), ("four", "1.0"), ("five", "2024-01-02"), ("six", "007")]
TEXTS = ["one", "", "two \u2028 parts", "cr\rhere", "007"]
NAMED_ONLY = ("array.json",)  # forms that a folder is not searched for


def paths(kind):
    """The files and folders of `pairs`, `labels` or `texts`."""
    return sorted(FOLDER.joinpath(kind).iterdir())


def pairs(path):
    """The rows that a form of pairs holds, in its order."""
    if path.name == "beir":  # no negatives, no languages
        return [(query, passage, (), "") for query, passage, _, _ in ROWS]
    if path.name == "late_columns.jsonl":  # the first row has neither
        return [(*ROWS[0][:2], (), ""), *ROWS[1:]]
    return sorted(ROWS, key=lambda row: row[3]) if path.name == "partitioned" else ROWS


# What the table of forms by commands is made of: the same columns in every form.

SHARDS = 2
ONE_FILE = ("jsonl", "json", "csv", "tsv", "jsonl.gz", "jsonl.zst", "csv.gz", "tsv.zst")
ARROW = ("parquet", "dictionary", "large_string", "lists", "folder", "partitioned", "arrow", "save_to_disk")
LINES = ("txt", "txt.gz", "txt.zst")
FORMS = (*ARROW, *ONE_FILE, *LINES, "beir", "gs://", "hf://")  # the last two hold a parquet file


def write(form, columns, path, partition):
    """A table in one form; returns where it lies.

    Args:
      form: of ARROW, ONE_FILE, LINES or "beir".
      columns: texts by name, of equal number; of lines only the first column, of a BEIR folder the first two.
      path: without a suffix.
      partition: the column that becomes folder names.
    """
    if form in ARROW:
        return _write_arrow(form, pa.table(columns), path, partition)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if form == "beir":
        return _write_beir(columns, path)
    kind, _, compression = form.partition(".")
    if kind == "jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    elif kind == "json":
        text = json.dumps(rows)
    elif kind == "txt":
        text = "".join(f"{text}\n" for text in next(iter(columns.values())))
    else:
        stream = io.StringIO()
        writer = csv.DictWriter(stream, list(columns), delimiter={"csv": ",", "tsv": "\t"}[kind])
        writer.writeheader()
        writer.writerows(rows)
        text = stream.getvalue()
    target = path.with_name(f"{path.name}.{form}")
    data = text.encode()
    target.write_bytes({"": lambda: data, "gz": lambda: gzip.compress(data), "zst": lambda: _zstd(data)}[compression]())
    return target


def _zstd(data):
    return pa.compress(data, "zstd", asbytes=True)


def _write_arrow(form, table, path, partition):
    if form in ("folder", "partitioned"):
        path.mkdir()
        if form == "partitioned":
            pq.write_to_dataset(table, path, partition_cols=[partition])
            return path
        cut = len(table) // SHARDS
        for i, part in enumerate((table.slice(0, cut), table.slice(cut))):
            pq.write_table(part, path / f"train-{i:05d}-of-{SHARDS:05d}.parquet")
        return path
    if form == "save_to_disk":
        datasets.Dataset(table).save_to_disk(path)
        return path
    if form == "arrow":
        target = path.with_name(f"{path.name}.arrow")
        with pa.OSFile(str(target), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        return target
    change = {
        "dictionary": lambda column: column.dictionary_encode(),
        "large_string": lambda column: column.cast(pa.large_string()),
        "lists": lambda column: pa.array([[text] for text in column.to_pylist()]),
        "parquet": lambda column: column,
    }[form]
    names = [name for name in table.column_names if form != "lists" or name not in ("query", "lang")]
    for name in names:
        table = table.set_column(table.column_names.index(name), name, change(table[name]))
    pq.write_table(table, path.with_name(f"{path.name}.parquet"))
    return path.with_name(f"{path.name}.parquet")


def _write_beir(columns, path):
    queries, documents = list(columns.values())[:2]
    (path / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", documents), ("queries", queries)):
        rows = [{"_id": str(i), "text": text} | ({"title": ""} if name == "corpus" else {}) for i, text in enumerate(texts)]
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = "".join(f"{i}\t{i}\t1\n" for i in range(len(queries)))
    for split in ("train", "test"):
        (path / f"qrels/{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return path
