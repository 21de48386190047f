"""Which sources there are, and whether the files they are made of can be used.

A source is what batches are drawn from: one file, one folder that is a table, or what a catalogue says; the stage-2 cap applies to its
unit. Files have the columns of the released F2LLM data (dataset card of codefuse-ai/F2LLM: `query` with its instruction, `passage`,
`negative_1` to `negative_n`, optionally `lang`) or any other that `inputs.pairs` reads.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from etils import epath

from f2llm_jax.data.task_kind import TaskKind
from f2llm_jax.errors import UserError
from f2llm_jax.inputs import folders
from f2llm_jax.inputs.columns import BY_NAME, ColumnChoice, check_ignored
from f2llm_jax.inputs.pairs import PairFile, open_pairs
from f2llm_jax.preparation import kinds
from f2llm_jax.preparation.catalogue import COMPOSITE, Catalogue, FileRange, load_catalogue

PART_ROWS = 100_000  # rows that one worker reads and writes at a time, where row groups allow it


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows `start <= row < stop` of a file."""

    pairs: PairFile
    start: int
    stop: int
    rows: int  # pairs in them
    number: int  # of the first pair in its source, which counts pairs over its files
    split: str = ""  # of all its rows, where a file of held-out rows says so


@dataclasses.dataclass(frozen=True)
class Source:
    """What batches are drawn from; its files exist and their schemas have been checked."""

    name: str  # of the file without its suffix, or as the catalogue says; the source's name everywhere
    kind: TaskKind
    reason: str  # of the kind
    parts: tuple[Part, ...]  # its rows, in order; parts of held-out files come last
    rows: int  # pairs in them, at least 1, those of held-out files left out
    held_out: int  # pairs of held-out files
    negatives: int  # n, the most negatives that a row of it has
    symmetric: bool  # query and document can change places
    instruction: str | None  # given to queries that carry none; None for none, in a BEIR folder for the default one
    unit: str  # what the cap applies to
    unit_rows: int  # rows of all sources of the unit together
    unit_first: int  # number of this source's first row among them
    released: bool  # of the F2LLM-v2 release, whose known oddities are repaired (see `cleaning`)

    @property
    def files(self) -> list[str]:
        """The paths of everything that it is read from."""
        return list(dict.fromkeys(path for part in self.parts for path in part.pairs.paths))

    @property
    def scored(self) -> bool:
        """Whether rows of it have scores."""
        return any(part.pairs.scored for part in self.parts)

    def describe(self) -> str:
        """What was understood, for people: kind, rows, and the columns of each file."""
        described = dict.fromkeys(part.pairs.describe() + (" (held out)" if part.split else "") for part in self.parts)
        return "\n".join([f"{self.name}: {self.kind} ({self.reason}), {self.rows:,} rows", *(f"  {line}" for line in described)])


