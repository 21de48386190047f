"""Runs on one page: self-contained HTML that follows the reader's light or dark theme, and every picture as a PNG next to it."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from etils import epath
from matplotlib.figure import Figure

from f2llm_jax.data.records import load_dataset
from f2llm_jax.errors import UserError
from f2llm_jax.inference.encode import load_encoder
from f2llm_jax.model.decoder import count_parameters
from f2llm_jax.reporting import charts
from f2llm_jax.reporting.embedding_sample import EmbeddingSample, principal_plane, sample_embeddings
from f2llm_jax.reporting.goodput import Goodput, goodput_chart, read_goodput
from f2llm_jax.reporting.page import Chart, RunLine, page
from f2llm_jax.reporting.run_record import RunRecord, read_record
from f2llm_jax.storage.files import write_bytes, write_text
from f2llm_jax.storage.folders import check_new_folder, new_folder
from f2llm_jax.weights.models import find_model

PAGE = "report.html"
NAMED = 12  # languages at either end that are named where there are too many to label

Parts = list[tuple[str, str, str, Figure | None]]  # file name, title, note, picture


class ReportError(UserError):
    """A workdir that cannot be reported on; the message names the remedy."""


def write_report(workdirs: Sequence[epath.PathLike], out: pathlib.Path) -> pathlib.Path:
    """Writes `report.html` and the PNGs to the folder `out`, which is replaced if it holds an older report; returns the page.

    Args:
      workdirs: of runs, laid over each other in this order; what shows one run shows the first.
      out: folder to make.

    Raises:
      ReportError: a workdir recorded nothing.
      FileError: `out` holds something else than an older report.
    """
    check_new_folder(out, True, {str(workdir): workdir for workdir in workdirs})
    runs = read_runs(workdirs)
    samples, missing, lines = {}, [], []
    for run, workdir, color in zip(runs, workdirs, charts.colors(runs), strict=True):
        parameters = None
        try:
            origin = find_model(str(workdir))
            parameters = count_parameters(origin.config)
            samples[run.name] = sample_embeddings(load_encoder(origin), load_dataset(_data_folder(run, workdir)))
        except UserError as error:
            missing.append(f"No picture of the space of {run.name}: {error}")
        lines.append(RunLine(run, parameters, color))
    kept = {run.name: read_goodput(workdir) for run, workdir in zip(runs, workdirs, strict=True)}
    goodputs = {name: found for name, found in kept.items() if found}
    sections = {name: _charts(parts) for name, parts in _sections(runs, samples, goodputs).items()}
    content = page(lines, {name: found for name, found in sections.items() if found}, missing)
    with new_folder(out, PAGE, overwrite=True, inputs={str(workdir): workdir for workdir in workdirs}) as folder:
        for chart in (chart for found in sections.values() for chart in found):
            write_bytes(folder / f"{chart.name}.png", charts.png(chart.figure))
        write_text(folder / PAGE, content)
    return out / PAGE


def read_runs(workdirs: Sequence[epath.PathLike]) -> list[RunRecord]:
    """The runs under names that tell them apart: their folder's, or as much of the path as it takes.

    Raises:
      ReportError: a workdir has no metrics, or is given twice.
    """
    runs, paths = [read_record(workdir) for workdir in workdirs], [epath.Path(workdir).parts for workdir in workdirs]
    if empty := [str(workdir) for run, workdir in zip(runs, workdirs, strict=True) if not run.metrics]:
        raise ReportError(f"{empty[0]} has no metrics.jsonl; point to the --workdir of a run of f2llm_jax.main")
    if len(set(paths)) < len(paths):
        raise ReportError("a workdir is given twice; give each once")
    depth = next(depth for depth in range(1, max(map(len, paths)) + 1) if len({path[-depth:] for path in paths}) == len(paths))
    return [dataclasses.replace(run, name="/".join(path[-depth:])) for run, path in zip(runs, paths, strict=True)]


def _data_folder(run: RunRecord, workdir: epath.PathLike) -> epath.PathLike:
    """The dataset of a run: the one its configuration names, or the embedded one that it made itself."""
    return run.config.get("data", {}).get("folder") or epath.Path(workdir) / "data"


def _sections(runs: Sequence[RunRecord], samples: Mapping[str, EmbeddingSample], goodputs: Mapping[str, Goodput]) -> dict[str, Parts]:
    in_batch = "Retrieval alone: each query against the positives of the whole batch."
    weighted = "As it enters the sum."
    padding = "The rest is padding, computed for nothing."
    waiting = "Above a few per cent readers are too slow: raise config.data.threads."
    told = " ".join(f"{name}: {found}." for name, found in goodputs.items())
    return {
        "Quality": [
            ("widths", "By width", "The matryoshka curve: embeddings cut to their first dimensions.", charts.by_width(runs)),
            ("sources", "By source", "", charts.by_source(runs)),
            ("languages", "By language", _language_note(runs[0]), charts.by_language(runs)),
        ],
        "Learning": [
            ("loss", "Loss", "", charts.loss(runs)),
            ("in_batch", "In-batch loss", in_batch, charts.by_update(runs, "in_batch", "loss")),
            ("hard", "Hard-negative loss", "Each query against its own negatives.", charts.by_update(runs, "hard", "loss")),
            ("distillation", "Distillation", weighted, charts.by_update(runs, "weighted/distillation", "loss")),
            ("spread_out", "Spread-out regulariser", weighted, charts.by_update(runs, "weighted/spread_out", "loss")),
            ("grad_norm", "Gradient norm", "Before clipping.", charts.by_update(runs, "grad_norm", "L2 norm", log=True)),
            ("learning_rate", "Learning rate", "", charts.learning_rate(runs)),
        ],
        "The space": [part for number, item in enumerate(samples.items()) for part in _space(number, *item)],
        "Speed": [
            ("throughput", "Throughput", "", charts.throughput(runs)),
            ("token_efficiency", "Token efficiency", padding, charts.token_efficiency(runs)),
            ("input_wait", "Input wait", waiting, charts.input_wait(runs)),
            ("goodput", "Where the time went", told, goodput_chart(goodputs)),
        ],
    }


def _charts(parts: Parts) -> list[Chart]:
    return [Chart(name, title, note, figure) for name, title, note, figure in parts if figure]


def _space(number: int, name: str, sample: EmbeddingSample) -> Parts:
    """Pictures of one run's embeddings."""
    apart = f"The less they overlap the better. Any positive is nearer than any hard negative in {sample.separation:.1%} of pairs."
    similarities = charts.similarities(sample.positive_cosine, sample.negative_cosine) if len(sample.negative_cosine) else None
    plane = charts.text_map(principal_plane(sample.query), sample.source)
    return [
        (f"similarities-{number}", f"Similarities: {name}", apart, similarities),
        (f"map-{number}", f"Map of held-out queries: {name}", "By source, in the plane of largest variance.", plane),
    ]


def _language_note(run: RunRecord) -> str:
    """The ends of the scale, where there are too many languages to label."""
    found = run.accuracy_by("language", run.validations[-1]) if run.validations else {}
    if len(found) <= charts.LABELLED:
        return ""
    ordered = [f"{code} {100 * found[code]:.0f}%" for code in sorted(found, key=lambda code: (found[code], code))]
    return f"Lowest: {', '.join(ordered[:NAMED])}. Highest: {', '.join(ordered[: -NAMED - 1 : -1])}."
