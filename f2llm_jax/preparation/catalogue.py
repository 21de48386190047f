"""Which files make which source: the F2LLM-v2 composite as the package ships it, and catalogues of the same form by users.

    {"note": "...",
     "sources": [{"source": "unpc", "task": "retrieval", "units": [{"unit": "unpc", "files": ["a.parquet", ...]}],
                  "rows": 2922245, "stage1": false, "category": "Bitext Mining", "language": "6", "name": "UNPC"}, ...]}

`source`, `task` and `units` are required. A unit is what the stage-2 cap of 80,000 queries applies to. A batch comes from one file of it,
as in the published trainer, which gives every file a loader of its own (F2LLM `run.py`), or with `"batch": "unit"` from all of its files.
A file is a path relative to the raw folder, or `{"path": "mela.parquet", "row_start": 0, "row_stop": 40267}` where one file holds
several sources. `rows` lets the totals be known without the files; `category` (a row of the paper's data table) tells which
retrieval sources are symmetric. `{"of": "f2llm_v2", "sources": ["unpc", ...]}` is a part of a shipped catalogue, by names of sources.

What the cap applies to is not stated in the paper; capping these 395 units reproduces the size that it reports.
"""

import dataclasses
import importlib.resources
import json
from collections.abc import Collection, Sequence
from typing import Any, cast, get_args

from etils import epath

from f2llm_jax.data.task_kind import TaskKind
from f2llm_jax.errors import UserError

KINDS = get_args(TaskKind)
CAP = 80_000  # queries a unit in stage 2 (paper, section 3.2)
COMPOSITE = "f2llm_v2"  # the catalogue of the released files
BATCHES = ("file", "unit")
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
    batch: str = ""  # name of what batches are drawn from: this file, or with others of that name its unit


@dataclasses.dataclass(frozen=True)
class Unit:
    """What the cap applies to: `name` and its files in order."""

    name: str
    files: tuple[FileRange, ...]

    def batch_groups(self) -> dict[str, tuple[FileRange, ...]]:
        """What batches are drawn from, by name: one file each, or all of them together."""
        return {name: tuple(file for file in self.files if file.batch == name) for name in dict.fromkeys(file.batch for file in self.files)}


@dataclasses.dataclass(frozen=True)
class CatalogueSource:
    """One row of the paper's data table."""

    name: str
    kind: TaskKind
    units: tuple[Unit, ...]  # at least one
    rows: int | None  # over all its units; None where the catalogue does not say
    stage1: bool  # trained on in stage 1
    symmetric: bool  # query and document can change places

    @property
    def files(self) -> list[FileRange]:
        return [file for unit in self.units for file in unit.files]


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """The sources of a composite, in the order of the file."""

    sources: tuple[CatalogueSource, ...]
    released: bool = False  # the files are those of the F2LLM-v2 release, whose oddities are known

    def present(self, names: Collection[str]) -> "Catalogue":
        """What is left of it if only the files `names` exist."""
        sources = []
        for source in self.sources:
            units = [dataclasses.replace(unit, files=tuple(f for f in unit.files if f.path in names)) for unit in source.units]
            if units := [unit for unit in units if unit.files]:
                sources.append(dataclasses.replace(source, units=tuple(units)))
        return dataclasses.replace(self, sources=tuple(sources))

    def stage(self, number: int) -> "Catalogue":
        """The sources of stage 1 or 2 (paper, section 3.2: stage 2 trains on all)."""
        return dataclasses.replace(self, sources=tuple(source for source in self.sources if number == 2 or source.stage1))

    def totals(self, cap: int = CAP) -> dict[str, int]:
        """Sizes that follow from the catalogue alone.

        Rows are known per source, so after the cap only a source of one unit has an exact size. A source of several has at
        most what an even spread of its rows over the units leaves, and at least what the least even one does.
        """
        counted = [(source, source.rows) for source in self.sources if source.rows is not None]
        files = {file.path for source in self.sources for file in source.files}
        even, uneven = 0, 0
        for source, rows in counted:
            units = len(source.units)
            even += min(rows, units * cap)
            uneven += min(rows, cap + units - 1)  # all rows but one a unit lie in one unit
        return {
            "sources": len(self.sources),
            "units": sum(len(source.units) for source in self.sources),
            "files": len(files),
            "rows": sum(rows for _, rows in counted),
            "stage1_rows": sum(rows for source, rows in counted if source.stage1),
            "stage2_rows_at_least": uneven,
            "stage2_rows_at_most": even,
        }


