"""Every form of file through every command that reads it, and the rules of columns, folders and lines."""

import csv
import gzip
import json
import shutil

import formats
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from f2llm_jax import embed, mine, prepare, recall
from f2llm_jax.data import records
from f2llm_jax.errors import UserError
from f2llm_jax.evaluation import retrieval
from f2llm_jax.evaluation.local_tasks import read_manifest
from f2llm_jax.inputs import pairs
from f2llm_jax.inputs.columns import Choice, meaning
from f2llm_jax.inputs.fields import TEXTS, read_fields
from f2llm_jax.inputs.folders import find_sources, open_table
from f2llm_jax.mining import builders
from f2llm_jax.mining.inputs import read_pairs
from f2llm_jax.release import hf_folder
from f2llm_jax.text import DEFAULT_QUERY_INSTRUCTION, query_prompt

pytestmark = [pytest.mark.filterwarnings(f"ignore:::{module}") for module in ("tensorflow_datasets", "apache_beam")]
name = lambda path: path.name  # noqa: E731


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    hf_folder.export(tiny.origin(folder / "tokenizer"), folder / "model", hf_folder.Form(golden=False))
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


# Columns


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refused(path, *parts, choice=None):
    """Every command refuses the file, with these parts in the message."""
    for read in (lambda: pairs.open_pairs(path, choice or Choice()), lambda: read_pairs(path, None, choice or Choice())):
        with pytest.raises(UserError) as error:
            read()
        for part in (path.name, *parts):
            assert part in str(error.value)


@pytest.mark.parametrize(
    ("extra", "what", "offer"),
    [
        ("pasage_2", "a positive", "--columns passage=pasage_2"),
        ("pos_relevance", "a score", "--columns scores=pos_relevance"),
        ("docid", "an id", "--ignore-columns docid"),
        ("query-id", "an id", "--ignore-columns query-id"),
        ("title", "a title", "--columns passage=title+passage"),
        ("hard_negatve", "a negative", "--columns negative=hard_negatve"),
        ("prompt", "an instruction", "--columns instruction=prompt"),
        ("Question Text", "a positive", "--ignore-columns Question Text"),
        ("label", "a score", "--ignore-columns label"),
    ],
)
def test_a_column_that_means_something_is_never_dropped(tmp_path, extra, what, offer):
    path = lines(tmp_path / "a.jsonl", {"query": "q", "passage": "p"}, {"query": "q", "passage": "p", extra: "x"})
    refused(path, f"column {extra!r} looks like {what} and is not used", offer)
    (opened,) = pairs.open_pairs(path, Choice(ignored=(extra,)))
    assert opened.columns.ignored == (extra,) and f"ignored: {extra}" in opened.describe()


def test_a_column_is_left_out_by_the_name_that_finds_it(tmp_path):
    """Case and spaces tell no two columns apart, so they hide none from --ignore-columns; of two, the one of that very name is meant."""
    write_csv(tmp_path / "a.csv", {"sentence1": ["a"], "sentence2": ["b"], " Score ": ["0.1"], "Hard-Negative": ["c"]})
    choice = Choice({"query": "sentence1", "passage": "sentence2"}, ("score", "hard_neg*"))
    (found,) = pairs.open_pairs(tmp_path / "a.csv", choice)
    assert not found.scored and not found.negatives
    write_csv(tmp_path / "b.csv", {"Query": ["a"], "query": ["b"], "passage": ["c"]})
    for ignored, query in (("Query", "b"), ("query", "a")):
        assert read_pairs(tmp_path / "b.csv", choice=Choice(ignored=(ignored,))).queries == [query]


def test_columns_without_a_meaning_are_ignored_and_named(tmp_path):
    path = lines(
        tmp_path / "a.jsonl", {"query": "q", "passage": "p", "source": "s", "url": "u", "date": 7, "split": "x", "__index_level_0__": 1}
    )
    (opened,) = pairs.open_pairs(path)
    assert opened.describe().endswith("query, passage; ignored: source, url, date, split, __index_level_0__; 0 negatives a row")
    assert meaning("resource") is meaning("outcome") is meaning("space") is meaning("document_language") is None


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"pasage": "answer"}, ["'pasage' is no role", "did you mean 'passage'"]),
        ({"passage": "anwser"}, ["no column 'anwser'", "did you mean 'answer'"]),
        ({"query": "question", "anchor": "question"}, ["the query is named twice"]),
        ({"query": "question", "passage": "question"}, ["column 'question' is named for two roles"]),
    ],
)
def test_columns_that_cannot_be_meant(tmp_path, given, parts):
    path = lines(tmp_path / "a.jsonl", {"question": "q", "answer": "p"})
    with pytest.raises(UserError) as error:
        pairs.open_pairs(path, Choice(given))
    assert all(part in str(error.value) for part in parts)


def rows_of(path, **given):
    """Query, positive and negatives of each row, as `mine` reads them."""
    found = read_pairs(path, None, Choice(given))
    return [*zip(found.queries, found.passages, found.given, strict=True)]


def test_aliases_given_by_hand_are_roles(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"frage": "q", "passage_text": "p", "hard_neg": "n", "more": ["a", "b"]})
    given = {"anchor": "frage", "positive": "passage_text", "negative": "hard_neg", "negatives": "more"}
    assert rows_of(path, **given) == [("q", "p", ["n", "a", "b"])]


def test_two_names_for_one_role_are_refused(tmp_path):
    refused(lines(tmp_path / "a.jsonl", {"query": "q", "anchor": "a", "passage": "p"}), "'query' and 'anchor' may both be the query")
    refused(lines(tmp_path / "b.jsonl", {"query": "q", "Query": "a", "passage": "p"}), "'query' and 'Query' may both be the query")


