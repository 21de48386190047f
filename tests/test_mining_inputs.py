"""What mining reads and builds, and what it says where it cannot."""

import dataclasses
import json
from collections import Counter

import jax
import jax.numpy as jnp
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from small_mining import LOOSE, export_model, run, shrink_all, text, write_pairs

from f2llm_jax import mine
from f2llm_jax.errors import UserError
from f2llm_jax.inputs.judged import read_documents
from f2llm_jax.mining import builders, inputs
from f2llm_jax.mining.run import mine as mine_with
from f2llm_jax.mining.selection import NegativeRules
from f2llm_jax.text import DEFAULT_QUERY_INSTRUCTION, query_prompt


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return export_model(tmp_path_factory.mktemp("mining"))


@pytest.fixture
def small(monkeypatch):
    shrink_all(monkeypatch)


def write_beir(folder, documents=60, change=lambda corpus, queries, qrels: None):
    """Documents 0 and 1 have one text under two ids; query 0 has two positives, and one of score 0 that is none."""
    corpus = [{"_id": f"d{i}", "title": f"title {i}" if i % 2 else "", "text": text(i)} for i in range(documents)]
    corpus[1] = corpus[0] | {"_id": "d1"}
    queries = [{"_id": f"q{i}", "text": f"what of {i}"} for i in range(12)]
    qrels = [(f"q{i}", f"d{i + 2}", 1) for i in range(10)] + [("q0", "d0", 1), ("q0", "d9", 0)]
    change(corpus, queries, qrels)
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in qrels)]
    (folder / "qrels" / "train.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_a_beir_folder(model, tmp_path, small):
    beir = write_beir(tmp_path / "beir")
    assert run(model, [beir], tmp_path / "out", "--corpus", str(beir), "--negatives", "50", "--skip", "0", *LOOSE) == 0
    rows = pq.read_table(tmp_path / "out" / "beir.parquet").to_pylist()
    assert len(rows) == 11  # queries 10 and 11 are not judged
    assert rows[1]["query"] == query_prompt(DEFAULT_QUERY_INSTRUCTION) + "what of 1"
    assert rows[1]["passage"] == f"title 3 {text(3)}"
    of_first = [row for row in rows if row["query"].endswith("what of 0")]
    assert {row["passage"] for row in of_first} == {text(2), text(0)}
    for row in of_first:  # neither its positives nor the copy of one under another id
        negatives = {row[f"negative_{n}"] for n in range(1, 51)}
        assert not negatives & {text(0), text(2)} and len(negatives) == 50
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps({"text": text(i)}) + "\n" for i in range(100, 150)))
    out = tmp_path / "other"
    assert run(model, [beir], out, "--corpus", str(tmp_path / "documents.jsonl"), "--negatives", "50", "--skip", "0", *LOOSE) == 0
    for row in pq.read_table(out / "beir.parquet").to_pylist():
        assert {row[f"negative_{n}"] for n in range(1, 51)} & {text(i) for i in range(100, 150)}


def test_a_text_is_never_its_own_negative_nor_that_of_its_paraphrases(model, tmp_path, small):
    """Rows go both ways: a text is a query with the instruction, a document without; what its paraphrase is paired with says the same."""
    first, second = [text(0), text(0), text(1), text(3)], [text(1), "caf\u00e9 " + text(2), text(5), text(4)]
    table = {"sentence1": [*first, *(text(i) for i in range(20, 60))], "sentence2": [*second, *(text(i) for i in range(60, 100))]}
    path = labelled(tmp_path / "sts.parquet", **table, score=[5.0] * 44)
    copies = ["cafe\u0301 " + text(2), query_prompt("Any.") + text(1), f" {text(5)}\n"]  # of paraphrases, in another form
    (tmp_path / "corpus.txt").write_text("\n".join([copies[0], "unrelated"]) + "\n", encoding="utf-8")
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in copies))
    corpus = ("--corpus", str(tmp_path / "corpus.txt"), str(tmp_path / "corpus.jsonl"))
    loose = ("--negatives", "70", "--nearest", "90", "--skip", "0", "--max-relative", "none", "--near-duplicate", "2")
    assert run(model, [path], tmp_path / "out", "--build", "sts", *corpus, *loose) == 0
    rows = pq.read_table(tmp_path / "out" / "sts.parquet").to_pylist()
    assert len(rows) == 88
    same = {text(0), text(1), "caf\u00e9 " + text(2), text(5)}  # 0 is paired with 1 and 2, and 1 with 5
    prompt = query_prompt("Retrieve semantically similar text.")
    for row in rows:
        negatives = {row[f"negative_{n}"] for n in range(1, 71)}
        own = row["query"].removeprefix(prompt)
        assert not negatives & {own, row["passage"]}
        if own in (text(0), text(1)):
            assert not negatives & same and not negatives & set(copies)
    assert any(text(5) in row.values() for row in rows if row["query"] == prompt + text(3))  # others are free to take them