def load_catalogue(name_or_file: epath.PathLike) -> Catalogue:
    """The shipped catalogue of that name ("f2llm_v2", "ml_embed"), or the one in a JSON file, local or `gs://`.

    Raises:
      CatalogueError: there is no such catalogue, or it is malformed; all problems in one message.
    """
    shipped = SHIPPED / f"{name_or_file}.json"
    file = epath.Path(str(shipped)) if shipped.is_file() else epath.Path(name_or_file)
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CatalogueError(f"{name_or_file}: not a readable catalogue ({error}); give a JSON file or one of: {_shipped()}") from error
    problems: list[str] = []
    if isinstance(content, dict) and "of" in content:
        sources = _part_of(content, problems)
    else:
        sources = _read_sources(content, problems)
        problems += _repeats(sources)
    if problems:
        raise CatalogueError("\n".join(f"{name_or_file}: {problem}" for problem in problems))
    return Catalogue(tuple(sources), released=shipped.is_file() or "of" in content)


def _shipped() -> str:
    return ", ".join(sorted(entry.name.removesuffix(".json") for entry in SHIPPED.iterdir() if entry.name.endswith(".json")))


def _part_of(content: dict[str, Any], problems: list[str]) -> list[CatalogueSource]:
    if not (SHIPPED / f"{content['of']}.json").is_file():
        problems.append(f'is a part "of" {content["of"]!r}, which is not shipped; choose one of: {_shipped()}')
        return []
    known = {source.name: source for source in load_catalogue(content["of"]).sources}
    names = content.get("sources")
    if not isinstance(names, list) or not names:
        problems.append(f'holds no sources; write {{"of": "{content["of"]}", "sources": ["squad", ...]}}')
        return []
    problems += [f"names {name!r}, which is no source of {content['of']}; remove it" for name in names if name not in known]
    return [known[name] for name in names if name in known]


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
        sources.append(CatalogueSource(entry["source"], cast(TaskKind, kind), units, rows, entry.get("stage1") is True, symmetric))
    return sources


def _read_units(entries: object, place: str, problems: list[str]) -> tuple[Unit, ...]:
    units = []
    for entry in entries if isinstance(entries, list) else []:
        name, files = (entry.get("unit"), entry.get("files")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not name or "/" in name or not isinstance(files, list) or not files:
            problems.append(f'{place} has the malformed unit {entry!r}; write {{"unit": "name", "files": ["a.parquet"]}}')
            continue
        batch = entry.get("batch", "file")
        if batch not in BATCHES:
            problems.append(f"{place}, unit {name!r} has the unknown batch {batch!r}; choose one of {', '.join(BATCHES)}")
        ranges = [_read_range(file) for file in files]
        problems += [
            f'{place}, unit {name!r}: {file!r} is not a file; write "a.parquet" or {{"path": "a.parquet", "row_start": 0, "row_stop": 9}}'
            for file, found in zip(files, ranges, strict=True)
            if found is None
        ]
        joined = batch == "unit" or len(files) == 1
        stems = [_stem(r.path) for r in ranges if r]
        if not joined and len(set(stems)) < len(stems):
            problems.append(
                f'{place}, unit {name!r} has two files of one name; rename one, or draw batches from all of them: "batch": "unit"'
            )
        units.append(Unit(name, tuple(dataclasses.replace(r, batch=name if joined else _stem(r.path)) for r in ranges if r)))
    if not units:
        problems.append(f"{place} has no units; name at least one with its files")
    return tuple(units)


def _stem(path: str) -> str:
    return path.rpartition("/")[2].partition(".")[0]


def _read_range(file: object) -> FileRange | None:
    if isinstance(file, str) and file:
        return FileRange(file)
    if not isinstance(file, dict) or not isinstance(file.get("path"), str):
        return None
    start, stop = file.get("row_start"), file.get("row_stop")
    return FileRange(file["path"], start, stop) if isinstance(start, int) and isinstance(stop, int) and 0 <= start < stop else None


def _repeats(sources: Sequence[CatalogueSource]) -> list[str]:
    """Units or batch groups of one name, and files whose rows belong to two units."""
    problems: list[str] = []
    units: set[str] = set()
    groups: set[str] = set()
    ranges: dict[str, list[tuple[int, float, str]]] = {}
    for source in sources:
        for unit in source.units:
            if unit.name in units:
                problems.append(f"source {source.name!r}: unit {unit.name!r} exists already; rename one of them")
            clash = sorted(groups & unit.batch_groups().keys()) if unit.name not in units else []
            problems += [f"source {source.name!r}: batches named {name!r} exist already; rename the file or the unit" for name in clash]
            units.add(unit.name)
            groups |= unit.batch_groups().keys()
            for file in unit.files:
                stop = float("inf") if file.stop is None else file.stop
                for start, end, other in ranges.setdefault(file.path, []):
                    if file.start < end and start < stop:
                        problems.append(
                            f"source {source.name!r}: rows of {file.path} belong to unit {other!r} as well; give each row to one unit"
                        )
                ranges[file.path].append((file.start, stop, unit.name))
    return problems
