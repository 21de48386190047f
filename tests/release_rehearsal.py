"""A rehearsal of the F2LLM-v2 release: files of its names, columns and oddities, a few made-up rows each, no tasks.json.

The names come from the shipped catalogue; the columns and oddities are those that were found in the released files (docs/recipe.md).
"""

import pyarrow as pa
import pyarrow.parquet as pq

from f2llm_jax.preparation.catalogue import load_catalogue

# Files of each kind, of units of one file and of several, of both stages, with the name that is URL-encoded.
FILES = (
    "paracrawl_de-pl", "paracrawl_en-sw", "paracrawl_pl-de", "clirmatrix_zh", "webfaq_kor", "csn_go", "ocgi", "ocgi_part2",
    "unpc_ar2en", "unpc_en2ar", "squad", "fiqa", "xcodeeval_code2code_C%23", "sib200", "banking77", "amazon_counterfactual",
)  # fmt: skip
MELA_ROWS = 175_246  # three sources are ranges of its rows


def write(folder, rows=40, files=FILES, mela=True):
    """Writes the files; every fifth, from the second on, has an oddity of each kind."""
    folder.mkdir(parents=True)
    kinds = {file.path: source.kind for source in load_catalogue("f2llm_v2").sources for file in source.files}
    for number, stem in enumerate(files):
        table = columns(stem, kinds[f"{stem}.parquet"], rows)
        if number % 5 == 1:
            spoil(table)
        if number % 3 == 0:
            table["lang"] = [stem[-3:]] * rows
        pq.write_table(pa.table(table), folder / f"{stem}.parquet")
    if mela:
        pq.write_table(pa.table(columns("mela", "classification", MELA_ROWS)), folder / "mela.parquet")
    return folder


def columns(stem, kind, rows):
    numbers = range(rows)
    table = {"query": [f"Instruct: Task of {stem}.\nQuery: {stem} q{i}" for i in numbers]}
    if kind == "classification":
        labels = f"{stem} yes", f"{stem} no"
        return table | {"passage": [labels[i % 2] for i in numbers], "negative_1": [labels[1 - i % 2] for i in numbers]}
    # Of a symmetric source every third document comes with the instruction, as released.
    own = (lambda i: f"Instruct: Task of {stem}.\nQuery: " if i % 3 == 0 else "") if kind == "clustering" else (lambda i: "")
    table["passage"] = [f"{own(i)}{stem} p{i}" for i in numbers]
    return table | {f"negative_{n}": [f"{own(i + n)}{stem} n{i}.{n}" for i in numbers] for n in range(1, 25)}


def spoil(table):
    """What the released files have: empty, null and repeated negatives, one that is the positive, an empty positive."""
    if "negative_24" in table:
        table["negative_6"][3], table["negative_7"][3], table["negative_8"][3] = "", None, table["passage"][3]
        table["negative_9"][3] = table["negative_10"][3]
    table["passage"][4] = ""