def test_a_document_that_differs_behind_the_limit_is_no_negative(model, tmp_path, small):
    """To the model both are one text: their cosines with the query are equal."""
    start = "word " * 60
    rows = {"query": [f"what of {i}" for i in range(30)], "passage": [f"{start} one", *(text(i) for i in range(1, 30))]}
    pq.write_table(pa.table(rows), tmp_path / "pairs.parquet")
    (tmp_path / "corpus.txt").write_text(f"{start} two\nunrelated\n")
    more = ("--corpus", str(tmp_path / "corpus.txt"), "--max-length", "24", "--negatives", "29", "--skip", "0", "--nearest", "40", *LOOSE)
    assert run(model, [tmp_path / "pairs.parquet"], tmp_path / "out", *more) == 0
    first, *others = pq.read_table(tmp_path / "out" / "pairs.parquet").to_pylist()
    assert first["query"] == "what of 0" and f"{start} two" not in first.values()
    assert any(f"{start} two" in row.values() for row in others)
    total = json.loads((tmp_path / "out" / "summary.json").read_text())["total"]
    assert total["has the token ids of a positive"] == 1


def test_a_corpus_of_beir_named_as_a_file_has_its_titles(tmp_path):
    """Absent, null and empty titles are none, in a folder and in a file of it alone."""

    def titles(corpus, queries, qrels):
        corpus[2]["title"], corpus[3]["title"] = None, "A title"
        del corpus[4]["title"]

    beir = write_beir(tmp_path / "beir", change=titles)
    as_file = read_documents(beir / "corpus.jsonl").joined()
    assert as_file == read_documents(beir).joined()
    assert as_file[2:5] == [text(2), f"A title {text(3)}", text(4)]
    assert inputs.read_pairs(beir).passages[0] == text(2)


@pytest.mark.parametrize("score", ["0.9", "0.5", "1.0", "1", "3"])
def test_a_relevance_above_zero_is_relevant(tmp_path, score):
    def change(corpus, queries, qrels):
        qrels[:] = [("q0", "d2", score), ("q1", "d3", 0), ("q2", "d4", "0.0"), ("q3", "d5", -1)]

    found = inputs.read_pairs(write_beir(tmp_path / "beir", change=change))
    assert (len(found.queries), found.passages) == (1, [text(2)])


def duplicate(corpus, queries, qrels):
    corpus[5]["_id"] = "d4"


def unknown_document(corpus, queries, qrels):
    qrels[3] = ("q3", "d99", 1)


def unknown_query(corpus, queries, qrels):
    qrels[3] = ("q99", "d5", 1)


def no_positive(corpus, queries, qrels):
    qrels[:] = [(query, document, 0) for query, document, _ in qrels]


def empty(corpus, queries, qrels):
    corpus.clear()


def no_text(corpus, queries, qrels):
    corpus[4] |= {"title": "", "text": ""}


def not_a_number(corpus, queries, qrels):
    qrels[2] = ("q2", "d4", "nan")


def twice(corpus, queries, qrels):
    qrels[3] = (*qrels[2][:2], 2)


