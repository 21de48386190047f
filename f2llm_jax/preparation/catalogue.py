"""Which files make which source: the F2LLM-v2 composite as the package ships it, and catalogues of the same form by users.

    {"note": "...",
     "sources": [{"source": "unpc", "task": "retrieval", "units": [{"unit": "unpc", "files": ["a.parquet", ...]}],
                  "rows": 2922245, "stage1": false, "category": "Bitext Mining", "language": "6", "name": "UNPC"}, ...]}

`source`, `task` and `units` are required. A unit is what the stage-2 cap of 80,000 queries applies to, and what the rest of
this package calls a source: its batches are drawn from it alone. A file is a path relative to the raw folder, or
`{"path": "mela.parquet", "row_start": 0, "row_stop": 40267}` where one file holds several sources. `rows` lets the totals be
known without the files; `category` (a row of the paper's data table) tells which retrieval sources are symmetric.

What the cap applies to is not stated in the paper; capping these 395 units reproduces the size that it reports.
"""

import dataclasses
import importlib.resources
import json
from collections.abc import Sequence

from etils import epath

from f2llm_jax.errors import UserError

KINDS = ("retrieval", "clustering", "classification")
CAP = 80_000  # queries a unit in stage 2 (paper, section 3.2)
# Query and document can change places (paper, section 3.2); so can they in every clustering source.
SYMMETRIC_CATEGORIES = ("Bitext Mining", "STS", "Paraphrase Detection")
SHIPPED = importlib.resources.files("f2llm_jax.preparation") / "catalogues"


class CatalogueError(UserError):
    """A catalogue that cannot be used; the message, one line a problem, names file, source and remedy."""


@dataclasses.dataclass(frozen=True)
class FileRange:
    """Rows `start <= row < stop` of a file; all of it where `stop` is None."""

    path: str
    start: int = 0
    stop: int | None = None


@dataclasses.dataclass(frozen=True)
class Unit:
    """What the cap applies to: `name` and its files in order."""

    name: str
    files: tuple[FileRange, ...]


@dataclasses.dataclass(frozen=True)
class CatalogueSource:
    """One row of the paper's data table.

    Attributes:
      name: of the source.
      kind: one of `KINDS`.
      units: at least one.
      rows: over all its units; None where the catalogue does not say.
      stage1: trained on in stage 1.
      symmetric: its queries and documents can change places.
    """

    name: str
    kind: str
    units: tuple[Unit, ...]
    rows: int | None
    stage1: bool
    symmetric: bool


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """The sources of a composite, in the order of the file."""

    sources: tuple[CatalogueSource, ...]

    def totals(self, cap: int = CAP) -> dict[str, int]:
        """Sizes that follow from the catalogue alone.

        Rows are known per source, so after the cap only a source of one unit has an exact size. A source of several has at
        most what an even spread of its rows over the units leaves, and at least what the least even one does.
        """
        counted = [source for source in self.sources if source.rows is not None]
        files = {file.path for source in self.sources for unit in source.units for file in unit.files}
        even, uneven = 0, 0
        for source in counted:
            units = len(source.units)
            even += min(source.rows, units * cap)
            uneven += min(source.rows, cap + units - 1)  # all rows but one a unit lie in one unit
        return {
            "sources": len(self.sources),
            "units": sum(len(source.units) for source in self.sources),
            "files": len(files),
            "rows": sum(source.rows for source in counted),
            "stage1_rows": sum(source.rows for source in counted if source.stage1),
            "stage2_rows_at_least": uneven,
            "stage2_rows_at_most": even,
        }


def load_catalogue(name_or_file: epath.PathLike) -> Catalogue:
    """The shipped catalogue of that name ("f2llm_v2"), or the one in a JSON file, local or `gs://`.

    Raises:
      CatalogueError: there is no such catalogue, or it is malformed; all problems in one message.
    """
    shipped = SHIPPED / f"{name_or_file}.json"
    file = shipped if shipped.is_file() else epath.Path(name_or_file)
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        names = ", ".join(sorted(entry.name.removesuffix(".json") for entry in SHIPPED.iterdir() if entry.name.endswith(".json")))
        raise CatalogueError(f"{name_or_file}: not a readable catalogue ({error}); give a JSON file or one of: {names}") from error
    problems: list[str] = []
    sources = _read_sources(content, problems)
    problems += _repeats(sources)
    if problems:
        raise CatalogueError("\n".join(f"{name_or_file}: {problem}" for problem in problems))
    return Catalogue(tuple(sources))


def _read_sources(content: object, problems: list[str]) -> list[CatalogueSource]:
    entries = content.get("sources") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        problems.append('holds no sources; write {"sources": [{"source": ..., "task": ..., "units": [...]}]}')
        return []
    sources = []
    for number, entry in enumerate(entries):
        place = f"sources[{number}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("source"), str) or not entry["source"]:
            problems.append(f"{place} has no 'source'; give it a name")
            continue
        place = f"source {entry['source']!r}"
        kind, rows = entry.get("task"), entry.get("rows")
        if kind not in KINDS:
            problems.append(f"{place} has the unknown task {kind!r}; choose one of {', '.join(KINDS)}")
        if rows is not None and (not isinstance(rows, int) or rows < 1):
            problems.append(f"{place} has rows {rows!r}; give the number of rows or leave it out")
            rows = None
        symmetric = kind == "clustering" or entry.get("category") in SYMMETRIC_CATEGORIES
        units = _read_units(entry.get("units"), place, problems)
        sources.append(CatalogueSource(entry["source"], kind, units, rows, entry.get("stage1") is True, symmetric))
    return sources


def _read_units(entries: object, place: str, problems: list[str]) -> tuple[Unit, ...]:
    units = []
    for entry in entries if isinstance(entries, list) else []:
        name, files = (entry.get("unit"), entry.get("files")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not name or "/" in name or not isinstance(files, list) or not files:
            problems.append(f'{place} has the malformed unit {entry!r}; write {{"unit": "name", "files": ["a.parquet"]}}')
            continue
        ranges = [_read_range(file) for file in files]
        problems += [
            f'{place}, unit {name!r}: {file!r} is not a file; write "a.parquet" or {{"path": "a.parquet", "row_start": 0, "row_stop": 9}}'
            for file, found in zip(files, ranges, strict=True)
            if found is None
        ]
        units.append(Unit(name, tuple(found for found in ranges if found)))
    if not units:
        problems.append(f"{place} has no units; name at least one with its files")
    return tuple(units)


def _read_range(file: object) -> FileRange | None:
    if isinstance(file, str) and file:
        return FileRange(file)
    if not isinstance(file, dict) or not isinstance(file.get("path"), str):
        return None
    start, stop = file.get("row_start"), file.get("row_stop")
    return FileRange(file["path"], start, stop) if isinstance(start, int) and isinstance(stop, int) and 0 <= start < stop else None


def _repeats(sources: Sequence[CatalogueSource]) -> list[str]:
    """Units of one name, and files whose rows belong to two units."""
    problems, names, ranges = [], set(), {}
    for source in sources:
        for unit in source.units:
            if unit.name in names:
                problems.append(f"source {source.name!r}: unit {unit.name!r} exists already; rename one of them")
            names.add(unit.name)
            for file in unit.files:
                stop = float("inf") if file.stop is None else file.stop
                for start, end, other in ranges.setdefault(file.path, []):
                    if file.start < end and start < stop:
                        problems.append(
                            f"source {source.name!r}: rows of {file.path} belong to unit {other!r} as well; give each row to one unit"
                        )
                ranges[file.path].append((file.start, stop, unit.name))
    return problems
