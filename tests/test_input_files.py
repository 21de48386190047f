"""The rules of lines, values and folders of a user's files."""

import gzip
import shutil

import formats
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from input_files import lines, refused, rows_of

from f2llm_jax.errors import UserError
from f2llm_jax.inputs import pairs
from f2llm_jax.inputs.fields import TEXTS, read_fields
from f2llm_jax.inputs.folders import find_sources, open_table
from f2llm_jax.mining import builders
from f2llm_jax.mining.inputs import read_pairs

pytestmark = [pytest.mark.filterwarnings(f"ignore:::{module}") for module in ("tensorflow_datasets", "apache_beam")]


# Lines and values


def test_lists_of_categories_over_row_groups(tmp_path):
    """pandas writes categories as a dictionary for each row group, which Arrow does not join within lists."""
    texts = [["a", "b"], ["c"], None, ["b", "a", "d"], []]
    negatives = pa.array(texts, pa.list_(pa.dictionary(pa.int32(), pa.string())))
    table = pa.table({"query": list("12345"), "passage": list("pqrst"), "negatives": negatives})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert [row[2] for row in rows_of(tmp_path / "a.parquet")] == [found or [] for found in texts]


def test_a_document_of_megabytes_and_columns_far_down(tmp_path):
    rows = [{"query": f"q{i}", "passage": "p" * (2_000_000 if i == 700 else 1)} for i in range(1500)]
    rows[1400] |= {"negatives": ["n"], "lang": "de"}
    path = lines(tmp_path / "a.jsonl", *rows)
    found = read_pairs(path)
    assert (len(found.passages[700]), found.given[1400], found.languages[1400]) == (2_000_000, ["n"], "de")
    assert not any(found.given[:1400]) and pairs.open_pairs(path)[0].negatives == 1


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_only_line_feeds_end_a_line(tmp_path, end):
    (tmp_path / "a.txt").write_bytes(end.join(["a\rb", "c\u2028d", "\x0b", "e\x85f", ""]).encode())
    assert read_fields(tmp_path / "a.txt", TEXTS, {"text": "any text"}).joined() == ["a\rb", "c\u2028d", "\x0b", "e\x85f"]
    (tmp_path / "a.csv").write_bytes(end.join(["query,passage", '"a\rb","c\r\nd"', "", ""]).encode())
    assert rows_of(tmp_path / "a.csv") == [("a\rb", "c\r\nd", [])]
    (tmp_path / "b.csv").write_bytes(end.join(["query,passage", "a\rb,c", ""]).encode())  # as pandas writes it
    assert rows_of(tmp_path / "b.csv") == [("a\rb", "c", [])]


def test_blank_lines_end_a_file_and_nothing_else(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"query": "q", "passage": "p"}\n\n\n')
    assert len(rows_of(tmp_path / "a.jsonl")) == 1
    (tmp_path / "b.jsonl").write_text('{"query": "q", "passage": "p"}\n\n{"query": "q", "passage": "p"}\n')
    refused(tmp_path / "b.jsonl", "row 1 is a blank line")
    (tmp_path / "b.csv").write_text("query,passage\nq,p\n\nq,p\n")
    refused(tmp_path / "b.csv", "row 1 has 0 cells")


def test_rows_that_come_of_joining_or_of_a_stray_quote(tmp_path):
    (tmp_path / "a.csv").write_text("query,passage\nq,p\nquery,passage\nr,p\n")  # as `cat a.csv b.csv` makes it
    refused(tmp_path / "a.csv", "row 1 repeats the header")
    (tmp_path / "b.tsv").write_text('query\tpassage\nq\t"begins\nr\tends"\n')
    refused(tmp_path / "b.tsv", "row 0 has line ends and tabs within one pair of quotes")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "query;passage\nq;p, r\n", "begins with 'query;passage': its cells are to have ',' between them"),  # Excel, in Europe
        ("a.csv", "sep=,\nquery,passage\nq,p\n", "no line of Excel's before the header"),
        ("a.csv", "query\tpassage\nq\tp\n", "are to have ',' between them"),
        ("a.tsv", "query,passage\nq,p\n", "are to have '\\\\t' between them"),
        ("a.csv", "query,passage\rq,p\rr,s\r", "ends its lines in carriage returns alone"),  # Excel, for the old Macintosh
        ("a.csv", "query,passage\nq,p\n".encode("utf-32"), "is UTF-32 and not UTF-8"),
        ("a.csv", b"PK\3\4...", "is a zip \\(or Excel\\) file"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "is a gzip file"),
        ("a.xlsx", b"", "is of no form that is read by its suffix"),
    ],
)
def test_files_of_other_delimiters_lines_and_forms_are_called_that(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=message):
        rows_of(tmp_path / name)


