"""What a prepared dataset holds, for people: a table, the same as JSON, and a picture of token lengths and languages."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from f2llm_jax.data import records
from f2llm_jax.storage import arrays, files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WARNING = "warning: "  # how counters of what is remarkable begin
PERCENTILES = (50, 95, 99)
BLOCK_TEXTS = 1_048_576  # of a table that are counted at once
SHOWN_LANGUAGES = 40


def write(folder: epath.PathLike, sources: Sequence[records.SourceInfo]) -> None:
    """Writes `summary.json` and `summary.png` to a dataset whose sources are complete."""
    folder = epath.Path(folder)
    histograms = {source.name: _token_lengths(folder, source) for source in sources}
    entries = [
        dataclasses.asdict(source) | {"skipped": source.skipped, "token_lengths": _percentiles(histograms[source.name])}
        for source in sources
    ]
    files.write_json(folder / "summary.json", {"sources": entries}, sealed=True)
    with (folder / "summary.png").open("wb") as file:
        _draw(sources, histograms).savefig(file, format="png", dpi=100)


def table(folder: epath.PathLike) -> str:
    """`summary.json` as a table, one line a source and one for all, then what cleaning did."""
    sources = files.read_json(epath.Path(folder) / "summary.json", sealed=True)["sources"]
    names = [f"p{percent}" for percent in PERCENTILES] + ["max"]
    lines = [("source", "kind", "languages", "train", "validation", "skipped", "documents", "tokens", *names)]
    for entry in sources:
        languages = ",".join(entry["languages"]) if len(entry["languages"]) <= 2 else str(len(entry["languages"]))
        counts = (*entry["rows"].values(), entry["skipped"], entry["documents"], sum(entry["tokens"].values()))
        lengths = entry["token_lengths"]
        lines.append((entry["name"], entry["kind"], languages or "-", *(f"{n:,}" for n in (*counts, *(lengths[name] for name in names)))))
    totals = [sum(int(line[column].replace(",", "")) for line in lines[1:]) for column in range(3, 8)]
    every = {language for entry in sources for language in entry["languages"]}
    units = len({entry["unit"] for entry in sources})
    lines.append((f"{len(sources)} sources", f"{units} units", str(len(every)), *(f"{total:,}" for total in totals), *[""] * len(names)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        "  ".join(cell.ljust(width) if i < 3 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    cleaned: Counter[str] = Counter()
    for entry in sources:
        cleaned.update({reason: count for reason, count in entry["counters"].items() if not reason.startswith(WARNING)})
    warnings = [line for entry in sources for line in _warnings(entry)]
    return "\n".join([*(row.rstrip() for row in rows), *(f"{reason}: {count:,}" for reason, count in sorted(cleaned.items())), *warnings])


def _warnings(entry: dict[str, Any]) -> Iterator[str]:
    """What is remarkable in a source, each with its share of what it is counted in."""
    rows, documents = sum(entry["rows"].values()), entry["documents"]
    of = {"documents": documents, "held-out": entry["rows"]["validation"], "texts": rows + documents}
    for reason, count in entry["counters"].items():
        if reason.startswith(WARNING):
            what = reason.removeprefix(WARNING)
            total = of.get(what.split()[0], rows)
            yield f"{WARNING}{entry['name']}: {count:,} of {total:,} {what} ({count / max(total, 1):.1%})"


def _token_lengths(folder: epath.Path, source: records.SourceInfo) -> np.ndarray:
    """Number of texts (queries, distinct documents) of each length, int64 `[longest + 1]`."""
    target = records.tables_folder(folder, source.name)
    paths = [target / f"{split}.query_length.npy" for split in records.QUERY_SPLITS] + [target / f"{records.CORPUS}.length.npy"]
    tables = [arrays.read_array(path, salt=f"{source.name}/{path.name.removesuffix('.npy')}") for path in paths]
    blocks = [table[start : start + BLOCK_TEXTS] for table in tables for start in range(0, len(table), BLOCK_TEXTS)]
    counts = [np.bincount(block) for block in blocks]
    total = np.zeros(max(map(len, counts)), np.int64)
    for count in counts:
        total[: len(count)] += count
    return total


def _percentiles(histogram: np.ndarray) -> dict[str, int]:
    """By name, the shortest length that so many percent of the texts do not exceed."""
    reached = np.cumsum(histogram)
    found = {f"p{percent}": int(np.searchsorted(reached, percent / 100 * reached[-1])) for percent in PERCENTILES}
    return found | {"max": len(histogram) - 1}


def _draw(sources: Sequence[records.SourceInfo], histograms: dict[str, np.ndarray]) -> "Figure":
    """Token lengths by kind of task, and the languages with the most rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    longest = max(map(len, histograms.values()))
    bins = np.unique(np.geomspace(1, longest, 60).astype(int))
    for kind in sorted({source.kind for source in sources}):
        total = np.zeros(longest, np.int64)
        for source in sources:
            if source.kind == kind:
                total[: len(histograms[source.name])] += histograms[source.name]
        left.hist(np.arange(longest), bins, weights=total, histtype="step", label=kind)
    left.set(xscale="log", yscale="log", xlabel="tokens", ylabel="texts", title="Lengths of queries and distinct documents")
    left.legend()
    languages: Counter[str] = Counter()
    for source in sources:
        languages.update(source.languages)
    most = languages.most_common(SHOWN_LANGUAGES)
    right.bar([name for name, _ in most], [count for _, count in most])
    right.tick_params(axis="x", rotation=90)
    right.set(yscale="log", ylabel="rows", title=f"Languages: the {len(most)} with most rows of {len(languages)}")
    return figure
