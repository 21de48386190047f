"""What the columns of a user's file mean, and which are refused."""

import csv
import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from input_files import lines, refused, rows_of

from f2llm_jax.errors import UserError
from f2llm_jax.inputs import pairs
from f2llm_jax.inputs.columns import ColumnChoice, check_ignored, meaning
from f2llm_jax.mining.inputs import read_pairs
from f2llm_jax.preparation.sources import find_sources
from f2llm_jax.text import query_prompt

pytestmark = [pytest.mark.filterwarnings(f"ignore:::{module}") for module in ("tensorflow_datasets", "apache_beam")]


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
    (opened,) = pairs.open_pairs(path, ColumnChoice(ignored=(extra,)))
    assert opened.columns.ignored == (extra,) and f"ignored: {extra}" in opened.describe()


def test_a_column_is_left_out_by_the_name_that_finds_it(tmp_path):
    """Case and spaces tell no two columns apart, so they hide none from --ignore-columns; of two, the one of that very name is meant."""
    write_csv(tmp_path / "a.csv", {"sentence1": ["a"], "sentence2": ["b"], " Score ": ["0.1"], "Hard-Negative": ["c"]})
    choice = ColumnChoice({"query": "sentence1", "passage": "sentence2"}, ("score", "hard_neg*"))
    (found,) = pairs.open_pairs(tmp_path / "a.csv", choice)
    assert not found.scored and not found.negatives
    write_csv(tmp_path / "b.csv", {"Query": ["a"], "query": ["b"], "passage": ["c"]})
    for ignored, query in (("Query", "b"), ("query", "a")):
        assert read_pairs(tmp_path / "b.csv", choice=ColumnChoice(ignored=(ignored,))).queries == [query]


def test_a_column_to_leave_out_is_in_one_of_the_files_at_least(tmp_path):
    (tmp_path / "raw").mkdir()
    lines(tmp_path / "raw" / "a.jsonl", {"query": "q", "passage": "p", "negative": "n", "old_id": 1})
    lines(tmp_path / "raw" / "b.jsonl", {"query": "q", "passage": "p"})
    assert len(find_sources(tmp_path / "raw", stage=2, choice=ColumnChoice(ignored=("Negative", "old_*")))) == 2
    with pytest.raises(UserError, match=r"--ignore-columns negativ: no file has such a column; did you mean 'negative'\?"):
        find_sources(tmp_path / "raw", stage=2, choice=ColumnChoice(ignored=("negativ", "old_id")))


def test_a_column_to_leave_out_may_be_in_any_file_of_a_beir_folder(tmp_path):
    (tmp_path / "qrels").mkdir()
    lines(tmp_path / "corpus.jsonl", {"_id": "d", "text": "t", "title": "", "old_score": 1.0})
    lines(tmp_path / "queries.jsonl", {"_id": "q", "text": "t"})
    (tmp_path / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    for read in (pairs.open_pairs, lambda path, choice: read_pairs(path, choice=choice)):
        choice = ColumnChoice(ignored=("old_score",))
        read(tmp_path, choice)
        check_ignored(choice)
    with pytest.raises(UserError, match="no file has such a column"):
        check_ignored(dataclasses.replace(choice, ignored=("older_score",)))


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
        pairs.open_pairs(path, ColumnChoice(given))
    assert all(part in str(error.value) for part in parts)


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