def find_sources(
    raw: epath.PathLike,
    *,
    stage: int,
    tasks: epath.PathLike | None = None,
    catalogue: Catalogue | None = None,
    recognise: bool = True,
    choice: ColumnChoice = BY_NAME,
    qrels: str = "train",
    instructions: Mapping[str, str] | None = None,
    validation: epath.PathLike | None = None,
    strict: bool = False,
) -> list[Source]:
    """The sources of a stage, in order of name.

    Without a catalogue each file, and each folder that is a table, is a source. Its kind is what the tasks file (JSON,
    `{"name": "kind"}`) says, else what its rows show (see `kinds`). A file that is named like one of the F2LLM-v2 release is not
    guessed: without a tasks file the shipped catalogue says what becomes of it.

    Stage 1 takes the sources that the catalogue marks, or all retrieval sources; stage 2 takes all (paper, section 3.2).

    Args:
      raw: folder of the files, or one file.
      stage: 1 or 2.
      tasks: the tasks file, where there is no catalogue; default `raw/tasks.json` if it exists, of one file that next to it.
      catalogue: which files make which source.
      recognise: whether file names of the F2LLM-v2 release are recognised where there is neither a catalogue nor a tasks file.
      choice: the user's columns.
      qrels: split of the judgements of BEIR folders.
      instructions: by source, for queries that carry none.
      validation: a file or folder of held-out rows, for the source of its name or for the only one; a folder of such.
      strict: files of one source may not differ in their number of negatives.

    Raises:
      UserError: no files, an unusable tasks file, or one or more unusable schemas, all of them in one message.
    """
    raw, instructions = epath.Path(raw), instructions or {}
    tasks = tasks or kinds.find_tasks(raw)
    if catalogue:
        groups = _catalogue_groups(raw, catalogue, stage)
    else:
        known = load_catalogue(COMPOSITE).present(_names(raw)) if recognise and not tasks else None
        groups = _folder_groups(raw, tasks, known, stage)
    held_out = _held_out(validation, [group.name for group in groups]) if validation else {}
    sources: list[Source] = []
    problems: list[str] = []
    for group in groups:
        try:
            sources.append(_open_source(group, held_out.get(group.name), choice, qrels, instructions.get(group.name), strict))
        except UserError as error:
            problems.append(str(error))
    unknown = sorted(set(instructions) - {group.name for group in groups})
    problems += [f"{raw}: --instruction names the source {name!r}, which is not there; drop it or add its file" for name in unknown]
    if problems:
        raise UserError("\n".join(problems))
    check_ignored(choice)
    chosen = [source for source in sources if catalogue or source.released or stage == 2 or source.kind == "retrieval"]
    if not chosen:
        raise UserError(f"{raw}: stage 1 trains on retrieval sources and there is none; add one or prepare stage 2")
    return _numbered(sorted(chosen, key=lambda source: source.name))


def unused(raw: epath.PathLike, sources: Sequence[Source]) -> list[str]:
    """Entries of the raw folder that belong to no source; how many are hidden comes last."""
    raw = epath.Path(raw)
    inside = [path.removeprefix(f"{raw}/") for source in sources for path in source.files if path.startswith(f"{raw}/")]
    used = {path.split("/")[0] for path in inside}
    names = sorted(_names(raw) - used - {folders.TASKS_FILE})
    shown = [name for name in names if not name.startswith((".", "_"))]
    hidden = len(names) - len(shown)
    return shown + ([f"{hidden} hidden"] if hidden else [])


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
    """A source whose files have not been opened; `kind` is None where its rows decide."""

    name: str
    kind: TaskKind | None
    files: tuple[tuple[epath.Path, int, int | None], ...]  # with first row, and row after the last (None for all)
    symmetric: bool
    unit: str
    reason: str
    released: bool = False


def _catalogue_groups(raw: epath.Path, catalogue: Catalogue, stage: int) -> list[_Group]:
    taken = catalogue.stage(stage).sources
    if not taken:
        raise UserError('the catalogue marks no source for stage 1; add "stage1": true to some, or prepare stage 2')

    def ranges(files: Sequence[FileRange]) -> tuple[tuple[epath.Path, int, int | None], ...]:
        return tuple((raw / file.path, file.start, file.stop) for file in files)

    return [
        _Group(name, source.kind, ranges(files), source.symmetric, unit.name, "catalogue", catalogue.released)
        for source in taken
        for unit in source.units
        for name, files in unit.batch_groups().items()
    ]


def _names(raw: epath.Path) -> set[str]:
    return {path.name for path in raw.iterdir()} if raw.is_dir() else set()


