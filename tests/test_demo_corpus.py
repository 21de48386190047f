"""The embedded corpus: raw layout, nothing held out leaks into training, determinism, tokenizer."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers

from f2llm_jax import text
from f2llm_jax.errors import UserError
from f2llm_jax.preparation import demo_corpus, library_code

HELDOUT = ("bitext", "zero_shot", "code")
CORPUS = "ee4e494852f69057"  # of the seed 0
SOURCE = '''
class A:
    @cached
    def outer(x):
        """Says how a thing
        is done, over two lines.

        More.
        """

        def inner(y):
            """Says what inner is good for."""
            return y  # kept

        return inner(x)

    def short(self):
        """Too short."""
        return 1

    def bare(self):
        """Has a docstring and nothing more."""

    def together(self): """Shares its line with the code."""; return 1
'''


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> tuple[Path, Path]:
    """Two builds by the command line, side by side, under different hash seeds."""
    folders = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    builds = [
        subprocess.Popen(
            [sys.executable, "-m", "f2llm_jax.demo_data", "--out", folder],
            env=os.environ | {"PYTHONHASHSEED": str(i)},
            cwd=Path(__file__).parents[1],
        )
        for i, folder in enumerate(folders)
    ]
    assert [build.wait() for build in builds] == [0, 0]
    return folders


@pytest.fixture(scope="module")
def raw(corpora) -> dict[str, pa.Table]:
    return {source: pq.read_table(corpora[0] / "raw" / f"{source}.parquet") for source in demo_corpus.TASKS}


@pytest.fixture(scope="module")
def heldout(corpora) -> dict[str, list[dict]]:
    return {name: pq.read_table(corpora[0] / "heldout" / f"{name}.parquet").to_pylist() for name in HELDOUT}


@pytest.fixture(scope="module")
def trained_texts(raw) -> dict[str, set[str]]:
    """Every folded text of every text column of each source, queries without their instruction."""
    columns = {source: [table[name].unique().to_pylist() for name in table.column_names if name != "lang"] for source, table in raw.items()}
    return {source: {demo_corpus.fold(text.strip_instruction(t)) for column in of for t in column} for source, of in columns.items()}


@pytest.mark.slow
def test_two_builds_are_the_same_bytes(corpora):
    first, second = ({path.relative_to(folder): path.read_bytes() for path in folder.rglob("[!.]*.*")} for folder in corpora)
    assert len(first) == 4 + 1 + 3 + 2
    assert first.keys() == second.keys()
    assert [path for path in first if first[path] != second[path]] == []


def test_the_corpus_is_the_same_on_every_python_and_machine(corpora):
    """Rows and tokenizer, not files: pyarrow writes its version into them."""
    digest = hashlib.sha256()
    for path in sorted(corpora[0].rglob("[!.]*.*")):
        rows = json.dumps(pq.read_table(path).to_pydict()) if path.suffix == ".parquet" else path.read_text()
        digest.update(f"{path.relative_to(corpora[0]).as_posix()} {rows}".encode())
    assert digest.hexdigest()[:16] == CORPUS


def test_functions_are_cut_from_the_source_without_their_docstrings():
    assert list(library_code.functions_of(SOURCE)) == [
        (
            "Says how a thing is done, over two lines.",
            "@cached\ndef outer(x):\n\n    def inner(y):\n        return y  # kept\n\n    return inner(x)",
        ),
        ("Says what inner is good for.", "def inner(y):\n    return y  # kept"),
    ]


def test_another_version_of_a_package_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(library_code.PACKAGES, "babel", ("babel", "2.17.0"))
    with pytest.raises(UserError, match=r"babel 2\.17\.0, installed is 2\.18\.0; run: pip install 'f2llm-jax\[demo\]'"):
        list(library_code.library_functions())


def test_the_packages_are_pinned_as_the_corpus_needs_them():
    pinned = re.findall(r"([a-z-]+)==([\d.]+)", (Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert set(library_code.PACKAGES.values()) <= set(pinned)


def test_raw_layout(corpora, raw):
    assert json.loads((corpora[0] / "raw" / "tasks.json").read_text()) == demo_corpus.TASKS
    for source, table in raw.items():
        count = 1 if demo_corpus.TASKS[source] == "classification" else 24
        assert table.column_names == ["query", "passage", *(f"negative_{i + 1}" for i in range(count)), "lang"]
        prompt = text.query_prompt(demo_corpus.INSTRUCTIONS[source])
        assert all(query.startswith(prompt) for query in table["query"].to_pylist())
        assert all(column.null_count == 0 and all(t.strip() for t in column.unique().to_pylist()) for column in table.columns)
    assert raw["cldr_bitext"].num_rows > 50_000
    assert raw["python_code"].num_rows > 3_000
    assert len(raw["cldr_bitext"]["lang"].unique()) >= 240


def test_negatives_differ_from_the_positive_and_from_one_another(raw):
    for table in raw.values():
        columns = [table[name].to_pylist() for name in table.column_names if name == "passage" or name.startswith("negative")]
        repeated = [documents for documents in zip(*columns, strict=True) if len(set(documents)) < len(columns)]
        assert repeated == []


def test_no_training_pair_occurs_twice(raw):
    for table in raw.values():
        pairs = Counter(zip(table["query"].to_pylist(), table["passage"].to_pylist(), strict=True))
        assert [pair for pair, count in pairs.items() if count > 1] == []


def test_bitext_runs_both_ways(raw):
    table = raw["cldr_bitext"]
    english = set(demo_corpus._cldr_names()[0].values())
    share = sum(passage in english for passage in table["passage"].to_pylist()) / table.num_rows
    assert 0.95 < share < 0.99


def test_directions_are_balanced(raw):
    assert set(Counter(raw["script_direction"]["passage"].to_pylist()).values()) == {demo_corpus.DIRECTION_ROWS}


@pytest.mark.parametrize("source", ["cldr_bitext", "cldr_kind", "script_direction"])
def test_heldout_names_are_in_no_training_column(source, heldout, trained_texts):
    """Stronger than held out by (language, concept): the spelling is unseen in every language."""
    names = [row["query"] for row in heldout["bitext"] + heldout["zero_shot"]] + [row["document"] for row in heldout["zero_shot"]]
    assert [name for name in names if demo_corpus.fold(name) in trained_texts[source]] == []


def test_heldout_concepts_are_not_trained_in_another_script_of_their_language(heldout):
    english, names = demo_corpus._cldr_names()
    train, held = demo_corpus._split(names, english, seed=0)
    trained = {(demo_corpus.base_language(name.language), name.concept) for name in train}
    assert {row["query"] for row in heldout["bitext"]} <= {name.text for name in held}
    assert [name for name in held if (demo_corpus.base_language(name.language), name.concept) in trained] == []


def test_heldout_functions_are_in_no_training_column(heldout, trained_texts):
    texts = [row[field] for row in heldout["code"] for field in ("query", "document")]
    assert [t for t in texts if demo_corpus.fold(t) in trained_texts["python_code"]] == []


def test_at_least_two_hundred_languages_are_held_out(heldout):
    pairs = Counter(row["language"] for row in heldout["bitext"])
    assert sum(count >= 5 for count in pairs.values()) >= 200
    assert sum(count >= 5 for count in Counter(demo_corpus.base_language(row["language"]) for row in heldout["bitext"]).values()) >= 200


def test_recall_at_one_has_one_right_answer(heldout):
    """Distinct documents in a pool, one document a query, no answer given away by the query."""
    answers = {name: defaultdict(set) for name in HELDOUT}
    for name, rows in heldout.items():
        assert all(row["instruction"] and row["query"] and row["document"] for row in rows)
        for row in rows:
            answers[name][row["query"]].add(row["document"])
            assert demo_corpus.fold(row["query"]) != demo_corpus.fold(row["document"])
    assert all(len(documents) == 1 for answer in answers.values() for documents in answer.values())
    assert max(Counter((row["language"], row["document"]) for row in heldout["bitext"]).values()) == 1
    for name, count in (("zero_shot", demo_corpus.ZERO_SHOT_PAIRS), ("code", demo_corpus.HELDOUT_FUNCTIONS)):
        assert len(heldout[name]) == len({row["document"] for row in heldout[name]}) == count
    assert all("en" not in (row["language"], row["document_language"]) for row in heldout["zero_shot"])


def test_tokenizer_round_trips_and_leaves_eos_to_the_loader(corpora, heldout):
    tokenizer = text.load_tokenizer(corpora[0] / "tokenizer")
    texts = [row["document"] for name in ("zero_shot", "code") for row in heldout[name]] + [
        "Größe 12\n",
        "日本語 עברית हिन्दी ไทย 𞤀𞤣𞤤𞤢𞤥",
        "",
    ]
    encoded = tokenizer.encode(texts, max_length=10_000)
    assert [tokenizer.decode(ids[:-1]) for ids in encoded] == texts
    assert all(ids[-1] == tokenizer.end_id for ids in encoded)
    assert tokenizer.vocab_size == demo_corpus.VOCAB_SIZE
    bare = transformers.AutoTokenizer.from_pretrained(corpora[0] / "tokenizer")
    assert (bare.eos_token_id, bare.pad_token_id) == (tokenizer.end_id, tokenizer.pad_id)
    assert [bare(t).input_ids for t in texts] == [ids[:-1].tolist() for ids in encoded]
