"""Users' own files as mteb tasks: a manifest names them, mteb measures, so the numbers are mteb's.

A manifest is a JSON file `{"tasks": [...]}`. Each task has a `name`, a `type` and its files, relative to the manifest; optionally an
`instruction` ("" for none; by default that of the type), a `description` and `languages` (such as "deu-Latn").

    Retrieval            corpus (id, text, optionally title), queries (id, text), qrels (query-id, corpus-id, score), as parquet;
                         or beir: a folder with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv (split: "test" by default)
    BitextMining         file (sentence1, sentence2): row i translates row i
    Classification       train, test (text, label): a linear classifier learns from 8 texts a label, ten times
    Clustering           file (sentences, labels): all texts, k-means, ten times
    STS                  file (sentence1, sentence2, score)
    PairClassification   file (sentence1, sentence2, labels), labels 0 or 1
"""

import csv
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq
from etils import epath

from f2llm_jax.errors import UserError
from f2llm_jax.evaluation.instructions import near

DEFAULT_LANGUAGES = ("mul-Zyyy",)
OPTIONAL = ("name", "type", "instruction", "description", "languages")
SHOWN = 3  # of many wrong ids


class ManifestError(UserError):
    """A manifest or a file it names that cannot be evaluated on; the message names file, row or field."""


@dataclasses.dataclass(frozen=True)
class _Form:
    """What a type of task needs: mteb's class and measure, its files, and the function that reads them into mteb's `dataset`."""

    base: str
    main_score: str
    files: Sequence[str]
    read: Callable[[Mapping[str, epath.Path]], Any]
    settings: Callable[[Any], dict[str, Any]] = lambda dataset: {}


def read_manifest(path: epath.PathLike) -> tuple[list, dict[str, str]]:
    """The manifest's tasks, data checked and in memory, and the instructions it gives by task name.

    Raises:
      ManifestError: the manifest or a file is missing, malformed or empty, ids are unknown or not distinct.
    """
    path = epath.Path(path)
    try:
        entries = json.loads(path.read_text())["tasks"]
    except OSError as error:
        raise ManifestError(f"{path} cannot be read ({error.strerror}); name a manifest") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ManifestError(f'{path} is not a JSON object {{"tasks": [...]}} ({type(error).__name__}: {error})') from error
    if not entries:
        raise ManifestError(f"{path} names no tasks")
    tasks = [_task(path, entry) for entry in entries]
    if twice := [name for name, count in Counter(task.metadata.name for task in tasks).items() if count > 1]:
        raise ManifestError(f"{path}: {twice[0]!r} stands twice; a task's name is its results' file name")
    return tasks, {entry["name"]: entry["instruction"] for entry in entries if "instruction" in entry}


def _task(manifest: epath.Path, entry: Mapping[str, Any]):
    """An instance of a class of its own, as mteb keeps what it knows of a task in the class."""
    import mteb

    name, form = entry.get("name"), _form(manifest, entry)
    folder = manifest.parent
    paths = {field: folder / entry[field] for field in form.files if field in entry}
    if missing := [field for field in form.files if field not in entry and "beir" not in entry]:
        raise ManifestError(f"{manifest}: task {name!r} lacks {', '.join(missing)}")
    if "beir" in entry:
        paths = {"beir": folder / entry["beir"], "split": entry.get("split", "test")}
    dataset = form.read(paths)
    languages = list(entry.get("languages", DEFAULT_LANGUAGES))
    metadata = {
        "name": name,
        "description": entry.get("description", f"Local files of {manifest.name}."),
        "dataset": {"path": str(manifest.name), "revision": _revision(entry, paths)},
        "type": entry["type"],
        "category": "t2c" if entry["type"] in ("Classification", "Clustering") else "t2t",
        "eval_splits": ["test"],
        "eval_langs": languages,
        "main_score": form.main_score,
    }

    def load_data(self, *_: Any, **__: Any) -> None:
        self.dataset, self.data_loaded = dataset, True

    try:
        members = {"metadata": mteb.TaskMetadata(**metadata), "load_data": load_data, **form.settings(dataset)}
    except ValueError as error:
        raise ManifestError(f"{manifest}: task {name!r}: {error}") from error
    return type(name, (getattr(mteb.abstasks, form.base),), members)()


