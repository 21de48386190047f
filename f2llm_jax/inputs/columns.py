"""Which column of a file is which, and the refusal to drop one that carries meaning.

A column is found by its name, whatever its case and with `-` or spaces for `_`. One that looks like a query, a positive, a negative, a
score, an id, a title or an instruction and is not used is an error; any other column is ignored, and named in what is printed.
"""

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence

from f2llm_jax.errors import UserError

# Words of a column's name, by what they mean.
MEANINGS = {
    "a score": "score scores relevance rel similarity sim label labels rating",
    "an id": "id ids idx qid qids pid pids did docid docids uuid",
    "a title": "title titles heading headline",
    "an instruction": "instruction instructions prompt prompts",
    "a negative": "negative negatives neg negs hn distractor distractors hardneg",
    "a positive": "passage passages positive positives pos document documents doc docs answer answers response responses context "
    "contexts text texts body content contents hypothesis completion",
    "a query": "query queries anchor anchors question questions q sentence sentences premise",
}  # of several in one name the first counts
LANGUAGE = {"lang", "language"}
_WORDS = {word: meaning for meaning, words in MEANINGS.items() for word in words.split()}
_LONG_WORDS = [word for word in _WORDS if len(word) >= 5]
_NEGATIVE = re.compile(r"(?:hard_?)?neg(?:ative)?(?:_passage)?(s?)(?:_?(\d+))?\Z")
_ROLES = {"a query": "query", "a positive": "passage", "an instruction": "instruction", "a negative": "negative", "a score": "scores"}
MAX_NEGATIVES = 64


@dataclasses.dataclass(frozen=True)
class ColumnChoice:
    """What a user says about columns."""

    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)  # from a role to a column, or to several with `+` between
    ignored: Sequence[str] = ()  # names, or patterns such as `negative_*`
    use: str = "--columns {role}={column}"  # how a user says so
    ignore: str = "--ignore-columns {column}"
    shared: bool = False  # by files of several forms: each takes what it has, see `check_shared`
    met: set[str] = dataclasses.field(default_factory=set, compare=False, repr=False)  # columns of all files; one set for all copies