def test_titles_are_joined_where_the_user_says(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"query": "q", "title": "T", "text": "one"}, {"query": "q2", "title": None, "text": "two"})
    assert rows_of(path, passage="title+text") == [("q", "T one", []), ("q2", "two", [])]


def test_several_positives_become_several_rows_and_are_no_negatives(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"query": "q", "pos": ["a", "b"], "neg": ["x"]}, {"query": "r", "pos": "c", "neg": "y"})
    assert rows_of(path) == [("q", "a", ["x"]), ("q", "b", ["x"]), ("r", "c", ["y"])]
    (opened,) = pairs.open_pairs(path)
    assert opened.rows == 3


def test_passages_that_are_objects(tmp_path):
    """As Tevatron writes them: the text of one is its title and its text."""
    passages = [{"docid": "1", "title": "T", "text": "a"}, {"docid": 2, "text": "b"}]
    path = lines(tmp_path / "a.jsonl", {"query": "q", "positive_passages": passages, "negative_passages": [{"title": None, "text": "x"}]})
    assert rows_of(path) == [("q", "T a", ["x"]), ("q", "b", ["x"])]
    judged = lines(tmp_path / "b.jsonl", {"query": "q", "positive": "p", "negative_passages": [{"text": "x", "score": 3}]})
    with pytest.raises(UserError, match=r"row 0, column 'negative_passages\[0\]' is an object of text, score, not a text"):
        rows_of(judged)


def test_an_instruction_of_a_row_goes_to_a_query_that_has_none(tmp_path):
    own = query_prompt("Own.") + "q"
    path = lines(tmp_path / "a.jsonl", *({"query": query, "instruction": "Find.", "passage": "p"} for query in ("q", own)))
    assert [query for query, *_ in rows_of(path)] == [query_prompt("Find.") + "q", own]


def test_a_single_column_is_a_list_only_if_all_its_texts_spell_one(tmp_path):
    (tmp_path / "a.csv").write_text('query,passage,negative\nq,p,"[""a"", ""b""]"\nr,p,"[""c""]"\n')
    assert rows_of(tmp_path / "a.csv") == [("q", "p", ["a", "b"]), ("r", "p", ["c"])]
    (tmp_path / "b.csv").write_text('query,passage,negative\nq,p,"[""a"", ""b""]"\nr,p,plain\n')
    assert rows_of(tmp_path / "b.csv") == [("q", "p", ['["a", "b"]']), ("r", "p", ["plain"])]
    (tmp_path / "c.csv").write_text("query,passage,negatives\nq,p,a; b\n")
    with pytest.raises(UserError, match=r"c.csv: row 0, column 'negatives\[0\]' is not a JSON list of texts"):
        rows_of(tmp_path / "c.csv")
    (tmp_path / "d.csv").write_text('query,passage,negatives\nq,p,"[\'a\', ""b\'c""]"\n')  # as pandas writes a list
    assert rows_of(tmp_path / "d.csv") == [("q", "p", ["a", "b'c"])]


def write_csv(path, columns):
    """As pandas does: a list is what `str` makes of it."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([list(columns), *zip(*columns.values(), strict=True)])


@pytest.mark.parametrize(
    "cell",
    [
        str(np.array(["a", "b c"], object)),  # pandas, of a list column that it read from parquet: Python joins the two texts
        str(np.array([{"text": "a"}, {"text": "b"}])),
        str(["a", float("nan")]),
        str(["a", None]),
        "[a, b]",  # DuckDB
    ],
)
@pytest.mark.parametrize("column", ["negative", "negatives", "pos"])
def test_lists_that_other_software_spells_are_refused(tmp_path, cell, column):
    """Alone, and after a row that spells a list as it should: that row is no text for the other's sake."""
    given = {"query": ["q", "r"], **({} if column == "pos" else {"passage": ["p", "s"]}), column: [json.dumps(["x"]), cell]}
    for first in (0, 1):
        write_csv(tmp_path / "a.csv", {name: cells[first:] for name, cells in given.items()})
        with pytest.raises(UserError, match=rf"a.csv: row {1 - first}, column '{column}.*not a JSON list of texts"):
            rows_of(tmp_path / "a.csv")
    awkward = [["it's", 'x"y'], ["a\n'b' 'c'", "d'' \"e\" 'f"], ["b\\'", "''"]]
    write_csv(tmp_path / "b.csv", {"query": list("qrs"), "passage": list("abc"), "negative": awkward})
    assert [negatives for _, _, negatives in rows_of(tmp_path / "b.csv")] == awkward


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("a.csv", b"query,passage,query\n1,2,3\n"),
        ("a.tsv", b"query\tpassage\tquery\n1\t2\t3\n"),
        ("a.jsonl", b'{"query": "1", "passage": "2", "query": "3"}\n'),
        ("a.json", b'[{"query": "1", "passage": "2", "query": "3"}]'),
    ],
)
def test_two_columns_of_one_name_are_refused(tmp_path, file, content):
    (tmp_path / file).write_bytes(content)
    refused(tmp_path / file, "'query'")


def test_two_columns_of_one_name_in_parquet(tmp_path):
    pq.write_table(pa.Table.from_arrays([pa.array(["1"])] * 3, names=["query", "passage", "query"]), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "2 columns of the name 'query'")


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
        ("a.jsonl", gzip.compress(b"{}"), "is a gzip file"),
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
    for path in (path for path in PAIR_PATHS if path.is_file()):
        hub.pipe(f"hf://datasets/us/pairs/{path.name}", path.read_bytes())
        remote, local = (read_pairs(place) for place in (f"hf://datasets/us/pairs/{path.name}", path))
        assert (remote.queries, remote.passages, remote.given) == (local.queries, local.passages, local.given)
