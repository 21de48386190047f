"""Of which kind a source is: what a tasks file says, or what its rows show."""

import re
from collections.abc import Sequence

import pyarrow.compute as pc
from etils import epath

from f2llm_jax.data.task_kind import TaskKind
from f2llm_jax.errors import UserError
from f2llm_jax.inputs.folders import TASKS_FILE, table_name
from f2llm_jax.inputs.pairs import PairFile, read_pairs
from f2llm_jax.preparation.catalogue import KINDS
from f2llm_jax.storage.files import read_json

SENTENCE = re.compile(r"(sentence|text|s|t)_?[1aA]")  # the first text of a pair in files of graded pairs
FEW_LABELS = 32  # distinct passages and negatives of a source that is taken for classification, at most
ROWS_A_LABEL = 4  # and rows for each of them, at least


def read_tasks(path: epath.PathLike, names: set[str] | None) -> dict[str, TaskKind]:
    """The kinds that a tasks file gives; `names` are the sources that exist, None where only one of them is read.

    Raises:
      UserError: it is not readable, names a source that is not there, or a kind that is none.
    """
    kinds = read_json(path)
    if not isinstance(kinds, dict):
        raise UserError(f'{path}: not a JSON object; write {{"source": "kind"}} there')
    problems = [
        f"{path}: names {name!r}, but there is no {name}.parquet; remove the line or add the file"
        for name in kinds
        if names is not None and name not in names
    ]
    problems += [
        f"{path}: {name!r} has the unknown kind {kind!r}; choose one of {', '.join(KINDS)}"
        for name, kind in kinds.items()
        if kind not in KINDS
    ]
    if problems:
        raise UserError("\n".join(problems))
    return kinds


def find_tasks(raw: epath.Path) -> epath.Path | None:
    """The tasks file in the folder `raw`; of a single file the one next to it that names it: any other there is somebody else's."""
    if not raw.is_file():
        return raw / TASKS_FILE if (raw / TASKS_FILE).exists() else None
    path = raw.parent / TASKS_FILE
    content = read_json(path) if path.exists() else None
    return path if isinstance(content, dict) and table_name(raw) in content else None


def guess(name: str, files: Sequence[PairFile], rows: int) -> tuple[TaskKind, str]:
    """The kind of the source `name`, which nothing tells, and why: its texts must look like labels to be taken for them.

    Triplets of a query, a positive and one negative are retrieval; they are classification only if their passages and negatives are
    few texts that come back row after row. Clustering looks like retrieval, so that only a tasks file or a catalogue can tell it.

    Raises:
      UserError: pairs have a score and no negatives, and their columns do not tell whether they are graded or positives.
    """
    if undecided := [pairs for pairs in files if pairs.scored and not pairs.negatives]:
        return _guess_scored(name, undecided[0])
    if {pairs.negatives for pairs in files} != {1}:
        return "retrieval", "guessed: a row of classification has exactly one negative; tasks.json can say otherwise"
    texts: set[str] = set()
    for block in (block for pairs in files for block in read_pairs(pairs)):
        for column in ("passage", "negative_1"):
            texts |= set(pc.unique(block.texts[column].values).to_pylist())
        if len(texts) > FEW_LABELS:
            break
    counted = f"{'more than ' if len(texts) > FEW_LABELS else ''}{min(len(texts), FEW_LABELS)} distinct passages and negatives"
    kind: TaskKind = "classification" if len(texts) <= FEW_LABELS and rows >= ROWS_A_LABEL * len(texts) else "retrieval"
    return kind, f"guessed: {rows:,} rows have {counted}; tasks.json can say otherwise"


def _guess_scored(name: str, pairs: PairFile) -> tuple[TaskKind, str]:
    """Two numbered sentences with a score are graded pairs; a query and a positive with one may be either."""
    path, query, scores = pairs.file.path, pairs.columns.roles["query"][0], ",".join(pairs.score_columns)
    if SENTENCE.fullmatch(query):
        return "graded", f"guessed: sentences ({query}) with a score; tasks.json can say otherwise"
    raise UserError(
        f"{path}: has a score ({scores}) and no negatives, so that its rows are graded pairs, of which some are not alike, or positives; "
        f'say which in tasks.json next to it, {{"{name}": "graded"}} or "retrieval"; '
        f"or leave the score out with --ignore-columns {scores}"
    )


def check_graded(name: str, kind: TaskKind, files: Sequence[PairFile]) -> None:
    """Raises a UserError for a source of graded pairs whose files do not hold such."""
    if kind != "graded":
        return
    if without := [pairs.file.path for pairs in files if not pairs.scored]:
        raise UserError(
            f"{without[0]}: the source {name!r} is of graded pairs and has no scores; name their column with --columns scores=NAME, "
            "or its kind in tasks.json"
        )
    if negatives := [pairs for pairs in files if pairs.negatives]:
        raise UserError(
            f"{negatives[0].file.path}: the source {name!r} is of graded pairs and has negatives ({negatives[0].columns.negatives[0]}); "
            "leave them out with --ignore-columns, or name another kind in tasks.json"
        )
    values, broken = set[float](), ""
    for scores in (block.scores for pairs in files for block in read_pairs(pairs) if block.scores):
        values |= {value for value in scores.values[:, 0].tolist() if value == value}
        broken = broken or next(iter(scores.broken.values()), "")
        if len(values) > 1:
            return
    raise UserError(
        f"{files[0].file.path}: all scores of the source {name!r} are alike{f' (one {broken})' * bool(broken)}, and graded pairs train on "
        "their differences; correct them, or leave the column out with --ignore-columns to train on the pairs as positives"
    )