@dataclasses.dataclass(frozen=True)
class FileLayout:
    """What a file is read for: the names of each role, the first being that of the role itself."""

    roles: Mapping[str, Sequence[str]]
    optional: Sequence[str] = ()
    unneeded: Sequence[str] = ()  # meanings, of `MEANINGS`, that this use of a file does without
    negatives: bool = False


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns of a file that are used, and the others."""

    roles: dict[str, tuple[str, ...]]  # several are joined by a space
    negatives: tuple[str, ...]
    ignored: tuple[str, ...]
    plural: tuple[str, ...] = ()  # negatives whose name promises a list

    def describe(self, notes: Mapping[str, str]) -> str:
        """One line for people; `notes` says more of single columns."""
        used = [role if columns == (role,) else f"{role}={'+'.join(columns)}" for role, columns in self.roles.items()]
        noted = [text + notes.get(text.rpartition("=")[2], "") for text in used]
        noted += [f"negatives={'+'.join(name + notes.get(name, '') for name in _shortened(self.negatives))}"] if self.negatives else []
        return ", ".join(noted) + (f"; ignored: {', '.join(self.ignored)}" if self.ignored else "")


BY_NAME = ColumnChoice()


def match(path: str, names: Sequence[str], form: FileLayout, choice: ColumnChoice = BY_NAME) -> Columns:
    """The columns of a file for one use of it.

    Raises:
      UserError: a role has no column or two, a name that the user gave is none, or a column that means something is not used.
    """
    choice.met.update(names)
    given = _given(path, names, form, choice)
    taken = {name for columns in given.values() for name in columns}
    free = [name for name in names if name not in taken and not _is_ignored(name, names, choice)]
    roles = {role: columns for role, columns in given.items() if role in form.roles}
    for role, aliases in form.roles.items():
        found = [name for name in free if plain(name) in map(plain, aliases)]
        if role in roles or not found:
            continue
        if len(found) > 1:
            raise UserError(
                f"{path}: the columns {found[0]!r} and {found[1]!r} may both be the {role}; choose with "
                f"{choice.use.format(role=role, column=found[0])} and {choice.ignore.format(column=found[1])}"
            )
        roles[role] = (found[0],)
    if missing := [role for role in form.roles if role not in roles and role not in form.optional]:
        near = [name for name in free if difflib.get_close_matches(plain(name), list(map(plain, form.roles[missing[0]])), cutoff=0.7)]
        hint = choice.use.format(role=missing[0], column=near[0] if near else "NAME")
        listed = " or ".join(map(repr, form.roles[missing[0]]))
        raise UserError(f"{path} has no column {listed}, only {', '.join(names)}; name the column that holds it with {hint}")
    used = {name for columns in roles.values() for name in columns}
    negatives, plural = _negatives(path, [name for name in free if name not in used], given) if form.negatives else ((), ())
    ordered = {role: roles[role] for role in form.roles if role in roles}
    ignored = tuple(name for name in names if name not in used and name not in negatives)
    _refuse_unused(path, ignored, names, form, choice, roles)
    return Columns(ordered, negatives, ignored, plural)


def check_shared(choice: ColumnChoice, files: Sequence[tuple[FileLayout, Sequence[str]]]) -> None:
    """Raises a UserError if a role or column of a shared choice is in none of the files, given by form and names."""
    for key, value in choice.columns.items():
        of_role = [names for form, names in files if any(plain(key) in map(plain, aliases) for aliases in form.roles.values())]
        if not of_role:
            known = list(dict.fromkeys(role for form, _ in files for role in form.roles))
            hint = suggestion(key, known) or f"; choose among {', '.join(known)}"
            raise UserError(f"{choice.use.format(role=key, column=value)}: {key!r} is no role of a column{hint}")
        if not any(value in names or {part.strip() for part in value.split("+")} <= set(names) for names in of_role):
            known = [name for names in of_role for name in names]
            raise UserError(f"{choice.use.format(role=key, column=value)}: no file has the column {value!r}{suggestion(value, known)}")


def check_ignored(choice: ColumnChoice) -> None:
    """Raises a UserError if a column to leave out is in none of the files that the choice was asked about."""
    met = sorted(choice.met)
    for pattern in choice.ignored:
        if not any(_is_ignored(name, met, dataclasses.replace(choice, ignored=(pattern,))) for name in met):
            raise UserError(f"{choice.ignore.format(column=pattern)}: no file has such a column{suggestion(pattern, met)}")


def plain(name: str) -> str:
    """A name without what does not tell two columns apart."""
    return re.sub(r"[\s\-]+", "_", name.strip().casefold())


def meaning(name: str) -> str | None:
    """What a column's name looks like, a typing error in a long word included."""
    found = set()
    if LANGUAGE & set(plain(name).split("_")):  # `document_language` tells of a document and is none
        return None
    for word in re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).casefold()):
        near = difflib.get_close_matches(word, _LONG_WORDS, n=1, cutoff=0.8) if len(word) >= 5 else []
        found.add(_WORDS.get(word) or _WORDS.get(near[0] if near else ""))
    return next((what for what in MEANINGS if what in found), None)


