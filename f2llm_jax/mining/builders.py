"""Labelled files as rows of pairs, as the recipe builds them (F2LLM v1; reference in `selection`).

    form             columns                                  rows
    nli              premise, hypothesis, label               premise -> what it entails; what contradicts it, then what is neutral
                                                              to it, are its first negatives, mining adds the rest
    sts              sentence1, sentence2, score (0 to 5)     pairs of score 4 or more, in both directions; negatives are mined
    classification   text, label (two labels)                 text -> its label's text, against the other label's; nothing is mined
    clustering       text, label                              text -> another text of its label, against random texts of other labels;
                                                              nothing is mined

NLI labels are the words `entailment`, `neutral`, `contradiction` or their first letters, or 0, 1, 2 in this order. Labels are the texts
that spell them (`inputs.cells.labels`): `007` and `7` are two.
"""

import dataclasses
from collections import Counter

import numpy as np
from etils import epath

from f2llm_jax.errors import UserError
from f2llm_jax.inputs.columns import BY_NAME, ColumnChoice, FileLayout
from f2llm_jax.inputs.fields import CellKind, Fields, read_fields
from f2llm_jax.inputs.folders import table_name
from f2llm_jax.inputs.pairs import instructed
from f2llm_jax.mining.inputs import SourcePairs
from f2llm_jax.mining.selection import generator

ENTAILED, NEUTRAL, CONTRADICTED = range(3)
NLI_LABELS = {
    spelling: number for number, word in enumerate(("entailment", "neutral", "contradiction")) for spelling in (word, word[0], str(number))
}
STS_MINIMUM, STS_MAXIMUM = 4.0, 5.0
LABELLED = FileLayout({"text": ("text", "sentence"), "label": ("label",)})
FORMS = {
    "nli": FileLayout({"premise": ("premise",), "hypothesis": ("hypothesis",), "label": ("label", "gold_label")}),
    "sts": FileLayout({"sentence1": ("sentence1",), "sentence2": ("sentence2",), "score": ("score",)}),
    "classification": LABELLED,
    "clustering": LABELLED,
}
INSTRUCTIONS = {
    "nli": "Given a premise, retrieve hypotheses that are entailed by the premise.",
    "sts": "Retrieve semantically similar text.",
    "classification": "Classify the topic of the given text.",
    "clustering": "Classify the topic of the given text.",
}
MINED = ("nli", "sts")  # forms whose negatives are mined


def build(
    form: str, path: epath.PathLike, instruction: str | None, negatives: int, seed: int, choice: ColumnChoice = BY_NAME
) -> tuple[SourcePairs, Counter[str]]:
    """Reads a labelled file as rows of one of the forms above, and counts what makes no row.

    Args:
      form: a key of `INSTRUCTIONS`.
      path: of a file or a folder that is a table.
      instruction: of queries; None for that of the form.
      negatives: n, texts of other clusters a row.
      seed: of what is random.
      choice: the user's columns.

    Raises:
      UserError: the file is missing, unreadable or empty, lacks a column, or has a value that the form does not know.
    """
    kinds: dict[str, CellKind] = {role: {"label": "label", "score": "number"}.get(role, "text") for role in FORMS[form].roles}  # type: ignore[misc]
    rows = read_fields(path, FORMS[form], kinds, choice)
    make = {"nli": _nli, "sts": _sts, "classification": _classification, "clustering": _clustering}[form]
    built, counters = make(rows, INSTRUCTIONS[form] if instruction is None else instruction, negatives, seed)
    if not built.queries:
        raise UserError(f"{path}: makes no row of the form {form!r} ({dict(counters)}); check its labels or the scale of its scores")
    return dataclasses.replace(built, name=table_name(path), described=rows.describe()), counters


def _nli(rows: Fields, instruction: str, negatives: int, seed: int) -> tuple[SourcePairs, Counter[str]]:
    by_premise: dict[str, tuple[list[str], list[str], list[str]]] = {}
    for row, (premise, hypothesis, label) in enumerate(zip(*(rows.values[role] for role in FORMS["nli"].roles), strict=True)):
        number = NLI_LABELS.get(label.lower())
        if number is None:
            raise UserError(f"{rows.place(row)} has the label {label!r}; use entailment, neutral or contradiction, or drop the row")
        by_premise.setdefault(premise, ([], [], []))[number].append(hypothesis)
    queries, passages, given = [], [], []
    for premise, hypotheses in by_premise.items():
        known = [text for text in dict.fromkeys(hypotheses[CONTRADICTED] + hypotheses[NEUTRAL]) if text not in hypotheses[ENTAILED]]
        for entailed in dict.fromkeys(hypotheses[ENTAILED]):
            queries.append(premise)
            passages.append(entailed)
            given.append(known[:negatives])
    counters = Counter({"premises that entail nothing": sum(not hypotheses[ENTAILED] for hypotheses in by_premise.values())})
    return _pairs(instructed(queries, instruction), passages, "retrieval", given), counters


def _sts(rows: Fields, instruction: str, negatives: int, seed: int) -> tuple[SourcePairs, Counter[str]]:
    found, counters = [], Counter[str]()
    for row, (first, second, score) in enumerate(zip(*(rows.values[role] for role in FORMS["sts"].roles), strict=True)):
        if not 0 <= score <= STS_MAXIMUM:
            raise UserError(f"{rows.place(row)} has the score {score:g}; scores of STS go from 0 to {STS_MAXIMUM:g}: scale them so")
        similar = score >= STS_MINIMUM
        if similar and first != second:
            found += [(first, second), (second, first)]
        else:
            counters["pairs of equal texts" if similar else f"pairs of a score below {STS_MINIMUM:g}"] += 1
    found = list(dict.fromkeys(found))
    return _pairs(instructed([query for query, _ in found], instruction), [passage for _, passage in found], "retrieval"), counters


def _classification(rows: Fields, instruction: str, negatives: int, seed: int) -> tuple[SourcePairs, Counter[str]]:
    texts, labels = rows.values["text"], rows.values["label"]
    names = sorted(set(labels))
    if len(names) != 2:
        raise UserError(f"{rows.files[0].path}: has {len(names)} labels, classification is between two; build it as clustering")
    opposite = dict(zip(names, reversed(names), strict=True))
    return _pairs(instructed(texts, instruction), labels, "classification", [[opposite[name]] for name in labels]), Counter()


def _clustering(rows: Fields, instruction: str, negatives: int, seed: int) -> tuple[SourcePairs, Counter[str]]:
    found = list(dict.fromkeys(zip(rows.values["text"], rows.values["label"], strict=True)))
    texts = [text for text, _ in found]
    _, label = np.unique([name for _, name in found], return_inverse=True)
    ambiguous = {text for text, count in Counter(texts).items() if count > 1}
    members = [np.flatnonzero(label == number) for number in range(label.max() + 1)]
    if max(map(len, members)) + negatives > len(texts):
        raise UserError(f"{rows.files[0].path}: a row has fewer than --negatives {negatives} texts of other labels; lower it")
    counters: Counter[str] = Counter()
    queries, passages, given = [], [], []
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
    return _pairs(instructed(queries, instruction), passages, "clustering", given), counters


def _pairs(queries: list[str], passages: list[str], kind: str, given: list[list[str]] | None = None) -> SourcePairs:
    return SourcePairs("", queries, passages, [""] * len(queries), kind, given or [])
