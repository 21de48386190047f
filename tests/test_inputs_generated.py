"""Generated files of every form: what `prepare` trains on is what an independent reader says, or the file, row and column are named."""

import csv
import gzip
import io
import json
import re
import tempfile
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from f2llm_jax.errors import UserError
from f2llm_jax.preparation.selection import Recipe, choose_rows, read_rows
from f2llm_jax.preparation.sources import find_sources

pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")  # of the long text, where a case fails
RECIPE = Recipe(stage=2, max_length=64, seed=0, cap=0, instruct_documents=0.0, policy="default")
ALIASES = {
    "query": ["query", "anchor", "question", "Query"],
    "passage": ["passage", "positive", "document", "answer", "POSITIVE"],
    "lang": ["lang", "language"],
}
# Texts that readers like to change: numbers, labels, dates, quotes, line ends, marks, forms of Unicode.
AWKWARD = ["007", "7", "true", "1.0", "2024-01-02", "NA", "null", 'say "hi"', "a,b\tc", "two\nlines", "cr\rlf\r\nend", "\ufeffmark"]
AWKWARD += ["caf\u00e9", "cafe\u0301", "line\u2028separator", "x" * 70_000]
TEXT = st.one_of(st.sampled_from(AWKWARD), st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=9))
TEXT = TEXT.filter(lambda text: text.strip() and not text.lstrip().startswith(("[", "Instruct:")))
CELL = st.one_of(*[TEXT] * 12, st.just(""), st.none())


@st.composite
def tables(draw):
    """A form, a header in any order, and rows as dictionaries that leave out keys where a row of the form may."""
    form = draw(st.sampled_from(["jsonl", "csv", "tsv", "parquet"]))
    cell = CELL if draw(st.booleans()) else TEXT
    count = draw(st.integers(1, 5))
    names = {role: draw(st.sampled_from(aliases)) for role, aliases in ALIASES.items()}
    if draw(st.booleans()):
        del names["lang"]
    rows = [{name: draw(TEXT if role == "lang" else cell) for role, name in names.items()} for _ in range(count)]
    style = draw(st.sampled_from(["none", "one", "from 1", "from 0", "lists", "json"]))
    numbers = {"one": ["negative"], "from 1": ["negative_1", "negative_2"], "from 0": ["neg_0", "neg_1", "neg_2"]}.get(style, [])
    for row in rows:
        row |= {name: draw(cell) for name in numbers}
        if style in ("lists", "json"):
            found = draw(st.lists(cell, max_size=3))
            row["negatives"] = (
                json.dumps([text for text in found if text is not None]) if style == "json" or form in ("csv", "tsv") else found
            )
        row["source"] = draw(TEXT)
    if form == "jsonl":  # what a row leaves out appears further down
        for name in [*numbers, *(["negatives"] if "negatives" in rows[0] else []), *([names["lang"]] if "lang" in names else [])]:
            for row in rows[: draw(st.integers(0, count - 1))]:
                del row[name]
    header = draw(st.permutations(list(rows[-1])))
    return form, [{name: row[name] for name in header if name in row} for row in rows]


def write(folder, form, rows, encoding, line_end, compression):
    """The file; None for a cell of CSV is an empty one."""
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "made.parquet")
        return folder / "made.parquet"
    if form == "jsonl":
        text = line_end.join(json.dumps(row, ensure_ascii=False) for row in rows)
    else:
        stream = io.StringIO()
        writer = csv.writer(stream, delimiter={"csv": ",", "tsv": "\t"}[form], lineterminator=line_end)
        writer.writerow(rows[0])
        writer.writerows([row[name] for name in rows[0]] for row in rows)
        text = stream.getvalue()
    path = folder / f"made.{form}{compression}"
    data = text.encode(encoding, errors="xmlcharrefreplace")
    path.write_bytes({"": bytes, ".gz": gzip.compress, ".zst": lambda data: pa.compress(data, "zstd", asbytes=True)}[compression](data))
    return path


def independent(path, encoding):
    """Query, positive, negatives and language of every row, by the standard library; None where a row must be refused."""
    encoding = {"utf-8": "utf-8-sig"}.get(encoding, encoding)
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    if path.suffix == ".zst":
        raw = pa.input_stream(str(path), compression="zstd").read()
    form = path.name.split(".")[1]
    if form == "parquet":
        rows = pq.read_table(path).to_pylist()
    elif encoding == "utf-16":
        return None
    elif form == "jsonl":
        rows = [json.loads(line) for line in raw.decode(encoding).split("\n") if line.strip()]
    else:
        text = io.StringIO(raw.decode(encoding), newline="")
        rows = list(csv.DictReader(text, delimiter={"csv": ",", "tsv": "\t"}[form]))
    found = []
    for row in rows:
        given = {key.casefold(): value for key, value in row.items()}
        query, passage, lang = (next((given[a.casefold()] for a in ALIASES[r] if a.casefold() in given), None) for r in ALIASES)
        named = sorted(key for key in given if re.fullmatch(r"neg(ative)?(_\d)?", key))
        negatives = [given[key] for key in named]
        several = given.get("negatives") or []
        negatives += json.loads(several) if isinstance(several, str) else several
        if any(text is None or not text.strip() for text in (query, passage, *negatives)):
            return None
        cells = (query, passage, lang or "", *(given[key] for key in named), *([several] if isinstance(several, str) else several))
        if encoding == "latin-1" and not all(text.isascii() for text in cells):  # as written: JSON in a cell may spell any letter in ASCII
            return None
        form_c = {unicodedata.normalize("NFC", passage)}
        kept = []
        for text in negatives:
            if unicodedata.normalize("NFC", text) not in form_c:
                kept.append(text)
                form_c.add(unicodedata.normalize("NFC", text))
        found.append((query, passage, kept, lang or ""))
    return found


def trained_on(folder):
    (source,) = find_sources(folder, stage=2)
    found = []
    for part in source.parts:
        for _, rows in read_rows(source, part, RECIPE, choose_rows(source, RECIPE)):
            for query, documents, language in zip(rows.queries, rows.documents, rows.languages, strict=True):
                passage, *negatives = [rows.texts[i] for i in documents if i >= 0]
                found.append((query, passage, negatives, language))
    return found


@example(("csv", [{"query": "007", "passage": "007", "negatives": '["\\u00a1"]'}]), "latin-1", "\n", "")
@given(
    table=tables(),
    encoding=st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"]),
    line_end=st.sampled_from(["\n", "\r\n"]),
    compression=st.sampled_from(["", ".gz", ".zst"]),
)
@settings(max_examples=200, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
def test_what_is_trained_on_is_what_an_independent_reader_says(table, encoding, line_end, compression):
    form, rows = table
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "tasks.json").write_text('{"made": "retrieval"}')
        path = write(folder, form, rows, encoding, line_end, compression)
        expected = independent(path, "utf-8" if form == "parquet" else encoding)
        try:
            found = trained_on(folder)
        except UserError as error:
            assert expected is None, error
            assert path.name in str(error)
            assert re.search(r"row \d+, column '\w+(\[\d+\])?'|UTF-16|UTF-8", str(error)), error
        else:
            assert found == expected
