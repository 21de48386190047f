"""Queries with their positives, and documents, from raw files or from folders in the form of BEIR.

A raw file has the columns `query` and `passage` (or sentence-transformers' `anchor` and `positive`), optionally `lang`; a file of
documents only `passage` (or `positive`, or `text`). A BEIR folder has `corpus.jsonl` (`_id`, `title`, `text`), `queries.jsonl`
(`_id`, `text`) and `qrels/SPLIT.tsv` (query id, document id, score, under a header); a document is its title and its text
with a space between them, and pairs of a score above 0 are positives. Queries that the split does not name are not mined.
"""

import csv
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from etils import epath

from f2llm_jax.mining.errors import MiningError
from f2llm_jax.preparation.raw_files import NULL, RawFile, open_file, read_blocks, source_name
from f2llm_jax.preparation.sources import ALIASES
from f2llm_jax.text import DEFAULT_QUERY_INSTRUCTION, leading_prompt, query_prompt

DOCUMENT_COLUMNS = (*ALIASES["passage"], "text")


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The rows of one source.

    Attributes:
      name: of the source.
      kind: of task, for `prepare`.
      queries: `[rows]`, instruction included.
      passages: `[rows]`, a positive of each.
      languages: `[rows]`, "" where unknown.
      given: by row, negatives that are known already; they stand first.
    """

    name: str
    queries: list[str]
    passages: list[str]
    languages: list[str]
    kind: str = "retrieval"
    given: list[list[str]] = dataclasses.field(default_factory=list)


def read_pairs(path: epath.PathLike, instruction: str | None, qrels: str) -> Pairs:
    """Reads a raw file or a BEIR folder.

    Args:
      path: of it.
      instruction: given to queries that carry none; None for none in a raw file and `DEFAULT_QUERY_INSTRUCTION` in a BEIR folder.
      qrels: which split of a BEIR folder.

    Raises:
      MiningError, RawDataError: a file is missing, unreadable, empty or malformed.
    """
    path = epath.Path(path)
    if path.is_dir():
        queries, passages = _read_beir(path, qrels)
        instruction = DEFAULT_QUERY_INSTRUCTION if instruction is None else instruction
        return Pairs(path.name, instructed(queries, instruction), passages, [""] * len(queries))
    file = opened(path)
    columns = read_columns(file, {name: find_column(file, ALIASES[name]) for name in ("query", "passage")})
    languages = read_columns(file, {"lang": "lang"}, required=False)["lang"] if "lang" in file.names else [""] * file.rows
    return Pairs(source_name(path), instructed(columns["query"], instruction or ""), columns["passage"], languages)


def read_documents(path: epath.PathLike) -> list[str]:
    """Reads the documents of a raw file or of a BEIR folder.

    Raises:
      MiningError, RawDataError: a file is missing, unreadable, empty or malformed.
    """
    path = epath.Path(path)
    if path.is_dir():
        return list(_read_beir_corpus(path).values())
    file = opened(path)
    return read_columns(file, {"passage": find_column(file, DOCUMENT_COLUMNS)})["passage"]


def check_names(sources: Sequence[Pairs]) -> None:
    """Raises a MiningError if two sources have one name, hence one file to be written to."""
    counts = Counter(source.name for source in sources)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise MiningError(f"two inputs are one source by name: {', '.join(twice)}; rename one of them")


def opened(path: epath.Path) -> RawFile:
    """The schema of a file that exists and has rows."""
    if not path.exists():
        raise MiningError(f"{path} does not exist; name a raw file or a BEIR folder")
    if source_name(path) is None:
        raise MiningError(f"{path} is neither a folder nor a parquet, JSONL or CSV file; convert it")
    file = open_file(path)
    if not file.rows:
        raise MiningError(f"{path} has no rows; fill the file or leave it out")
    return file


def find_column(file: RawFile, names: Sequence[str]) -> str:
    """The first of `names` that the file has, as a column of text.

    Raises:
      MiningError: it has none, or not as text.
    """
    found = next((name for name in names if name in file.names), None)
    if found is None:
        raise MiningError(f"{file.path} has no column {' or '.join(map(repr, names))}, only {', '.join(file.names)}; rename one")
    if found in file.types:
        raise MiningError(f"{file.path}: column {found!r} is {file.types[found]}, not string; cast it to string")
    return found


def read_columns(file: RawFile, columns: Mapping[str, str], required: bool = True) -> dict[str, list[str]]:
    """Columns of text, by the keys of `columns`.

    Args:
      file: to read.
      columns: their names in the file.
      required: an empty or absent text is an error; otherwise it is "".

    Raises:
      MiningError: a text is missing; names file, row and column.
    """
    read = {name: [] for name in columns}
    for block in read_blocks(file.path, list(columns.values()), 0, file.rows):
        for name, column in columns.items():
            texts = block.columns[column]
            empty = np.asarray(pc.fill_null(pc.equal(pc.utf8_trim_whitespace(texts), ""), True))
            if required and empty.any():
                row = int(np.flatnonzero(empty)[0])
                why = "is empty" if texts[row].is_valid else block.reason(column, row) or NULL
                raise MiningError(f"{file.path}: row {block.first_row + row}, column {column!r} {why}; give it a text or drop the row")
            read[name] += pc.fill_null(texts, "").to_pylist()
    return read


def instructed(queries: list[str], instruction: str) -> list[str]:
    """The queries, those without an instruction with this one; as they are where it is empty."""
    prompt = query_prompt(instruction)
    return [query if leading_prompt(query) else prompt + query for query in queries] if prompt else queries


def _read_beir(folder: epath.Path, split: str) -> tuple[list[str], list[str]]:
    documents, queries = _read_beir_corpus(folder), _by_id(folder / "queries.jsonl", ("text",))
    path = folder / "qrels" / f"{split}.tsv"
    if not path.exists():
        there = sorted(file.stem for file in path.parent.glob("*.tsv")) if path.parent.exists() else []
        raise MiningError(f"{path} does not exist; choose --qrels among: {', '.join(there) or 'none'}")
    rows = []
    with path.open() as file:
        for number, line in enumerate(csv.reader(file, delimiter="\t"), 1):
            if number == 1 or not line:
                continue
            rows += _judged(path, number, line, queries, documents)
    if not rows:
        raise MiningError(f"{path} names no positive pair; choose another --qrels")
    return [queries[query] for query, _ in rows], [documents[document] for _, document in rows]


def _judged(path: epath.Path, number: int, line: list[str], queries: dict, documents: dict) -> list[tuple[str, str]]:
    """The pair of a line of qrels if it is a positive one."""
    try:
        query, document, score = line[0], line[1], float(line[2])
    except (IndexError, ValueError) as error:
        raise MiningError(f"{path}: line {number} is not `query id, document id, score` with tabs between; mend it") from error
    if query not in queries:
        raise MiningError(f"{path}: line {number} names the query {query!r}, which queries.jsonl does not have; drop the line")
    if document not in documents:
        raise MiningError(f"{path}: line {number} names the positive {document!r}, which corpus.jsonl does not have; drop the line")
    return [(query, document)] if score > 0 else []


def _read_beir_corpus(folder: epath.Path) -> dict[str, str]:
    return _by_id(folder / "corpus.jsonl", ("title", "text"))


def _by_id(path: epath.Path, fields: Sequence[str]) -> dict[str, str]:
    """Texts by id, the fields joined by spaces."""
    file = opened(path)
    ids = read_columns(file, {"_id": find_column(file, ("_id",))})["_id"]
    there = {name: name for name in fields if name in file.names}
    find_column(file, ("text",))
    parts = read_columns(file, there, required=False)
    found = {}
    for row, (name, *text) in enumerate(zip(ids, *parts.values(), strict=True)):
        if name in found:
            raise MiningError(f"{path}: row {row} has the id {name!r}, as a row before it; ids must be distinct, drop one of them")
        found[name] = " ".join(text).strip()
        if not found[name]:
            raise MiningError(f"{path}: row {row} ({name!r}) has no text; give it one or drop it")
    return found


def distinct(texts: Sequence[str]) -> tuple[pa.LargeStringArray, np.ndarray]:
    """The distinct texts in order of first appearance, and the number among them of each of `texts`, int64."""
    encoded = pa.array(texts, pa.large_string()).dictionary_encode()
    return encoded.dictionary, encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