def test_a_text_may_begin_as_a_binary_file_does(tmp_path):
    (tmp_path / "a.txt").write_text("PAR1 is a receptor\nARROW1\n")
    assert read_fields(tmp_path / "a.txt", TEXTS, {"text": "any text"}).values["text"] == ["PAR1 is a receptor", "ARROW1"]


def test_a_truncated_or_joined_stream(tmp_path):
    data = b'{"query": "q", "passage": "p"}\n' * 50
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data) + gzip.compress(data))
    assert len(rows_of(tmp_path / "a.jsonl.gz")) == 100  # two members, as `cat a.gz b.gz` makes them
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data)[:-9])
    refused(tmp_path / "b.jsonl.gz", "is not a readable jsonl.gz file")


def test_classes_of_the_datasets_library_are_their_names(tmp_path):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "a.parquet", tmp_path / "saved"):
        built, _ = builders.build("classification", path, "", 1, 0)
        assert [*zip(built.queries, built.passages, built.given, strict=True)] == [("a", "yes", [["no"]][0]), ("b", "no", ["yes"])]


# Folders


def test_what_a_folder_holds(tmp_path):
    for file in ("a.parquet", "inner/part.parquet", "inner/.hidden.parquet"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"query": ["q"], "passage": ["p"]}), tmp_path / file)
    for file in ("._a.parquet", "_SUCCESS", "README.md", "notes.txt"):
        (tmp_path / file).write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "pictures").mkdir()
    found = find_sources(tmp_path)
    assert sorted(found.paths) == ["a", "inner"] and found.hidden == 2
    assert found.unread == ["README.md", "notes.txt", "pictures/"]
    assert [file.rows for file in open_table(tmp_path / "inner")] == [1]


def copy(name, folder):
    shutil.copytree(formats.FOLDER / "pairs" / name, folder)
    return folder


def test_folders_that_may_be_more_than_one_table(tmp_path):
    shards = copy("sharded", tmp_path / "shards")
    (shards / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(UserError, match="shard train-00001-of-00002 is missing"):
        open_table(shards)
    shutil.copy(shards / "train-00000-of-00002.parquet", shards / "test-00000-of-00001.parquet")
    with pytest.raises(UserError, match="holds shards of test, train"):
        open_table(shards)
    mixed = copy("sharded", tmp_path / "mixed")
    (mixed / "a.csv").write_text("query,passage\nq,p\n")
    with pytest.raises(UserError, match="holds files of the forms csv, parquet"):
        open_table(mixed)
    copy("sharded", tmp_path / "outer" / "inner")
    pq.write_table(pa.table({"query": ["q"], "passage": ["p"]}), tmp_path / "outer" / "a.parquet")
    with pytest.raises(UserError, match="has the sub-folder 'inner', which may be another table"):
        open_table(tmp_path / "outer")


def shard(folder, name):
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"query": [name], "passage": ["p"]}), folder / f"{name}.parquet")


def test_shards_are_one_table_wherever_they_lie(tmp_path):
    for i in range(3):
        shard(tmp_path / "whole", f"data-{i + 1:02d}-of-03")  # numbered from 1
        shard(tmp_path / "part", f"data_{i:04d}_of_0004")
    (tmp_path / "whole" / "README.md").write_text("")
    found = find_sources(tmp_path / "whole")
    assert list(found.paths.values()) == [tmp_path / "whole"] and found.unread == ["README.md"]
    assert len(rows_of(tmp_path / "whole")) == 3
    with pytest.raises(UserError, match="shard data-0003-of-0004 is missing"):
        open_table(tmp_path / "part")
    shard(tmp_path / "whole", "data-00-of-01")
    with pytest.raises(UserError, match="holds shards of 01 and of 03 files"):
        open_table(tmp_path / "whole")
    shard(tmp_path / "part", "other")
    with pytest.raises(UserError, match="next to other sources; give them their own folder"):
        find_sources(tmp_path / "part")


