"""The published data rules as a program of its own: raw files and the texts of an epoch's batches in, violations out.

It knows the rules of the F2LLM-v2 paper (section 3.2) and of the published code (F2LLM `run.py`, `utils.py`, `tokenize_data_qwen.py`), and
nothing of the package: not its catalogue, its format or its order.
"""

import random
import re

import pyarrow.parquet as pq

# F2LLM `utils.py`, those of a rehearsal.
CLASSIFICATION = {"amazon_counterfactual", "amazon_polarity", "imdb", "toxic_conversations", "cola", "mela", "waimai"}
CLUSTERING = {"banking77", "emotion", "sib200", "amazon_reviews", "mtop_intent", "europarl", "csl", "tnews"}
NEGATIVES = {"retrieval": 7, "clustering": 9, "classification": 1}
STAGE_1 = ("paracrawl_", "mmarco_", "webfaq_", "clirmatrix_", "ocgi", "csn_")  # csn_ and csn_ccr_ are two of the seven sources
MELA = {"mela": (0, 40_267), "scala": (40_267, 168_738), "dala": (168_738, 175_246)}
INSTRUCTION = re.compile(r"\AInstruct: .*?\nQuery: ", re.DOTALL)


def kind_of(stem):
    return "classification" if stem in CLASSIFICATION else "clustering" if stem in CLUSTERING else "retrieval"


def cap_unit(stem, row):
    """Directions of a bitext and parts of a set share a cap; mela.parquet is three sources."""
    if stem == "mela":
        return next(name for name, (start, stop) in MELA.items() if start <= row < stop)
    return re.sub(r"\A(unpc|paracrawl|clirmatrix)_.*|_part\d+\Z", lambda found: found[1] or "", stem)


class Rows:
    """The rows of the raw files that a stage may use, by the query that is trained on."""

    def __init__(self, folder, stage):
        self.by_query, self.units, self.odd = {}, {}, {}
        for path in sorted(folder.glob("*.parquet")):
            if stage == 1 and not path.stem.startswith(STAGE_1):
                continue
            table = pq.read_table(path).to_pydict()
            columns = [f"negative_{i}" for i in range(1, 25) if f"negative_{i}" in table]
            for row, query in enumerate(table["query"]):
                unit = cap_unit(path.stem, row)
                self.units[unit] = self.units.get(unit, 0) + 1
                if not table["passage"][row]:  # known oddity: no positive
                    self.odd[unit] = self.odd.get(unit, 0) + 1
                    continue
                shown = INSTRUCTION.sub("", query) if stage == 1 else query
                assert shown not in self.by_query
                self.by_query[shown] = path.stem, row, table["passage"][row], [table[name][row] for name in columns]


def check(folder, stage, batches, *, batch_size, cap, held_out, repeated_negatives):
    """Raises AssertionError at the first violation; returns what was counted.

    Args:
      folder: the raw files.
      stage: 1 or 2.
      batches: of an epoch in order, each `(in_batch, samples)`: whether other samples' positives are negatives too, and for each sample
        its query, its positive and its negatives, as texts.
      batch_size: of a full batch.
      cap: queries a unit at most; 0 for all.
      held_out: queries that may not be trained on.
      repeated_negatives: whether negatives that are empty, repeat or are the positive stay, as published, or give way to others of the row.
    """
    rows = Rows(folder, stage)
    seen, steps, partial, used = {}, {}, set(), {}
    for in_batch, samples in batches:
        found = [rows.by_query[query] for query, _, _ in samples]
        stems = {(stem, cap_unit(stem, row) if stem == "mela" else stem) for stem, row, _, _ in found}
        assert len(stems) == 1, f"a batch from {stems}"
        ((stem, group),) = stems
        kind = kind_of(stem)
        assert in_batch == (kind == "retrieval"), f"{stem}: in-batch negatives are for retrieval only"
        assert 0 < len(samples) <= batch_size
        assert group not in partial, f"{stem}: a batch after the one that is not full"
        if len(samples) < batch_size:
            partial.add(group)
        columns = None
        for (query, positive, negatives), (_, row, passage, stored) in zip(samples, found, strict=True):
            assert query not in held_out, f"{stem}: row {row} is held out"
            assert query not in seen, f"{stem}: row {row} twice in an epoch"
            seen[query] = stem
            assert stage == 2 or not INSTRUCTION.match(query)
            assert positive == passage, f"{stem}: row {row} with another positive"
            valid = (
                [text for text in stored if text] if repeated_negatives else list(dict.fromkeys(t for t in stored if t and t != passage))
            )
            assert len(negatives) == min(NEGATIVES[kind], len(valid)), f"{stem}: {len(negatives)} negatives"
            assert set(negatives) <= set(valid) and (repeated_negatives or len(set(negatives)) == len(negatives))
            if len(valid) == len(stored):  # one draw of columns for all samples of a batch
                mine = [stored.index(text) for text in negatives]
                columns = columns or mine
                assert mine == columns, f"{stem}: row {row} uses other columns"
        used.setdefault(stem, set()).update(columns or [])
        steps[group] = steps.get(group, 0) + 1
    taken = {}
    for query in {*seen, *held_out}:
        stem, row, _, _ = rows.by_query[query]
        taken[cap_unit(stem, row)] = taken.get(cap_unit(stem, row), 0) + 1
    assert taken.keys() == rows.units.keys()
    for unit, count in rows.units.items():
        most = min(count, cap or count)
        least = count - rows.odd.get(unit, 0) if most == count else most - rows.odd.get(unit, 0)
        assert least <= taken[unit] <= min(most, count - rows.odd.get(unit, 0)), f"{taken[unit]} rows of the unit {unit}"
    return {"files": set(seen.values()), "units": taken, "steps": steps, "columns": used, "rows": len(seen)}


def published_order(batches: dict[str, int], epoch: int) -> list[str]:
    """F2LLM `run.py`, `MultiLoader`: weights stay those of the beginning until a loader is exhausted; then it is removed."""
    rng, names, weights, left = random.Random(epoch), list(batches), list(batches.values()), dict(batches)
    order = []
    while names:
        name = rng.choices(names, weights=weights)[0]
        if left[name]:
            left[name] -= 1
            order.append(name)
        else:
            at = names.index(name)
            del names[at], weights[at]
    return order
