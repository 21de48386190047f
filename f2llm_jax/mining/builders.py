"""Labelled files as rows of pairs, as the recipe builds them (F2LLM v1; reference in `selection`).

    form             columns                                  rows
    nli              premise, hypothesis, label               premise -> what it entails; what contradicts it, then what is neutral
                                                              to it, are its first negatives, mining adds the rest
    sts              sentence1, sentence2, score              pairs of score 4 or more, in both directions; negatives are mined
    classification   text, label (two labels)                 text -> its label's text, against the other label's; nothing is mined
    clustering       text, label                              text -> another text of its label, against random texts of other labels;
                                                              nothing is mined

NLI labels are the words `entailment`, `neutral`, `contradiction` or their first letters, or 0, 1, 2 in this order.
"""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from etils import epath

from f2llm_jax.mining.errors import MiningError
from f2llm_jax.mining.inputs import Pairs, instructed
from f2llm_jax.mining.selection import generator
from f2llm_jax.preparation.raw_files import source_name

ENTAILED, NEUTRAL, CONTRADICTED = range(3)
NLI_LABELS = {
    spelling: number for number, word in enumerate(("entailment", "neutral", "contradiction")) for spelling in (word, word[0], str(number))
}
STS_MINIMUM = 4.0
INSTRUCTIONS = {
    "nli": "Given a premise, retrieve hypotheses that are entailed by the premise.",
    "sts": "Retrieve semantically similar text.",
    "classification": "Classify the topic of the given text.",
    "clustering": "Classify the topic of the given text.",
}
MINED = ("nli", "sts")  # forms whose negatives are mined


def build(form: str, path: epath.PathLike, instruction: str | None, negatives: int, seed: int) -> tuple[Pairs, Counter]:
    """Reads a labelled file as rows of one of the forms above, and counts what makes no row.

    Args:
      form: a key of `INSTRUCTIONS`.
      path: of a parquet, JSONL or CSV file.
      instruction: of queries; None for that of the form.
      negatives: n, texts of other clusters a row.
      seed: of what is random.

    Raises:
      MiningError: the file is missing, unreadable or empty, lacks a column, or has a value that the form does not know.
    """
    path = epath.Path(path)
    make: Callable[..., tuple[Pairs, Counter]] = {"nli": _nli, "sts": _sts, "classification": _classification, "clustering": _clustering}[
        form
    ]
    instruction = INSTRUCTIONS[form] if instruction is None else instruction
    pairs, counters = make(path, instruction, negatives, seed)
    if not pairs.queries:
        raise MiningError(f"{path}: makes no row of the form {form!r} ({dict(counters)}); check its labels")
    return pairs, counters


def _nli(path: epath.Path, instruction: str, negatives: int, seed: int) -> tuple[Pairs, Counter]:
    by_premise: dict[str, tuple[list[str], list[str], list[str]]] = {}
    for row, (premise, hypothesis, label) in enumerate(_read(path, ("premise", "hypothesis"), "label")):
        number = NLI_LABELS.get(str(label).lower())
        if number is None:
            raise MiningError(f"{path}: row {row} has the label {label!r}; use entailment, neutral or contradiction, or drop the row")
        by_premise.setdefault(premise, ([], [], []))[number].append(hypothesis)
    queries, passages, given = [], [], []
    for premise, hypotheses in by_premise.items():
        known = [text for text in dict.fromkeys(hypotheses[CONTRADICTED] + hypotheses[NEUTRAL]) if text not in hypotheses[ENTAILED]]
        for entailed in dict.fromkeys(hypotheses[ENTAILED]):
            queries.append(premise)
            passages.append(entailed)
            given.append(known[:negatives])
    counters = Counter({"premises that entail nothing": sum(not hypotheses[ENTAILED] for hypotheses in by_premise.values())})
    return _pairs(path, instructed(queries, instruction), passages, "retrieval", given), counters


