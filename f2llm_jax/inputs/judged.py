"""Retrieval data: documents and queries by id, and which document is relevant to which query.

In the form of BEIR, a folder with `corpus.jsonl` (`_id`, `title`, `text`), `queries.jsonl` (`_id`, `text`) and `qrels/SPLIT.tsv` (query-id,
corpus-id, score), or as three tables of any form. One rule everywhere: a document is its title and its text with a space between
them, a title that is null, empty or absent is none, and a relevance above 0 is relevant; fractions stay fractions.
"""

import dataclasses
from collections.abc import Sequence

from etils import epath

from f2llm_jax.errors import UserError
from f2llm_jax.inputs.columns import BY_NAME, ColumnChoice, FileLayout, check_shared
from f2llm_jax.inputs.fields import DOCUMENTS, TEXT_NAMES, Fields, read_fields
from f2llm_jax.inputs.folders import find_member, is_beir

CORPUS = FileLayout({"_id": ("_id", "id"), "text": TEXT_NAMES, "title": ("title",)}, ("title",))
QUERIES = FileLayout({"_id": ("_id", "id"), "text": ("text", "query")})
QRELS = FileLayout(
    {
        "query-id": ("query-id", "qid"),
        "corpus-id": ("corpus-id", "document-id", "doc-id", "docid", "passage-id", "pid"),
        "score": ("score", "relevance", "rel"),
    }
)


@dataclasses.dataclass(frozen=True)
class Judged:
    """A retrieval data set; ids in the order of their files."""

    documents: dict[str, str]
    queries: dict[str, str]
    relevance: dict[str, dict[str, float]]  # by query and document, as judged, 0 and below included
    positives: list[tuple[str, str]]  # ids of queries and documents of a relevance above 0, in the order of the judgements
    described: list[str]  # what was understood of each file

    def describe(self) -> list[str]:
        return self.described


def read_judged(paths: Sequence[epath.PathLike], choice: ColumnChoice = BY_NAME) -> Judged:
    """Reads the tables of documents, queries and judgements, in this order.

    Raises:
      UserError: a file is missing or malformed, an id repeats or is unknown, or nothing is relevant.
    """
    choice = dataclasses.replace(choice, shared=True)
    corpus = read_fields(paths[0], CORPUS, {"_id": "label", "text": "optional text", "title": "optional text"}, choice)
    queries = read_fields(paths[1], QUERIES, {"_id": "label", "text": "text"}, choice)
    qrels = read_fields(paths[2], QRELS, {"query-id": "label", "corpus-id": "label", "score": "number"}, choice)
    read = ((CORPUS, corpus), (QUERIES, queries), (QRELS, qrels))
    check_shared(choice, [(form, file.names) for form, fields in read for file in fields.files])
    documents, texts = _by_id(corpus), _by_id(queries)
    relevance: dict[str, dict[str, float]] = {}
    positives: dict[tuple[str, str], None] = {}
    rows = zip(*(qrels.values[role] for role in QRELS.roles), strict=True)
    for row, (query, document, score) in enumerate(rows):
        for what, name, known, path in (("query", query, texts, paths[1]), ("document", document, documents, paths[0])):
            if name not in known:
                raise UserError(f"{_line(qrels, row)} names the {what} {name!r}, which {path} does not have; correct or drop the row")
        if relevance.setdefault(query, {}).setdefault(document, score) != score:
            raise UserError(f"{_line(qrels, row)} judges {query!r} and {document!r} a second time, and otherwise; drop one of the two")
        if score > 0:
            positives[query, document] = None
    if not positives:
        raise UserError(f"{paths[2]} has no row with a score above 0; name other judgements")
    return Judged(documents, texts, relevance, list(positives), [*corpus.describe(), *queries.describe(), *qrels.describe()])


def beir_paths(folder: epath.PathLike, split: str) -> tuple[epath.Path, epath.Path, epath.Path]:
    """The three tables of a BEIR folder.

    Raises:
      UserError: one is missing.
    """
    folder = epath.Path(folder)
    corpus, queries = (find_member(folder, name) for name in ("corpus", "queries"))
    if corpus is None or queries is None:
        raise UserError(
            f"{folder} has no {'corpus' if corpus is None else 'queries'}.jsonl; a BEIR folder holds corpus, queries and qrels/"
        )
    qrels = find_member(folder / "qrels", split)
    if qrels is None:
        there = sorted(file.name.split(".")[0] for file in (folder / "qrels").iterdir()) if (folder / "qrels").is_dir() else []
        raise UserError(f"{folder / 'qrels' / split}.tsv does not exist; choose a split among: {', '.join(there) or 'none'}")
    return corpus, queries, qrels


def read_documents(path: epath.PathLike, choice: ColumnChoice = BY_NAME) -> Fields:
    """The documents of a table, of a BEIR folder or of its corpus named as a file: their texts are `joined()`.

    Of the user's columns those count that the table has: a choice for the queries' file is none for that of the documents.

    Raises:
      UserError: a file is missing or malformed, or a document has no text.
    """
    if is_beir(path):
        path = find_member(path, "corpus") or path
    found = read_fields(path, DOCUMENTS, {"text": "optional text", "title": "optional text"}, dataclasses.replace(choice, shared=True))
    _check_not_empty(found)
    return found


def _check_not_empty(documents: Fields) -> None:
    for row, text in enumerate(documents.joined()):
        if not text.strip():
            raise UserError(f"{documents.place(row)} has no text; give it one or drop it")


def _by_id(fields: Fields) -> dict[str, str]:
    _check_not_empty(fields)
    found: dict[str, str] = {}
    for row, (name, text) in enumerate(zip(fields.values["_id"], fields.joined(), strict=True)):
        if name in found:
            raise UserError(f"{fields.place(row)} has the id {name!r}, as a row before it; ids must be distinct, drop one of them")
        found[name] = text
    return found


def _line(qrels: Fields, row: int) -> str:
    path, number = qrels.places[row]
    return f"{qrels.place(row)} (line {number + 2})" if ".tsv" in path or ".csv" in path else qrels.place(row)
