"""Pairs to mine for, the command that mines with a tiny model, and sizes at which a few hundred texts fill many shards."""

import pyarrow as pa
import pyarrow.parquet as pq
import tiny

from f2llm_jax import mine
from f2llm_jax.mining import nearest, search, vectors
from f2llm_jax.release import hf_folder
from f2llm_jax.text import query_prompt


def export_model(folder):
    """A release of random weights; its folder."""
    hf_folder.export(tiny.origin(folder / "tokenizer"), folder / "model", hf_folder.ReleaseForm(golden=False))
    return folder / "model"


def shrink_all(monkeypatch):
    """Shards, tiles, blocks and groups of a few texts."""
    monkeypatch.setattr(vectors, "SHARD_TEXTS", 32)
    monkeypatch.setattr(search, "SHARD_TEXTS", 32)
    monkeypatch.setattr(search, "BLOCK_DOCUMENTS", 96)
    shrink(monkeypatch, tile=8, group=4)


def shrink(monkeypatch, tile, group):
    monkeypatch.setattr(nearest, "TILE_QUERIES", tile)
    monkeypatch.setattr(nearest, "GROUP", group)
    monkeypatch.setattr(nearest, "FEW_GROUPS", (0, 1, 2))
    nearest._merge.clear_cache()  # sizes are read when it is compiled


def text(i):
    """Distinct words; some texts long, so that their order in rows is not that of the list."""
    return f"document {i} about {i * i % 97} and {i * 7 % 31}" + " again" * (i % 13)


def write_pairs(path, rows=200, repeats=5):
    """The last of every `repeats` queries is a repeat of the one before and has two positives."""
    query = [query_prompt("Find it.") + f"what of {(i - (i % repeats == repeats - 1)) * 3}" for i in range(rows)]
    table = {"query": query, "passage": [text(i) for i in range(rows)], "lang": [("en", "de")[i % 2] for i in range(rows)]}
    pq.write_table(pa.table(table), path)
    return table


def run(model, queries, out, *more):
    flags = ["--model", str(model), "--queries", *map(str, queries), "--out", str(out), *more]
    return mine.main([*flags, *(() if "--max-score" in more else ("--max-score", "none"))])


LOOSE = ("--max-relative", "none", "--near-duplicate", "2")


def assert_same(a, b):
    files = sorted(file.name for file in a.iterdir())
    assert files == sorted(file.name for file in b.iterdir())
    for name in files:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