def _sts(path: epath.Path, instruction: str, negatives: int, seed: int) -> tuple[Pairs, Counter]:
    rows, counters = [], Counter()
    for row, (first, second, score) in enumerate(_read(path, ("sentence1", "sentence2"), "score")):
        try:
            similar = float(score) >= STS_MINIMUM
        except ValueError as error:
            raise MiningError(f"{path}: row {row} has the score {score!r}, which is no number; mend it") from error
        if similar and first != second:
            rows += [(first, second), (second, first)]
        else:
            counters["pairs of equal texts" if similar else f"pairs of a score below {STS_MINIMUM:g}"] += 1
    rows = list(dict.fromkeys(rows))
    return _pairs(path, instructed([query for query, _ in rows], instruction), [passage for _, passage in rows], "retrieval"), counters


def _classification(path: epath.Path, instruction: str, negatives: int, seed: int) -> tuple[Pairs, Counter]:
    texts, labels = zip(*_read(path, ("text",), "label"), strict=True)
    names = sorted({str(label) for label in labels})
    if len(names) != 2:
        raise MiningError(f"{path}: has {len(names)} labels, classification is between two; build it as clustering")
    opposite = dict(zip(names, reversed(names), strict=True))
    labels = [str(label) for label in labels]
    return _pairs(path, instructed(list(texts), instruction), labels, "classification", [[opposite[name]] for name in labels]), Counter()


def _clustering(path: epath.Path, instruction: str, negatives: int, seed: int) -> tuple[Pairs, Counter]:
    rows = list(dict.fromkeys((text, str(label)) for text, label in _read(path, ("text",), "label")))
    texts = [text for text, _ in rows]
    _, label = np.unique([name for _, name in rows], return_inverse=True)
    ambiguous = {text for text, count in Counter(texts).items() if count > 1}
    members = [np.flatnonzero(label == number) for number in range(label.max() + 1)]
    if max(map(len, members)) + negatives > len(texts):
        raise MiningError(f"{path}: a row has fewer than --negatives {negatives} texts of other labels; lower it")
    counters, queries, passages, given = Counter(), [], [], []
    for row, text in enumerate(texts):
        fellows = members[label[row]]
        if len(fellows) < 2 or text in ambiguous:
            counters["texts alone with their label" if len(fellows) < 2 else "texts of more than one label"] += 1
            continue
        draw = generator(seed, text)
        passage = fellows[(np.searchsorted(fellows, row) + 1 + draw.integers(len(fellows) - 1)) % len(fellows)]
        options = draw.choice(len(texts), min(len(texts), len(fellows) + 2 * negatives), replace=False)
        others = [texts[i] for i in options if label[i] != label[row] and texts[i] not in ambiguous][:negatives]
        if texts[passage] in ambiguous or len(others) < negatives:
            counters["texts whose draw met texts of more than one label"] += 1
            continue
        queries.append(text)
        passages.append(texts[passage])
        given.append(others)
    return _pairs(path, instructed(queries, instruction), passages, "clustering", given), counters


def _pairs(path: epath.Path, queries: list[str], passages: list[str], kind: str, given: list[list[str]] | None = None) -> Pairs:
    return Pairs(source_name(path), queries, passages, [""] * len(queries), kind, given or [])


def _read(path: epath.Path, texts: tuple[str, ...], label: str) -> list[tuple]:
    """The rows of a labelled file: texts, then the label as it stands there."""
    if not path.exists() or source_name(path) is None:
        raise MiningError(f"{path} is no parquet, JSONL or CSV file that exists; name one")
    read = pq.read_table if path.suffix == ".parquet" else pyarrow.csv.read_csv if path.suffix == ".csv" else pyarrow.json.read_json
    try:
        with path.open("rb") as file:
            table = read(file)
    except pa.ArrowException as error:
        raise MiningError(f"{path} cannot be read ({' '.join(str(error).split())}); mend it") from error
    if missing := [name for name in (*texts, label) if name not in table.column_names]:
        raise MiningError(f"{path} has no column {', '.join(map(repr, missing))}, only {', '.join(table.column_names)}; rename one")
    columns = [table[name].to_pylist() for name in (*texts, label)]
    for name, column in zip((*texts, label), columns, strict=True):
        for row, value in enumerate(column):
            if value is None or (name != label and not (isinstance(value, str) and value.strip())):
                raise MiningError(f"{path}: row {row}, column {name!r} is {value!r}; give it a text or drop the row")
    return list(zip(*columns, strict=True))
