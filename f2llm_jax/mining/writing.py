"""Mined sources on disk: raw files as `prepare` reads them, with the scores, and what people want to see of them.

    OUT/<source>.parquet     query, passage, negative_1 ... negative_n, lang if known, scores (list: positive, negatives)
    OUT/tasks.json           kinds, for prepare
    OUT/scores.png           histograms of the scores
    OUT/examples.txt         ten rows to read
    OUT/summary.json         rows kept and skipped, why, scores, rules; written last

Written complete or not at all (see `folders.new_folder`).
"""

import dataclasses
import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath
from matplotlib.figure import Figure

from f2llm_jax.mining.inputs import SourcePairs, check_names
from f2llm_jax.mining.pool import Pool, PoolRows
from f2llm_jax.mining.rows import MinedRows
from f2llm_jax.storage.files import write_json, write_text
from f2llm_jax.storage.folders import new_folder

EXAMPLES, SHOWN_NEGATIVES, SHOWN_TEXT = 10, 5, 300
BINS = np.linspace(-1, 1, 201)
PERCENTILES = (1, 10, 50, 90, 99)


@dataclasses.dataclass
class Seen:
    """What is remembered of rows that have been written."""

    positive: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(len(BINS) - 1, np.int64))
    negative: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(len(BINS) - 1, np.int64))
    hardest: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(len(BINS) - 1, np.int64))
    examples: list[tuple[int, str]] = dataclasses.field(default_factory=list)

    def add(self, scores: np.ndarray) -> None:
        """Takes `[rows, 1 + n]` scores."""
        clipped = np.clip(scores, -1, 1)
        self.positive += np.histogram(clipped[:, 0], BINS)[0]
        self.negative += np.histogram(clipped[:, 1:], BINS)[0]
        self.hardest += np.histogram(clipped[:, 1:].max(axis=1), BINS)[0]


def write_source(folder: epath.Path, pool: Pool, source: PoolRows, parts: Iterable[MinedRows], negatives: int, seen: Seen) -> Counter:
    """Writes the file of a source; returns its counters."""
    languages = any(source.languages)
    names = ["query", "passage", *(f"negative_{i}" for i in range(1, negatives + 1))]
    fields = [*((name, pa.string()) for name in [*names, *(["lang"] if languages else [])]), ("scores", pa.list_(pa.float32()))]
    counters: Counter[str] = Counter()
    with (folder / f"{source.name}.parquet").open("wb") as file, pq.ParquetWriter(file, schema := pa.schema(fields)) as writer:
        for part in parts:
            counters += part.counters
            documents = np.column_stack([source.positive[part.index], part.negatives])
            columns = [pool.queries.take(pa.array(source.query[part.index]))]
            columns += [pool.documents.take(pa.array(column)) for column in documents.T]
            columns = [column.cast(pa.string()) for column in columns]
            columns += [pa.array([source.languages[i] for i in part.index], pa.string())] if languages else []
            scores = pa.ListArray.from_arrays(np.arange(0, part.scores.size + 1, negatives + 1, dtype=np.int32), part.scores.ravel())
            writer.write_table(pa.table([*columns, scores], schema=schema))
            if len(part.index):
                seen.add(part.scores)
                _remember(seen, source.name, columns, part.scores)
    return counters


def write_summary(folder: epath.Path, kinds: dict[str, str], seen: Seen, settings: dict) -> None:
    """Writes everything else; `settings` go into summary.json as they are."""
    write_json(folder / "tasks.json", kinds)
    write_text(folder / "examples.txt", "\n".join(text for _, text in sorted(seen.examples, reverse=True)))
    with (folder / "scores.png").open("wb") as file:
        _draw(seen).savefig(file, format="png", dpi=100)
    scores = {name: _percentiles(getattr(seen, name)) for name in ("positive", "negative", "hardest")}
    write_json(folder / "summary.json", {**settings, "scores": scores})


def write_built(
    sources: Sequence[SourcePairs],
    counters: Mapping[str, Counter],
    out: epath.PathLike,
    overwrite: bool,
    inputs: Mapping[str, epath.PathLike] | None = None,
) -> dict:
    """Writes sources whose negatives are all given, without scores; returns what summary.json says.

    Raises:
      UserError: two sources have one name.
      FileError: there is something at `out` and it is not to be replaced, or it holds one of the `inputs`.
    """
    check_names(sources)
    with new_folder(out, "summary.json", overwrite, inputs) as folder:
        for source in sources:
            negatives = {f"negative_{i}": texts for i, texts in enumerate(zip(*source.given, strict=True), 1)}
            columns = {"query": source.queries, "passage": source.passages, **negatives}
            with (folder / f"{source.name}.parquet").open("wb") as file:
                pq.write_table(pa.table({name: pa.array(texts, pa.string()) for name, texts in columns.items()}), file)
        write_json(folder / "tasks.json", {source.name: source.kind for source in sources})
        total = {"kept": sum(len(source.queries) for source in sources), **sum(counters.values(), Counter())}
        summary = {"total": total, "sources": {name: dict(counted) for name, counted in counters.items()}}
        write_json(folder / "summary.json", summary)
    return summary


def _remember(seen: Seen, source: str, columns: list[pa.Array], scores: np.ndarray) -> None:
    """Keeps the ten examples of lowest hash, wherever their rows stand."""
    for row in range(len(scores)):
        text = columns[0][row].as_py()
        key = -int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
        if len(seen.examples) < EXAMPLES or key > seen.examples[0][0]:
            example = (key, "\n".join(_example(source, [column[row].as_py() for column in columns], scores[row])))
            (heapq.heappush if len(seen.examples) < EXAMPLES else heapq.heappushpop)(seen.examples, example)


def _example(source: str, texts: list[str], scores: np.ndarray) -> Iterator[str]:
    yield f"{source}\n         query  {_shown(texts[0])}"
    yield f"  {scores[0]:.4f} positive  {_shown(texts[1])}"
    yield from (f"  {score:.4f} negative  {_shown(text)}" for score, text in zip(scores[1 : 1 + SHOWN_NEGATIVES], texts[2:], strict=False))
    yield ""


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN_TEXT else f"{text[:SHOWN_TEXT]} ...")


def _percentiles(histogram: np.ndarray) -> dict[str, float]:
    """By name, the upper end of the bin that so many percent of the scores do not exceed."""
    reached = np.cumsum(histogram)
    if not reached[-1]:
        return {}
    return {f"p{percent}": round(float(BINS[1 + np.searchsorted(reached, percent / 100 * reached[-1])]), 2) for percent in PERCENTILES}


def _draw(seen: Seen) -> Figure:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, label in (("positive", "positives"), ("hardest", "nearest negative of a row"), ("negative", "all negatives")):
        histogram = getattr(seen, name)
        axes.stairs(histogram / max(1, histogram.sum()), BINS, label=label)
    filled = np.flatnonzero(seen.positive + seen.negative)
    low, high = (BINS[filled[0]], BINS[filled[-1] + 1]) if len(filled) else (-1, 1)
    axes.set(xlim=(low - 0.02, high + 0.02), xlabel="cosine with the query", ylabel="share", title="Scores of mined rows")
    axes.legend()
    return figure
