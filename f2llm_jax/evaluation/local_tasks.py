"""Users' own files as mteb tasks: a manifest names them, mteb measures, so the numbers are mteb's.

A manifest is a JSON file `{"tasks": [...]}`. Each task has a `name`, a `type` and its files of any form (docs/data.md), relative to the
manifest or as URLs; optionally an `instruction` ("" for none; by default that of the type), a `description`, `languages` (such as
"deu-Latn"), `columns` of other names (`{"text": "body"}`) and columns to leave out (`"ignore_columns": ["url"]`).

    Retrieval            corpus (id, text, optionally title), queries (id, text), qrels (query-id, corpus-id, score);
                         or beir: a folder with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv (split: "test" by default)
    BitextMining         file (sentence1, sentence2): row i translates row i
    Classification       train, test (text, label): a linear classifier learns from 8 texts a label, ten times
    Clustering           file (sentences, labels): all texts, k-means, ten times
    STS                  file (sentence1, sentence2, score)
    PairClassification   file (sentence1, sentence2, labels), labels 0 or 1, or false or true

Labels are of any type; a relevance above 0 is relevant, and fractions are gains as they are.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from etils import epath

from f2llm_jax.errors import UserError
from f2llm_jax.evaluation.instructions import near
from f2llm_jax.inputs.columns import ColumnChoice, FileLayout, check_ignored
from f2llm_jax.inputs.fields import CellKind, Fields, read_fields
from f2llm_jax.inputs.folders import table_paths
from f2llm_jax.inputs.judged import Judged, beir_paths, read_judged
from f2llm_jax.storage.files import is_remote, read_json

DEFAULT_LANGUAGES = ("mul-Zyyy",)
OPTIONAL = ("name", "type", "instruction", "description", "languages", "columns", "ignore_columns")
TWO_TEXTS = {"sentence1": ("sentence1",), "sentence2": ("sentence2",)}
TRUTH = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
FINEST = 10**6  # a fraction of relevance is exact to a millionth


@dataclasses.dataclass(frozen=True)
class _Form:
    """What a type of task needs: mteb's class and measure, its files, and the function that reads them into mteb's `dataset`."""

    base: str
    main_score: str
    files: Sequence[str]
    read: Callable[[Mapping[str, epath.Path], ColumnChoice], tuple[Any, Sequence[Fields | Judged]]]
    settings: Callable[[Any], dict[str, Any]] = lambda dataset: {}


def read_manifest(path: epath.PathLike) -> tuple[list[Any], dict[str, str]]:
    """The manifest's tasks, data checked and in memory, and the instructions it gives by task name.

    Raises:
      UserError: the manifest or a file is missing, malformed or empty, ids are unknown or not distinct.
    """
    path = epath.Path(path)
    content = read_json(path)
    entries = content.get("tasks") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f'{path} is not a JSON object {{"tasks": [...]}}; write it so, an object for each task')
    if not entries:
        raise UserError(f"{path} names no tasks; add one")
    tasks = [_task(path, entry) for entry in entries]
    if twice := [name for name, count in Counter(task.metadata.name for task in tasks).items() if count > 1]:
        raise UserError(f"{path}: the name {twice[0]!r} is given twice; a task's name is its results' file name, rename one")
    return tasks, {entry["name"]: entry["instruction"] for entry in entries if "instruction" in entry}


def _task(manifest: epath.Path, entry: Mapping[str, Any]) -> Any:
    """An instance of a class of its own, as mteb keeps what it knows of a task in the class."""
    import mteb

    form, name = _form(manifest, entry), str(entry["name"])
    folder = manifest.parent
    paths = {field: _place(folder, entry[field]) for field in form.files if field in entry}
    use, ignore = '"columns": {{"{role}": "{column}"}} in the task', '"ignore_columns": ["{column}"] in the task'
    choice = ColumnChoice(entry.get("columns", {}), entry.get("ignore_columns", ()), use, ignore)
    if missing := [field for field in form.files if field not in entry and "beir" not in entry]:
        raise UserError(f"{manifest}: task {name!r} lacks {', '.join(missing)}")
    if "beir" in entry:
        paths = dict(zip(form.files, beir_paths(_place(folder, entry["beir"]), entry.get("split", "test")), strict=True))
    dataset, read = form.read(paths, choice)
    check_ignored(choice)
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
        members["described"] = [f"{name}: {line}" for one in read for line in one.describe()]  # what was understood of its files
    except ValueError as error:
        raise UserError(f"{manifest}: task {name!r}: {error}") from error
    return type(str(name), (getattr(mteb.abstasks, form.base),), members)()


def _place(folder: epath.Path, path: str) -> epath.Path:
    return epath.Path(path) if is_remote(path) else folder / path


def _form(manifest: epath.Path, entry: Mapping[str, Any]) -> _Form:
    name, kind = entry.get("name"), entry.get("type")
    if not isinstance(name, str) or not name or "/" in name:
        raise UserError(f"{manifest}: a task has the name {name!r}; give it one without a slash")
    for field, value in entry.items():
        wanted = {"columns": dict, "ignore_columns": list, "languages": list}.get(field, str)
        texts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if not isinstance(value, wanted) or not all(isinstance(text, str) for text in texts):
            what = {dict: "an object of texts", list: "a list of texts", str: "a text"}[wanted]
            raise UserError(f"{manifest}: task {name!r} has {field} {value!r}; write {what}, or leave it out")
    if kind not in FORMS:
        raise UserError(f"{manifest}: task {name!r} has the type {kind!r}; choose among {', '.join(FORMS)}")
    known = {*OPTIONAL, *FORMS[kind].files, *(("beir", "split") if kind == "Retrieval" else ())}
    for field in entry:
        if field not in known:
            raise UserError(f"{manifest}: task {name!r} has the unknown field {field!r}{near(field, known)}")
    return FORMS[kind]


def _revision(entry: Mapping[str, Any], paths: Mapping[str, epath.Path]) -> str:
    """Digest of the files and of what the manifest says, so that results of older data are not taken for these."""
    digest = hashlib.sha256(json.dumps(entry, sort_keys=True).encode())
    for path in paths.values():
        for file, _ in table_paths(path):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _dataset(columns: Mapping[str, Sequence[Any]]) -> Any:
    import datasets

    return datasets.Dataset.from_dict(dict(columns))


def _fields(path: epath.Path, roles: Mapping[str, Sequence[str]], kinds: Mapping[str, CellKind], choice: ColumnChoice) -> Fields:
    return read_fields(path, FileLayout(roles), {role: kinds.get(role, "text") for role in roles}, choice)


def _numbered(rows: Sequence[Sequence[str]]) -> list[list[int]]:
    """Labels as whole numbers, which every measure of mteb takes; equal labels have one number in all lists."""
    number = {label: i for i, label in enumerate(sorted({label for labels in rows for label in labels}))}
    return [[number[label] for label in labels] for labels in rows]


def _read_bitext(paths: Mapping[str, epath.Path], choice: ColumnChoice) -> tuple[Any, Sequence[Fields | Judged]]:
    found = _fields(paths["file"], TWO_TEXTS, {}, choice)
    return {"test": _dataset(found.values)}, [found]


def _read_clusters(paths: Mapping[str, epath.Path], choice: ColumnChoice) -> tuple[Any, Sequence[Fields | Judged]]:
    roles = {"sentences": ("sentences", "sentence", "text"), "labels": ("labels", "label")}
    found = _fields(paths["file"], roles, {"labels": "label"}, choice)
    if len(set(found.values["labels"])) < 2:
        raise UserError(f"{paths['file']} has one label only, so that any clustering is right; give it texts of others")
    (labels,) = _numbered([found.values["labels"]])
    return {"test": _dataset(found.values | {"labels": labels})}, [found]


def _read_sts(paths: Mapping[str, epath.Path], choice: ColumnChoice) -> tuple[Any, Sequence[Fields | Judged]]:
    found = _fields(paths["file"], TWO_TEXTS | {"score": ("score",)}, {"score": "number"}, choice)
    if len(set(found.values["score"])) < 2:
        raise UserError(f"{paths['file']}: all scores are equal, so nothing correlates with them; give other rows")
    return {"test": _dataset(found.values)}, [found]


def _score_range(dataset: Any) -> dict[str, Any]:
    scores = dataset["test"]["score"]
    return {"min_score": min(scores), "max_score": max(scores)}


def _read_labelled_pairs(paths: Mapping[str, epath.Path], choice: ColumnChoice) -> tuple[Any, Sequence[Fields | Judged]]:
    found = _fields(paths["file"], TWO_TEXTS | {"labels": ("labels", "label")}, {"labels": "label"}, choice)
    labels = [TRUTH.get(label.casefold()) for label in found.values["labels"]]
    if None in labels:
        row = labels.index(None)
        raise UserError(f"{found.place(row)} has the label {found.values['labels'][row]!r}; write 1 for pairs that belong together, else 0")
    if set(labels) != {0, 1}:
        raise UserError(f"{paths['file']}: all labels are {labels[0]}; both 0 and 1 must occur")
    return {"test": _dataset(found.values | {"labels": labels})}, [found]


def _read_classification(paths: Mapping[str, epath.Path], choice: ColumnChoice) -> tuple[Any, Sequence[Fields | Judged]]:
    import datasets

    splits = ("train", "test")
    tables = [_fields(paths[split], {"text": ("text",), "label": ("label",)}, {"label": "label"}, choice) for split in splits]
    train, test = (table.values for table in tables)
    seen = set(train["label"])
    if unseen := set(test["label"]) - seen:
        raise UserError(f"{paths['test']} has the label {min(unseen)!r}, which {paths['train']} does not have; add texts of it or drop it")
    if len(seen) < 2:
        raise UserError(f"{paths['train']} has one label only; a classifier needs two")
    labels = _numbered([train["label"], test["label"]])
    numbered = {split: _dataset(table | {"label": numbers}) for split, table, numbers in zip(splits, (train, test), labels, strict=True)}
    return datasets.DatasetDict(numbered), tables


def _all_texts(dataset: Any) -> dict[str, Any]:
    """mteb clusters 4% of a large data set; of a user's own files nothing is left out."""
    return {"max_fraction_of_documents_to_embed": None, "max_documents_per_cluster": min(16_384, len(dataset["test"]))}


