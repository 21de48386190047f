"""The HTML of a report. Nothing is fetched: pictures are SVG elements, fonts are the reader's own."""

import dataclasses
import html
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from f2llm_jax.reporting import charts
from f2llm_jax.reporting.run_record import RunRecord


@dataclasses.dataclass(frozen=True)
class Chart:
    """A picture of the page.

    Attributes:
      name: of its file, without ending.
      title: above it.
      note: what to see in it, below it.
      figure: the picture.
    """

    name: str
    title: str
    note: str
    figure: Figure


@dataclasses.dataclass(frozen=True)
class RunLine:
    """A line of the table on top: the run, its model's parameters if there is a checkpoint, its colour in the pictures."""

    run: RunRecord
    parameters: int | None
    color: str


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #d9dee5; --back: #ffffff; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --soft: #98a3b3; --line: #333c49; --back: #12161c; --card: #1a2029; }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1180px; padding: 24px 16px 64px; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif;
}
h1 { font-size: 24px; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 36px 0 12px; }
h3 { font-size: 15px; margin: 0 0 6px; overflow-wrap: anywhere; }
p { margin: 0 0 12px; }
.soft { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 18px 5px 0; text-align: left; white-space: nowrap; }
tr + tr { border-top: 1px solid var(--line); }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: 7px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); gap: 16px; align-items: start; }
figure { margin: 0; padding: 14px; background: var(--card); border: 1px solid var(--line); border-radius: 8px; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figure svg { display: block; width: 100%; height: auto; }
figure.wide svg { min-width: 680px; }
figcaption { color: var(--soft); font-size: 13px; margin-top: 6px; overflow-wrap: anywhere; }
"""
_INTRODUCTION = (
    "Held-out accuracy is the share of rows whose positive is nearer to the query than all its hard negatives and, in retrieval, "
    "than all other documents of its batch. It is a mean over sources."
)


def page(lines: Sequence[RunLine], sections: Mapping[str, Sequence[Chart]], remarks: Sequence[str]) -> str:
    """The whole document."""
    title = html.escape(" · ".join(line.run.name for line in lines))
    pictures = "".join(f"<h2>{name}</h2><div class='grid'>{''.join(map(_figure, found))}</div>" for name, found in sections.items())
    notes = "".join(f"<p class='soft'>{html.escape(remark)}</p>" for remark in remarks)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p class="soft">{_INTRODUCTION}</p>
{_table(lines)}
{pictures}
{notes}
</body>
</html>
"""


def _figure(chart: Chart) -> str:
    wide = ' class="wide"' if chart.figure.get_figwidth() > charts.WIDTH else ""
    note = f"<figcaption>{html.escape(chart.note)}</figcaption>" if chart.note else ""
    picture = f"<div class='scroll'>{charts.svg(chart.figure, chart.name)}</div>"
    return f"<figure{wide}><h3>{html.escape(chart.title)}</h3>{picture}{note}</figure>"


def _table(lines: Sequence[RunLine]) -> str:
    head = ("run", "parameters", "updates", "sources", "languages", "held-out loss", "held-out accuracy", "commit")
    rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in _cells(line))}</tr>" for line in lines)
    return f"<div class='scroll'><table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{rows}</table></div>"


def _cells(line: RunLine) -> list[str]:
    run = line.run
    return [
        f'<span class="dot" style="background:{line.color}"></span>{html.escape(run.name)}',
        "–" if line.parameters is None else f"{line.parameters:,}",
        f"{run.metrics[-1]['step']:,}",
        str(len(run.sources)),
        str(len(run.languages) or "–"),
        _change(run, "validation/loss", 1, ""),
        _change(run, "validation/accuracy", 100, "%"),
        html.escape(str(run.environment.get("commit") or "–")[:12]),
    ]


def _change(run: RunRecord, name: str, scale: float, unit: str) -> str:
    """A held-out figure, before and after."""
    found = [scale * line[name] for line in run.validations if name in line]
    return f"{found[0]:.2f}{unit} → {found[-1]:.2f}{unit}" if found else "–"