def malformed(corpus, queries, qrels):
    qrels[2] = ("q2", "d4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (duplicate, r"corpus.jsonl: row 5 has the id 'd4', as a row before it; ids must be distinct"),
        (unknown_document, r"train.tsv: row 3 \(line 5\) names the document 'd99', which .*corpus.jsonl does not have"),
        (unknown_query, r"train.tsv: row 3 \(line 5\) names the query 'q99', which .*queries.jsonl does not have"),
        (no_positive, r"train.tsv has no row with a score above 0"),
        (empty, r"corpus.jsonl has no rows"),
        (no_text, r"corpus.jsonl: row 4 has no text"),
        (malformed, r"train.tsv: row 2 has 2 cells, the header 3"),
        (not_a_number, r"train.tsv: row 2, column 'score' is 'nan', not a finite number"),
        (twice, r"train.tsv: row 3 \(line 5\) judges 'q2' and 'd4' a second time, and otherwise"),
    ],
)
def test_what_is_wrong_with_a_beir_folder(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        inputs.read_pairs(write_beir(tmp_path / "beir", change=change))


def test_errors_of_the_command_are_one_line_and_leave_nothing(model, tmp_path, small, capsys):
    write_pairs(tmp_path / "pairs.parquet", rows=30)
    pq.write_table(pa.table({"query": ["a", "b"], "passage": ["x", None]}), tmp_path / "null.parquet")
    pq.write_table(pa.table({"query": ["a", "b"]}), tmp_path / "no.parquet")
    pq.write_table(pa.table({"passage": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    pairs = tmp_path / "pairs.parquet"
    cases = {
        "null.parquet: row 1, column 'passage' is null": ([tmp_path / "null.parquet"],),
        "no.parquet has no column 'passage' or 'positive' or 'pos'": ([tmp_path / "no.parquet"],),
        "absent.parquet does not exist": ([tmp_path / "absent.parquet"],),
        "empty.parquet has no rows": ([pairs], "--corpus", str(tmp_path / "empty.parquet")),
        "--negatives 30 cannot be had: pairs can search 30 distinct documents, 29 besides": ([pairs], "--negatives", "30"),
        "--nearest 20 is fewer than --skip 5 and --negatives 24 together": ([pairs], "--nearest", "20"),
        "two inputs are one source by name: pairs": ([pairs, pairs],),
        "no row is left": ([pairs], "--negatives", "4", "--max-relative", "-5"),
    }
    for message, (queries, *more) in cases.items():
        before = sorted(tmp_path.iterdir())
        assert run(model, queries, tmp_path / "out", "--cache", str(tmp_path.parent / "cache"), *more) == 1
        assert f"mine: error: {message}" in capsys.readouterr().err.replace(f"{tmp_path}/", "").splitlines()[-1]
        assert sorted(tmp_path.iterdir()) == before
    again = ([pairs], tmp_path / "taken", "--cache", str(tmp_path / "c"), *LOOSE)
    assert run(model, *again, "--negatives", "4") == 0
    assert run(model, *again, "--negatives", "3") == 1
    assert "taken exists and was not made from these inputs by these rules" in capsys.readouterr().err
    assert run(model, *again, "--negatives", "3", "--overwrite") == 0


def test_vectors_that_are_not_finite(tmp_path, small):
    good = tiny.origin(tmp_path / "tokenizer")
    broken = dataclasses.replace(good, load=lambda mesh: jax.tree.map(lambda x: x * jnp.nan, good.load(mesh)))
    write_pairs(tmp_path / "pairs.parquet", rows=30)
    pairs = inputs.read_pairs(tmp_path / "pairs.parquet")
    with pytest.raises(UserError, match=r"vector of 'document 0.* is not finite"):
        mine_with(broken, [pairs], None, tmp_path / "out", NegativeRules(negatives=4, skip=0))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("**/*.np*"))


# Labelled files


def labelled(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def test_nli(model, tmp_path, small):
    """Contradicted, then neutral, then mined; what a premise entails is never its negative."""
    premise, hypothesis, label = [], [], []
    for i in range(40):
        rows = [(f"h{i} entailed", 0), (f"h{i} also entailed", "entailment"), (f"h{i} neutral", 1), (f"h{i} contradicted", "contradiction")]
        for name, kind in rows if i else rows[2:]:  # the first entails nothing
            premise.append(f"premise {i}")
            hypothesis.append(name)
            label.append(str(kind))
    path = labelled(tmp_path / "nli.parquet", premise=premise, hypothesis=hypothesis, label=label)
    assert run(model, [path], tmp_path / "out", "--build", "nli", "--negatives", "6", "--skip", "0", *LOOSE) == 0
    rows = pq.read_table(tmp_path / "out" / "nli.parquet").to_pylist()
    assert len(rows) == 78
    prompt = query_prompt("Given a premise, retrieve hypotheses that are entailed by the premise.")
    for row in rows:
        number = row["query"].removeprefix(prompt + "premise ")
        negatives = [row[f"negative_{n}"] for n in range(1, 7)]
        assert negatives[:2] == [f"h{number} contradicted", f"h{number} neutral"] and len(set(negatives)) == 6
        assert not {f"h{number} entailed", f"h{number} also entailed"} & set(negatives)
        assert row["scores"][3:] == sorted(row["scores"][3:], reverse=True)


def test_sts(tmp_path):
    first, second = ["a", "b", "c", "d"], ["A", "B", "C", "d"]
    path = labelled(tmp_path / "sts.parquet", sentence1=first, sentence2=second, score=[4.0, 5.0, 3.9, 5.0])
    pairs, counters = builders.build("sts", path, "", 24, 0)
    assert list(zip(pairs.queries, pairs.passages, strict=True)) == [("a", "A"), ("A", "a"), ("b", "B"), ("B", "b")]
    assert counters == Counter({"pairs of a score below 4": 1, "pairs of equal texts": 1})


def test_classification_and_clustering_need_no_model(tmp_path, capsys):
    labels = ["toxic", "not toxic"]
    path = labelled(tmp_path / "toxic.parquet", text=[f"t{i}" for i in range(50)], label=[labels[i % 2] for i in range(50)])
    assert mine.main(["--build", "classification", "--queries", str(path), "--out", str(tmp_path / "a")]) == 0
    rows = pq.read_table(tmp_path / "a" / "toxic.parquet").to_pylist()
    assert [(row["passage"], row["negative_1"]) for row in rows[:2]] == [("toxic", "not toxic"), ("not toxic", "toxic")]
    assert json.loads((tmp_path / "a" / "tasks.json").read_text()) == {"toxic": "classification"}

    topic = [i % 7 for i in range(105)]
    path = labelled(tmp_path / "topics.parquet", text=[f"x{i}" for i in range(105)], label=topic)
    assert mine.main(["--build", "clustering", "--queries", str(path), "--out", str(tmp_path / "b")]) == 0
    rows = pq.read_table(tmp_path / "b" / "topics.parquet").to_pylist()
    assert len(rows) == 105
    number = lambda name: int(name.rsplit("x", 1)[1])  # noqa: E731
    for row in rows:
        own = number(row["query"])
        assert number(row["passage"]) != own and topic[number(row["passage"])] == topic[own]
        others = [number(row[f"negative_{n}"]) for n in range(1, 25)]
        assert len(set(others)) == 24 and topic[own] not in {topic[other] for other in others}
    assert mine.main(["--build", "classification", "--queries", str(path), "--out", str(tmp_path / "c")]) == 1
    assert "has 7 labels, classification is between two" in capsys.readouterr().err


def test_columns_of_the_corpus_are_named_by_its_own_roles(model, tmp_path, small, capsys):
    """Pairs have no role `text`, so it is the corpus's; a column that no corpus has is an error, and not the one of the role's name."""
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"frage": f"q {i}", "positive": f"p {i}"}) + "\n" for i in range(3)))
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"id": i, "abstract": f"d {i}", "text": f"x {i}"}) + "\n" for i in range(4)))
    flags = ["--model", str(model), "--queries", str(tmp_path / "q.jsonl"), "--corpus", str(tmp_path / "c.jsonl"), "--negatives", "5"]
    flags += ["--skip", "0", "--max-score", "none", "--max-relative", "none", "--near-duplicate", "2", "--out", str(tmp_path / "out")]
    assert mine.main([*flags, "--columns", "query=frage,text=abstrakt"]) == 1
    assert "no file has the column 'abstrakt'; did you mean 'abstract'?" in capsys.readouterr().err
    assert mine.main([*flags, "--columns", "query=frage,text=abstract", "--ignore-columns", "text"]) == 0
    (row, *_) = pq.read_table(tmp_path / "out" / "q.parquet").to_pylist()
    assert {row[f"negative_{n}"] for n in range(1, 6)} <= {f"d {i}" for i in range(4)} | {f"p {i}" for i in range(3)}
    with pytest.raises(SystemExit):
        mine.main([*flags, "--max-score", "nan"])