def _form(manifest: epath.Path, entry: Mapping[str, Any]) -> _Form:
    name, kind = entry.get("name"), entry.get("type")
    if not isinstance(name, str) or not name or "/" in name:
        raise ManifestError(f"{manifest}: a task has the name {name!r}; give it one without a slash")
    if kind not in FORMS:
        raise ManifestError(f"{manifest}: task {name!r} has the type {kind!r}; choose among {', '.join(FORMS)}")
    known = {*OPTIONAL, *FORMS[kind].files, *(("beir", "split") if kind == "Retrieval" else ())}
    for field in entry:
        if field not in known:
            raise ManifestError(f"{manifest}: task {name!r} has the unknown field {field!r}{near(field, known)}")
    return FORMS[kind]


def _revision(entry: Mapping[str, Any], paths: Mapping[str, Any]) -> str:
    """Digest of the files and of what the manifest says, so that results of older data are not taken for these."""
    digest = hashlib.sha256(json.dumps(entry, sort_keys=True).encode())
    files = [path for path in paths.values() if isinstance(path, epath.Path)]
    if "beir" in paths:
        files = list(_beir_files(paths).values())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _table(path: epath.Path, columns: Mapping[str, str], optional: Sequence[str] = ()) -> pa.Table:
    """The named columns of a file that has rows and no nulls in them; `columns` says what each is: text, number or label."""
    if not path.exists():
        raise ManifestError(f"{path} does not exist; the manifest names files relative to itself")
    try:
        with path.open("rb") as file:
            table = pa.json.read_json(file) if path.suffix == ".jsonl" else pq.read_table(file)
    except (OSError, ValueError) as error:  # pyarrow's own errors are subclasses of these
        raise ManifestError(f"{path} is not a readable {'JSONL' if path.suffix == '.jsonl' else 'parquet'} file ({error})") from error
    if absent := [name for name in columns if name not in table.column_names and name not in optional]:
        raise ManifestError(f"{path} has no column {', '.join(map(repr, absent))}, only {', '.join(table.column_names)}; rename one")
    table = table.select([name for name in columns if name in table.column_names])
    if not table.num_rows:
        raise ManifestError(f"{path} has no rows")
    for name in table.column_names:
        _check_column(path, name, table[name], columns[name])
    return table


def _check_column(path: epath.Path, name: str, column: pa.ChunkedArray, kind: str) -> None:
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise ManifestError(f"{path}: row {row}, column {name!r} is null; give it a value or drop the row")
    text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    if (kind == "text" and not text) or (kind == "number" and not number) or (kind == "label" and not text and not number):
        raise ManifestError(f"{path}: column {name!r} is {column.type}, not {'string' if kind == 'text' else 'a number'}; cast it")


def _dataset(table: pa.Table):
    import datasets

    return datasets.Dataset.from_dict(table.to_pydict())


def _file(**columns: str) -> Callable[[Mapping[str, epath.Path]], Any]:
    return lambda paths: {"test": _dataset(_table(paths["file"], columns))}


def _read_sts(paths: Mapping[str, epath.Path]):
    table = _table(paths["file"], {"sentence1": "text", "sentence2": "text", "score": "number"})
    if len(set(table["score"].to_pylist())) < 2:
        raise ManifestError(f"{paths['file']}: all scores are equal, so nothing correlates with them")
    return {"test": _dataset(table)}


def _score_range(dataset) -> dict[str, Any]:
    scores = dataset["test"]["score"]
    return {"min_score": min(scores), "max_score": max(scores)}


def _read_labelled_pairs(paths: Mapping[str, epath.Path]):
    table = _table(paths["file"], {"sentence1": "text", "sentence2": "text", "labels": "number"})
    if set(labels := table["labels"].to_pylist()) != {0, 1}:
        raise ManifestError(f"{paths['file']}: labels are {sorted(set(labels))[:SHOWN]}; both 0 and 1 must occur, and nothing else")
    return {"test": _dataset(table)}


def _read_classification(paths: Mapping[str, epath.Path]):
    import datasets

    tables = {split: _table(paths[split], {"text": "text", "label": "label"}) for split in ("train", "test")}
    seen = set(tables["train"]["label"].to_pylist())
    if unseen := set(tables["test"]["label"].to_pylist()) - seen:
        raise ManifestError(f"{paths['test']} has the label {min(map(str, unseen))!r}, which {paths['train']} does not have")
    if len(seen) < 2:
        raise ManifestError(f"{paths['train']} has one label only; a classifier needs two")
    return datasets.DatasetDict({split: _dataset(table) for split, table in tables.items()})