def _folder_groups(raw: epath.Path, tasks: epath.PathLike | None, known: Catalogue | None, stage: int) -> list[_Group]:
    """Each file and each table by itself, but for those that the catalogue `known` knows."""
    if raw.is_file():
        name = folders.table_name(raw)
        kind = kinds.read_tasks(tasks, None).get(name) if tasks is not None else None
        return [_Group(name, kind, ((raw, 0, None),), False, name, epath.Path(tasks).name if kind and tasks is not None else "")]
    found = folders.find_sources(raw)
    if not found.paths:
        forms = ", ".join(f"*.{form}" for form in folders.LISTED)
        raise UserError(f"{raw} holds no file of the forms {forms}; point --raw at a folder with one file or one folder a source")
    of_kind = kinds.read_tasks(tasks, set(found.paths)) if tasks is not None else {}
    listed = {file.path for source in known.sources for file in source.files} if known else set()
    groups = [
        _Group(name, of_kind.get(name), ((path, 0, None),), False, name, epath.Path(tasks).name if tasks is not None else "")
        for name, path in found.paths.items()
        if path.name not in listed
    ]
    return groups + (_catalogue_groups(raw, known, stage) if known and known.stage(stage).sources else [])


def _held_out(validation: epath.PathLike, names: Sequence[str]) -> dict[str, epath.Path]:
    """The held-out table of each source that has one."""
    path = epath.Path(validation)
    if not path.exists():
        raise UserError(f"--validation {path} does not exist; name a file or folder of held-out rows, or a share such as 0.01")
    name = folders.table_name(path)
    found = folders.find_sources(path).paths if path.is_dir() else {name: path}
    if len(found) == 1 and len(names) == 1:
        return {names[0]: next(iter(found.values()))}
    if strangers := [name for name in found if name not in names]:
        raise UserError(f"--validation {path} holds {strangers[0]!r}, which is no source ({', '.join(names)}); rename or remove it")
    return found


def _open_source(
    group: _Group, held_out: epath.Path | None, choice: ColumnChoice, qrels: str, instruction: str | None, strict: bool
) -> Source:
    """Checks the schema of each file; a UserError names everything that is wrong with them."""
    parts: list[Part] = []
    problems: list[str] = []
    for path, start, stop in group.files:
        try:
            for pairs in open_pairs(path, choice, qrels):
                parts += _split_file(pairs, start, stop, parts[-1].number + parts[-1].rows if parts else 0)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    counts = {part.pairs.negatives for part in parts}
    if strict and len(counts) > 1:
        raise UserError(f"{group.name}: its files have {sorted(counts)} negatives; give them the same number or leave out --strict")
    rows = sum(part.rows for part in parts)
    kind, reason = (group.kind, group.reason) if group.kind else kinds.guess(group.name, [part.pairs for part in parts], rows)
    kinds.check_graded(group.name, kind, [part.pairs for part in parts])
    for pairs in open_pairs(held_out, choice, qrels) if held_out else ():
        apart = _split_file(pairs, 0, None, parts[-1].number + parts[-1].rows)
        parts += [dataclasses.replace(part, split="validation") for part in apart]
    return Source(
        name=group.name,
        kind=kind,
        reason=reason,
        parts=tuple(parts),
        rows=rows,
        held_out=sum(part.rows for part in parts if part.split),
        negatives=max(part.pairs.negatives for part in parts),
        symmetric=group.symmetric or kind == "clustering",
        instruction=instruction,
        unit=group.unit,
        unit_rows=rows,
        unit_first=0,
        released=group.released,
    )


def _split_file(pairs: PairFile, start: int, stop: int | None, number: int) -> list[Part]:
    """Parts of about `PART_ROWS` rows, cut between row groups: what one worker reads it need not skip to."""
    file = pairs.file
    if stop is not None and stop > file.rows:
        raise UserError(f"{file.path}: has {file.rows} rows, the catalogue asks for {stop}; fetch the file again or correct the catalogue")
    if pairs.expands:
        if start or stop not in (None, file.rows):
            raise UserError(f"{file.path}: rows with lists of positives cannot be taken by range; write one row a positive")
        return [Part(pairs, 0, file.rows, pairs.rows, number)]
    stop = file.rows if stop is None else stop
    cuts, row = [start], 0
    for rows in file.groups:
        row += rows
        if cuts[-1] + PART_ROWS <= row < stop:
            cuts.append(row)
    ends = [*cuts[1:], stop]
    return [Part(pairs, begin, end, end - begin, number + begin - start) for begin, end in zip(cuts, ends, strict=True)]