@pytest.mark.parametrize(
    ("form", "columns", "message"),
    [
        ("nli", {"premise": ["a"], "hypothesis": ["b"], "label": ["maybe"]}, "row 0 has the label 'maybe'"),
        ("nli", {"premise": ["a"], "label": ["neutral"]}, "has no column 'hypothesis', only premise, label"),
        ("nli", {"premise": ["a"], "hypothesis": ["b"], "label": ["neutral"]}, "makes no row of the form 'nli'"),
        ("sts", {"sentence1": ["a"], "sentence2": ["b"], "score": ["high"]}, "row 0, column 'score' is 'high', not a finite number"),
        ("sts", {"sentence1": ["a"], "sentence2": ["b"], "score": [80.0]}, "row 0 has the score 80; scores of STS go from 0 to 5"),
        ("sts", {"sentence1": ["a"], "sentence2": ["b"], "score": [0.9]}, "check its labels or the scale of its scores"),
        ("sts", {"sentence1": ["a"], "sentence2": [None], "score": [4.0]}, "row 0, column 'sentence2' is null"),
        ("clustering", {"text": ["a", "b", "c"], "label": ["x", "x", "y"]}, "fewer than --negatives 24 texts of other labels"),
    ],
)
def test_labels_that_cannot_be_built_with(tmp_path, form, columns, message):
    with pytest.raises(UserError, match=message):
        builders.build(form, labelled(tmp_path / "in.parquet", **columns), None, 24, 0)