def suggestion(name: str, known: Sequence[str]) -> str:
    """`; did you mean ...?` where something known is like `name`."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def negative_number(name: str) -> tuple[bool, int | None] | None:
    """Whether the name of a column of negatives is a plural, and its number; None for any other name."""
    found = _NEGATIVE.match(plain(name))
    return (bool(found[1]), int(found[2]) if found[2] else None) if found else None


def _given(path: str, names: Sequence[str], form: FileLayout, choice: ColumnChoice) -> dict[str, tuple[str, ...]]:
    """The user's columns by role; those of negatives by the name that they were given."""
    found: dict[str, tuple[str, ...]] = {}
    known = [alias for aliases in form.roles.values() for alias in aliases] + ["negative", "negative_1", "negatives"] * form.negatives
    for key, value in choice.columns.items():
        role = next((role for role, aliases in form.roles.items() if plain(key) in map(plain, aliases)), None)
        if role is None and form.negatives and negative_number(key):
            role = plain(key)
        if role is None and choice.shared:
            continue
        if role is None:
            hint = suggestion(key, known) or f"; choose among {', '.join(known)}"
            raise UserError(f"{choice.use.format(role=key, column=value)}: {key!r} is no role of a column{hint}")
        if role in found:
            raise UserError(f"{choice.use.format(role=key, column=value)}: the {role} is named twice; name it once")
        columns = (value,) if value in names else tuple(part.strip() for part in value.split("+"))
        missing = [column for column in columns if column not in names]
        if missing and choice.shared:
            continue
        if missing:
            raise UserError(f"{path} has no column {missing[0]!r}{suggestion(missing[0], names) or f', only {chr(44).join(names)}'}")
        found[role] = columns
    every = [column for columns in found.values() for column in columns]
    if twice := [name for name in every if every.count(name) > 1]:
        raise UserError(f"{path}: column {twice[0]!r} is named for two roles; name another for one of them")
    return found


def _negatives(path: str, free: Sequence[str], given: Mapping[str, tuple[str, ...]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Columns of negatives: one alone, those with numbers in their order, lists; and which of them are named as lists."""
    columns = {name: number for name in free if (number := negative_number(name))}
    for key, parts in given.items():
        if number := negative_number(key):
            columns |= dict.fromkeys(parts, number)
    alone = [name for name, (plural, number) in columns.items() if number is None and not plural]
    lists = [name for name, (plural, number) in columns.items() if number is None and plural]
    numbered = {name: number for name, (_, number) in columns.items() if number is not None}
    present = sorted(numbered.values())
    first = 0 if present[:1] == [0] else 1
    for expected, number in enumerate(present, first):
        if number != expected:
            what = f"column 'negative_{expected}' is missing" if number > expected else f"two columns are negative {number}"
            raise UserError(f"{path}: {what}, among {', '.join(numbered)}; number negatives without a gap, or use --columns")
    return (*alone, *sorted(numbered, key=lambda name: numbered[name]), *lists), tuple(lists)


def _is_ignored(name: str, names: Sequence[str], choice: ColumnChoice) -> bool:
    """By its name as it is or, where no column has just the pattern's, as roles are found."""
    match = fnmatch.fnmatchcase
    return any(match(name, pattern) or (pattern not in names and match(plain(name), plain(pattern))) for pattern in choice.ignored)


def _refuse_unused(
    path: str, ignored: Sequence[str], names: Sequence[str], form: FileLayout, choice: ColumnChoice, roles: Mapping[str, tuple[str, ...]]
) -> None:
    problems = []
    for name in ignored:
        what = meaning(name)
        if what is None or what in form.unneeded or _is_ignored(name, names, choice):
            continue
        role = _ROLES.get(what, "")
        use = f"use it with {choice.use.format(role=role, column=name)}, or " if role in form.roles or (role and form.negatives) else ""
        if what == "a title" and (text := next((role for role in ("passage", "text") if role in roles), None)):
            use = f"put it before the text with {choice.use.format(role=text, column='+'.join([name, *roles[text]]))}, or "
        leave = f"leave it out with {choice.ignore.format(column=name)}"
        problems.append(f"{path}: column {name!r} looks like {what} and is not used; {use}{leave}")
    if problems:
        raise UserError("\n".join(problems))


def _shortened(names: Sequence[str]) -> list[str]:
    return list(names) if len(names) <= 2 else [f"{names[0]}..{names[-1]}"]
