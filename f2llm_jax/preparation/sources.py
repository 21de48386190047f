"""Which sources there are, and whether the files they are made of can be used.

A source is what batches are drawn from: one raw file, or what a catalogue says; the stage-2 cap applies to its unit. Its files have
the columns of the released F2LLM data (dataset card of codefuse-ai/F2LLM: `query` with its instruction, `passage`, `negative_1` to
`negative_n` without a gap, optionally `lang`) or of sentence-transformers (`anchor`, `positive`, `negative` and `negative_1` ...), or
others that a mapping names. Further columns are ignored.
"""

import dataclasses
import json
import re
from collections.abc import Mapping

from etils import epath

from f2llm_jax.data.records import Kind
from f2llm_jax.preparation.catalogue import COMPOSITE, KINDS, Catalogue, FileRange, load_catalogue
from f2llm_jax.preparation.raw_files import SUFFIXES, RawDataError, RawFile, open_file, source_name

TASKS_FILE = "tasks.json"
PART_ROWS = 100_000  # rows that one worker reads and writes at a time, where row groups allow it
MAX_NEGATIVES = 64
ALIASES = {"query": ("query", "anchor"), "passage": ("passage", "positive"), "lang": ("lang",)}
_NEGATIVE = re.compile(r"negative_([1-9][0-9]*)\Z")


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows `start <= row < stop` of a file.

    Attributes:
      path: local or `gs://`.
      start: first row.
      stop: row after the last.
      number: of the row `start` in its source, which counts rows over its files.
      columns: from `query`, `passage`, `negative_1`, ..., `lang` to the columns of the file; only what it has.
    """

    path: str
    start: int
    stop: int
    number: int
    columns: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Source:
    """What batches are drawn from; its files exist and their schemas have been checked."""

    name: str  # of the file without its suffix, or as the catalogue says; the source's name everywhere
    kind: Kind
    parts: tuple[Part, ...]  # its rows, in order
    rows: int  # number of rows in them, at least 1
    negatives: int  # n, the most `negative_` columns that a file of it has
    symmetric: bool  # query and document can change places
    instruction: str  # given to queries that carry none; "" for none
    unit: str  # what the cap applies to
    unit_rows: int  # rows of all sources of the unit together
    unit_first: int  # number of this source's first row among them
    released: bool  # of the F2LLM-v2 release, whose known oddities are repaired (see `cleaning`)


def find_sources(
    raw: epath.PathLike,
    *,
    stage: int,
    tasks: epath.PathLike | None = None,
    catalogue: Catalogue | None = None,
    recognise: bool = True,
    columns: Mapping[str, str] | None = None,
    instructions: Mapping[str, str] | None = None,
    strict: bool = False,
) -> list[Source]:
    """The sources of a stage, in order of name.

    Without a catalogue each file is a source. Its kind is what the tasks file (JSON, `{"name": "kind"}`) says; a source it does
    not name gets it from its columns: one F2LLM negative means classification (the opposite label), anything else retrieval.
    Clustering looks like retrieval in its columns, so only a tasks file or a catalogue can tell it. Hence a file that is named
    like one of the F2LLM-v2 release is not guessed: without a tasks file the shipped catalogue says what becomes of it.

    Stage 1 takes the sources that the catalogue marks, or all retrieval sources; stage 2 takes all (paper, section 3.2).

    Args:
      raw: folder of the files.
      stage: 1 or 2.
      tasks: the tasks file, where there is no catalogue; default `raw/tasks.json` if it exists.
      catalogue: which files make which source.
      recognise: whether file names of the F2LLM-v2 release are recognised where there is neither a catalogue nor a tasks file.
      columns: from `query`, `passage`, `negative_1`, ..., `lang` to columns of the files.
      instructions: by source, for queries that carry none.
      strict: files of one source may not differ in their number of negatives.

    Raises:
      RawDataError: no files, an unusable tasks file, or one or more unusable schemas, all of them in one message.
    """
    raw, columns, instructions = epath.Path(raw), columns or {}, instructions or {}
    tasks = tasks or (raw / TASKS_FILE if (raw / TASKS_FILE).exists() else None)
    if catalogue:
        groups = _catalogue_groups(catalogue, stage)
    else:
        groups = _folder_groups(raw, tasks, load_catalogue(COMPOSITE).present(_names(raw)) if recognise and not tasks else None, stage)
    sources: list[Source] = []
    problems: list[str] = []
    for group in groups:
        try:
            sources.append(_open_source(raw, group, columns, instructions.get(group.name, ""), strict))
        except RawDataError as error:
            problems.append(str(error))
    unknown = sorted(set(instructions) - {group.name for group in groups})
    problems += [f"{raw}: --instruction names the source {name!r}, which is not there; drop it or add its file" for name in unknown]
    if problems:
        raise RawDataError("\n".join(problems))
    chosen = [source for source in sources if catalogue or source.released or stage == 2 or source.kind == "retrieval"]
    if not chosen:
        raise RawDataError(f"{raw}: stage 1 trains on retrieval sources and there is none; add one or prepare stage 2")
    return _numbered(sorted(chosen, key=lambda source: source.name))


def _numbered(sources: list[Source]) -> list[Source]:
    """The sources with their places in their units, which the cap's random choice goes over."""
    totals: dict[str, int] = {}
    placed = []
    for source in sources:
        placed.append(dataclasses.replace(source, unit_first=totals.get(source.unit, 0)))
        totals[source.unit] = totals.get(source.unit, 0) + source.rows
    return [dataclasses.replace(source, unit_rows=totals[source.unit]) for source in placed]