def _all_texts(dataset) -> dict[str, Any]:
    """mteb clusters 4% of a large data set; of a user's own files nothing is left out."""
    return {"max_fraction_of_documents_to_embed": None, "max_documents_per_cluster": min(16_384, len(dataset["test"]))}


def _read_retrieval(paths: Mapping[str, Any]):
    files = _beir_files(paths) if "beir" in paths else paths
    id_column = "_id" if "beir" in paths else "id"
    corpus = _table(files["corpus"], {id_column: "text", "text": "text", "title": "text"}, optional=("title",))
    queries = _table(files["queries"], {id_column: "text", "text": "text"})
    qrels = _tsv(files["qrels"]) if "beir" in paths else _judgements(files["qrels"])
    ids = {"queries": queries[id_column].to_pylist(), "corpus": corpus[id_column].to_pylist()}
    for name, of_file in ids.items():
        if twice := [one for one, count in Counter(of_file).items() if count > 1]:
            raise ManifestError(f"{files[name]}: the id {twice[0]!r} stands twice; ids must be distinct")
    relevant: dict[str, dict[str, int]] = {}
    for query, document, score in qrels:
        relevant.setdefault(query, {})[document] = score
    _check_ids(files, "queries", relevant, ids["queries"])
    _check_ids(files, "corpus", [one for documents in relevant.values() for one in documents], ids["corpus"])
    if not any(score > 0 for documents in relevant.values() for score in documents.values()):
        raise ManifestError(f"{files['qrels']} has no row with a score above 0; nothing could be found")
    rename = lambda table: table.rename_columns(["id" if name == id_column else name for name in table.column_names])  # noqa: E731
    split = {"corpus": _dataset(rename(corpus)), "queries": _dataset(rename(queries)), "relevant_docs": relevant, "top_ranked": None}
    return {"default": {"test": split}}


def _check_ids(files: Mapping[str, epath.Path], name: str, used, known: Sequence[str]) -> None:
    if strangers := sorted(set(used) - set(known)):
        listed = ", ".join(map(repr, strangers[:SHOWN])) + (f" and {len(strangers) - SHOWN} more" if len(strangers) > SHOWN else "")
        raise ManifestError(f"{files['qrels']} names {listed}, which {files[name]} does not have; mend the ids or drop the rows")


def _judgements(path: epath.Path) -> list[tuple[str, str, int]]:
    columns = {"query-id": "text", "corpus-id": "text", "score": "number"}
    table = _table(path, columns)
    return [(query, document, int(score)) for query, document, score in zip(*(table[name].to_pylist() for name in columns), strict=True)]


def _beir_files(paths: Mapping[str, Any]) -> dict[str, epath.Path]:
    folder = paths["beir"]
    return {"corpus": folder / "corpus.jsonl", "queries": folder / "queries.jsonl", "qrels": folder / "qrels" / f"{paths['split']}.tsv"}


def _tsv(path: epath.Path) -> list[tuple[str, str, int]]:
    """Query id, document id and score of each line under the header."""
    if not path.exists():
        raise ManifestError(f"{path} does not exist; a BEIR folder has qrels/SPLIT.tsv")
    with path.open() as file:
        lines = list(csv.reader(file, delimiter="\t"))[1:]
    try:
        rows = [(line[0], line[1], int(line[2])) for line in lines if line]
    except (IndexError, ValueError) as error:
        raise ManifestError(f"{path}: a line is not `query id, document id, whole score` with tabs between ({error}); mend it") from error
    if not rows:
        raise ManifestError(f"{path} has no rows")
    return rows


TWO_TEXTS = {"sentence1": "text", "sentence2": "text"}
FORMS = {
    "Retrieval": _Form("AbsTaskRetrieval", "ndcg_at_10", ("corpus", "queries", "qrels"), _read_retrieval),
    "BitextMining": _Form("AbsTaskBitextMining", "f1", ("file",), _file(**TWO_TEXTS)),
    "Classification": _Form("AbsTaskClassification", "accuracy", ("train", "test"), _read_classification),
    "Clustering": _Form("AbsTaskClustering", "v_measure", ("file",), _file(sentences="text", labels="label"), _all_texts),
    "STS": _Form("AbsTaskSTS", "cosine_spearman", ("file",), _read_sts, _score_range),
    "PairClassification": _Form("AbsTaskPairClassification", "max_ap", ("file",), _read_labelled_pairs),
}
