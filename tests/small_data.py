"""A prepared dataset of three kinds, small enough for tests, whose every text says which row and column it is."""

import functools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import tiny

from f2llm_jax import prepare
from f2llm_jax.data import records

MAX_LENGTH = 48
KINDS = {"labels": "classification", "pairs": "retrieval", "topics": "clustering"}
ROWS = {"labels": 301, "pairs": 401, "topics": 203}
NEGATIVES = {"labels": 1, "pairs": 9, "topics": 12}
TOPICS = ("cat", "dog", "mat", "Katze")


@functools.cache
def raw(source):
    """Columns of a source. Labels and topics can be learned from a word in the query; some passages of pairs are long."""
    rows = range(ROWS[source])
    topic = [TOPICS[i % len(TOPICS)] for i in rows]
    table = {"query": [f"{source} {i} {topic[i]}" for i in rows]}
    if source == "labels":
        answers = ["it is one", "it is the other"]
        return table | {"passage": [answers[i % 2] for i in rows], "negative_1": [answers[1 - i % 2] for i in rows]}
    table["passage"] = [f"{source} {i} {topic[i]} passage" + " long" * (20 * (i % 7 == 0)) for i in rows]
    for n in range(1, NEGATIVES[source] + 1):
        table[f"negative_{n}"] = [f"{source} {i} {TOPICS[(i + 1 + n % 3) % len(TOPICS)]} negative {n}" for i in rows]
    return table


LANGUAGES = ("de", "en", "sr_Latn")


def write(folder, languages=False):
    """Prepares the dataset in `folder` by the command and opens it; with `languages`, row i is in the i-th of `LANGUAGES`, in turn."""
    (folder / "raw").mkdir(parents=True)
    for source in ROWS:
        lang = {"lang": [LANGUAGES[i % len(LANGUAGES)] for i in range(ROWS[source])]} if languages else {}
        pq.write_table(pa.table(raw(source) | lang), folder / "raw" / f"{source}.parquet")
    (folder / "raw" / "tasks.json").write_text(json.dumps(KINDS))
    tiny.write_tokenizer(folder / "tokenizer")
    flags = {
        "--raw": folder / "raw",
        "--tokenizer": folder / "tokenizer",
        "--out": folder / "data",
        "--max-length": MAX_LENGTH,
        "--workers": 1,
    }
    assert prepare.main([str(part) for flag in flags.items() for part in flag]) == 0
    return records.load_dataset(folder / "data")