@dataclasses.dataclass(frozen=True)
class _Group:
    """A source whose files have not been opened; `kind` is None where its columns decide."""

    name: str
    kind: Kind | None
    files: tuple[FileRange, ...]
    symmetric: bool
    unit: str
    released: bool = False


def _catalogue_groups(catalogue: Catalogue, stage: int) -> list[_Group]:
    taken = catalogue.stage(stage).sources
    if not taken:
        raise RawDataError('the catalogue marks no source for stage 1; add "stage1": true to some, or prepare stage 2')
    return [
        _Group(name, source.kind, files, source.symmetric, unit.name, catalogue.released)
        for source in taken
        for unit in source.units
        for name, files in unit.batch_groups().items()
    ]


def _names(raw: epath.Path) -> set[str]:
    return {path.name for path in raw.iterdir()} if raw.exists() else set()


def _folder_groups(raw: epath.Path, tasks: epath.PathLike | None, known: Catalogue | None, stage: int) -> list[_Group]:
    """Each file by itself, but for those that the catalogue `known` knows."""
    files: dict[str, list[epath.Path]] = {}
    for path in sorted(raw.iterdir()) if raw.exists() else []:
        if (name := source_name(path)) is not None:
            files.setdefault(name, []).append(path)
    if not files:
        formats = ", ".join(f"*{suffix}" for suffix in SUFFIXES)
        raise RawDataError(f"{raw} holds no *.parquet file nor another of {formats}; point --raw at a folder with one file a source")
    twice = [paths for paths in files.values() if len(paths) > 1]
    if twice:
        raise RawDataError("\n".join(f"{a} and {b.name} are one source by name; rename one of them" for a, b, *_ in twice))
    kinds = _read_tasks(epath.Path(tasks), set(files)) if tasks is not None else {}
    listed = {file.path for source in known.sources for file in source.files} if known else set()
    own = {name: path.name for name, (path,) in files.items() if path.name not in listed}
    groups = [_Group(name, kinds.get(name), (FileRange(path),), False, name) for name, path in own.items()]
    return groups + (_catalogue_groups(known, stage) if known and known.stage(stage).sources else [])