def test_shards_with_a_digest_behind_their_number_are_shards(tmp_path):
    """As `Dataset.push_to_hub` named them until 2023."""
    names = [f"train-{i:05d}-of-00002-6ef3991c06080e1{i}.parquet" for i in range(2)]
    for i, name in enumerate(names):
        pq.write_table(pa.table({"query": [f"q{i}"], "passage": ["p"]}), tmp_path / name)
    assert [query for query, _, _ in rows_of(tmp_path)] == ["q0", "q1"]
    assert find_sources(tmp_path).paths == {tmp_path.name: tmp_path}
    (tmp_path / names[1]).unlink()
    with pytest.raises(UserError, match="shard train-00001-of-00002 is missing"):
        rows_of(tmp_path)


def test_a_folder_that_spark_wrote_is_one_table(tmp_path):
    """Of which parts may have no rows; a part without its header is not one of them, though its only line is taken for one."""
    for i, rows in enumerate((["q0"], [], ["q2"])):
        content = "query,passage\n" + "".join(f"{query},p\n" for query in rows)
        (tmp_path / f"part-{i:05d}-7be3-c000.csv").write_text(content)
    assert len(find_sources(tmp_path).paths) == 3
    (tmp_path / "_SUCCESS").touch()
    assert find_sources(tmp_path).paths == {tmp_path.name: tmp_path}
    assert [query for query, _, _ in rows_of(tmp_path)] == ["q0", "q2"]
    (tmp_path / "part-00001-7be3-c000.csv").write_text("q1,p\n")
    with pytest.raises(UserError, match=r"part-00001-7be3-c000\.csv: no rows"):
        rows_of(tmp_path)


@pytest.mark.parametrize("held_out", ["test", "validation", "dev"])
def test_the_splits_of_a_dataset_are_not_taken_together(tmp_path, held_out):
    """As files and as folders, by prepare and by what reads a folder as one table: held-out rows would be trained on."""
    for name in ("train", held_out):
        (tmp_path / "folders" / name).mkdir(parents=True)
        for path in (tmp_path / f"{name}.csv", tmp_path / "folders" / name / "a.csv"):
            path.write_text("query,passage\nq,p\n")
    for folder in (tmp_path, tmp_path / "folders"):
        for read in (find_sources, open_table):
            with pytest.raises(UserError, match=rf"holds the splits train and {held_out} of one dataset; name one, such as .*train"):
                read(folder)
    (tmp_path / "folders" / "train").rename(tmp_path / "folders" / "quora")
    assert set(find_sources(tmp_path / "folders").paths) == {"quora", held_out}


def test_a_file_and_its_compressed_copy_are_not_two(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"query": "q", "passage": "p"}\n')
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    with pytest.raises(UserError, match=r"holds a.jsonl and a.jsonl.gz, which are one table by name"):
        open_table(tmp_path)


def test_splits_that_were_saved_together_are_named(tmp_path):
    import datasets

    split = datasets.Dataset.from_dict({"query": ["q"], "passage": ["p"]})
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "both")
    with pytest.raises(UserError, match=rf"holds the splits train, test .*{tmp_path}/both/train, {tmp_path}/both/test"):
        open_table(tmp_path / "both")
    assert rows_of(tmp_path / "both" / "train") == [("q", "p", [])]


def test_files_of_another_place_are_read_alike(tmp_path, monkeypatch):
    """`hf://` and `gs://` are fsspec's; here its memory stands for the Hub."""
    import fsspec
    from etils.epath import backend

    hub = fsspec.filesystem("memory")
    original = backend.fsspec_backend.fs
    monkeypatch.setattr(backend.fsspec_backend, "fs", lambda path: hub if str(path).startswith("hf://") else original(path))
    for path in (path for path in formats.paths("pairs") if path.is_file()):
        hub.pipe(f"hf://datasets/us/pairs/{path.name}", path.read_bytes())
        remote, local = (read_pairs(place) for place in (f"hf://datasets/us/pairs/{path.name}", path))
        assert (remote.queries, remote.passages, remote.given) == (local.queries, local.passages, local.given)