def _read_retrieval(paths: Mapping[str, epath.Path], choice: ColumnChoice) -> tuple[Any, Sequence[Fields | Judged]]:
    judged = read_judged([paths[name] for name in ("corpus", "queries", "qrels")], choice)
    split = {
        "corpus": _dataset({"id": list(judged.documents), "text": list(judged.documents.values())}),
        "queries": _dataset({"id": list(judged.queries), "text": list(judged.queries.values())}),
        "relevant_docs": _whole_gains(judged.relevance),
        "top_ranked": None,
    }
    return {"default": {"test": split}}, [judged]


def _whole_gains(relevance: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, int]]:
    """Relevances as the whole numbers that trec_eval takes: multiplied by what makes all of them whole, which no measure notices.

    Gains are linear in nDCG, a ratio, and every other measure asks only whether a relevance is above 0.
    """
    scores = [score for of_query in relevance.values() for score in of_query.values()]
    fractions = [Fraction(score).limit_denominator(FINEST) for score in scores]
    factor = min(FINEST, functools.reduce(math.lcm, (fraction.denominator for fraction in fractions), 1))
    if any(0 < score < 1 / FINEST for score in scores):  # no fraction tells it from 0, and it is to be less than every other
        factor = FINEST
    return {query: {document: _whole(score, factor) for document, score in found.items()} for query, found in relevance.items()}


def _whole(score: float, factor: int) -> int:
    """Rounded, but above 0 what is above 0."""
    gain = round(Fraction(score).limit_denominator(FINEST) * factor)
    return max(1, gain) if score > 0 else min(0, gain)


FORMS = {
    "Retrieval": _Form("AbsTaskRetrieval", "ndcg_at_10", ("corpus", "queries", "qrels"), _read_retrieval),
    "BitextMining": _Form("AbsTaskBitextMining", "f1", ("file",), _read_bitext),
    "Classification": _Form("AbsTaskClassification", "accuracy", ("train", "test"), _read_classification),
    "Clustering": _Form("AbsTaskClustering", "v_measure", ("file",), _read_clusters, _all_texts),
    "STS": _Form("AbsTaskSTS", "cosine_spearman", ("file",), _read_sts, _score_range),
    "PairClassification": _Form("AbsTaskPairClassification", "max_ap", ("file",), _read_labelled_pairs),
}