def _open_source(raw: epath.Path, group: _Group, columns: Mapping[str, str], instruction: str, strict: bool) -> Source:
    """Checks the schema of each file; a RawDataError names everything that is wrong with them."""
    opened, problems = [], []
    for wanted in group.files:
        try:
            file = open_file(raw / wanted.path)
            opened.append((wanted, file, _match_columns(file, columns)))
            if wanted.stop is not None and wanted.stop > file.rows:
                problems.append(f"{file.path}: has {file.rows} rows, the catalogue asks for {wanted.stop}; fetch the file again or mend it")
        except RawDataError as error:
            problems.append(str(error))
    if problems:
        raise RawDataError("\n".join(problems))
    parts: list[Part] = []
    for wanted, file, matched in opened:
        parts += _split_file(file, wanted, matched, parts[-1].number + parts[-1].stop - parts[-1].start if parts else 0)
    counts = {sum(name.startswith("negative") for name in part.columns) for part in parts}
    if strict and len(counts) > 1:
        raise RawDataError(f"{group.name}: its files have {sorted(counts)} negatives; give them the same number or leave out --strict")
    negatives = max(counts)
    f2llm = "query" in opened[0][1].names
    kind: Kind = group.kind or ("classification" if negatives == 1 and f2llm else "retrieval")
    rows = sum(part.stop - part.start for part in parts)
    return Source(
        name=group.name,
        kind=kind,
        parts=tuple(parts),
        rows=rows,
        negatives=negatives,
        symmetric=group.symmetric or kind == "clustering",
        instruction=instruction,
        unit=group.unit,
        unit_rows=rows,
        unit_first=0,
        released=group.released,
    )


def _match_columns(file: RawFile, given: Mapping[str, str]) -> dict[str, str]:
    """Which column of the file is which; raises a RawDataError that lists what is missing or of another type."""
    matched = {name: next((alias for alias in aliases if alias in file.names), name) for name, aliases in ALIASES.items()}
    if "lang" not in file.names:
        del matched["lang"]
    numbers = {int(found[1]) for name in file.names if (found := _NEGATIVE.match(name))}
    listed = (["negative"] if "negative" in file.names else []) + [f"negative_{i}" for i in range(1, max(numbers, default=0) + 1)]
    matched |= {f"negative_{i}": name for i, name in enumerate(listed, 1)} | dict(given)
    problems = [
        f"{file.path}: column {column!r} is missing; add it, or name the column that holds it with --columns {name}=..."
        for name, column in matched.items()
        if column not in file.names
    ]
    problems += [
        f"{file.path}: column {column!r} is {file.types[column]}, not string; cast it to string"
        for column in matched.values()
        if column in file.types
    ]
    if (count := sum(name.startswith("negative") for name in matched)) > MAX_NEGATIVES:
        problems.append(f"{file.path}: has {count} negatives a row; keep {MAX_NEGATIVES} at most")
    if not file.rows:
        problems.append(f"{file.path}: no rows; fill the file or remove it")
    if problems:
        raise RawDataError("\n".join(problems))
    return matched


def _split_file(file: RawFile, wanted: FileRange, columns: dict[str, str], number: int) -> list[Part]:
    """Parts of about `PART_ROWS` rows, cut between row groups: what one worker reads it need not skip to."""
    stop = file.rows if wanted.stop is None else wanted.stop
    cuts, row = [wanted.start], 0
    for rows in file.groups:
        row += rows
        if cuts[-1] + PART_ROWS <= row < stop:
            cuts.append(row)
    ends = [*cuts[1:], stop]
    return [Part(file.path, begin, end, number + begin - wanted.start, columns) for begin, end in zip(cuts, ends, strict=True)]


def _read_tasks(file: epath.Path, names: set[str]) -> dict[str, str]:
    """The checked contents of a tasks file; `names` are the sources that exist."""
    try:
        kinds = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise RawDataError(f'{file}: not a readable JSON file ({error}); write {{"source": "kind"}} there') from error
    if not isinstance(kinds, dict):
        raise RawDataError(f'{file}: not a JSON object; write {{"source": "kind"}} there')
    problems = [
        f"{file}: names {name!r}, but there is no {name}.parquet; remove the line or add the file" for name in kinds if name not in names
    ]
    problems += [
        f"{file}: {name!r} has the unknown kind {kind!r}; choose one of {', '.join(KINDS)}"
        for name, kind in kinds.items()
        if kind not in KINDS
    ]
    if problems:
        raise RawDataError("\n".join(problems))
    return kinds
