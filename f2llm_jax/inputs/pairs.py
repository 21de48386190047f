"""Files of queries with their positives and negatives, as rows of one query and one positive.

    role           names of the column                                                    cell
    query          query, anchor, question                                                text
    passage        passage, positive, pos, document, answer; positives, passages          text, or a list: a row for each positive
    negatives      negative, neg, hard_negative; negative_1.. (from 0 or 1); negatives    text; text; a list
    lang           lang, language                                                         text
    instruction    instruction                                                            text, for queries that carry none
    scores         scores, score; pos_scores and neg_scores                               numbers or lists of them, see `scores`

A list is a list, or a text of JSON that spells one. Its items are texts, or objects with a `title` and a `text` as Tevatron's
`positive_passages` and `negative_passages`. `--columns` names others, and joins several with `+`, as in `passage=title+text`.
A BEIR folder is such a file too: a row for each pair of relevance above 0.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from etils import epath
from jaxtyping import Int

from f2llm_jax.errors import UserError
from f2llm_jax.inputs import cells, scores
from f2llm_jax.inputs.cells import Texts
from f2llm_jax.inputs.columns import BY_NAME, MAX_NEGATIVES, ColumnChoice, Columns, FileLayout, match, plain
from f2llm_jax.inputs.fields import check_types, joined_texts
from f2llm_jax.inputs.folders import is_beir, open_table
from f2llm_jax.inputs.judged import beir_paths, read_judged
from f2llm_jax.inputs.scores import Scores
from f2llm_jax.inputs.tables import Block, File, read_blocks
from f2llm_jax.text import DEFAULT_QUERY_INSTRUCTION, leading_prompt, query_prompt

PAIRS = FileLayout(
    {
        "query": ("query", "anchor", "question"),
        "passage": ("passage", "positive", "pos", "document", "answer", "positives", "passages", "positive_passage", "positive_passages"),
        "lang": ("lang", "language"),
        "instruction": ("instruction",),
        **scores.ROLES,
    },
    optional=("lang", "instruction", *scores.ROLES),
    negatives=True,
)
PLURALS = ("positives", "passages", "positive_passages")
FIRST_ROWS = 8


@dataclasses.dataclass(frozen=True)
class PairFile:
    """A file of pairs, or a BEIR folder, that has been opened."""

    file: File
    columns: Columns
    rows: int  # pairs
    widths: dict[str, int]  # columns of lists: the longest
    split: str = ""  # of the judgements, where it is a BEIR folder
    described: tuple[str, ...] = ()  # of a BEIR folder

    @property
    def paths(self) -> list[str]:
        """Of the files that it is read from."""
        return [str(path) for path in beir_paths(self.file.path, self.split)] if self.split else [self.file.path]

    @property
    def negatives(self) -> int:
        """The most that a row has."""
        return sum(self.widths.get(name, 1) for name in self.columns.negatives)

    @property
    def scored(self) -> bool:
        """Whether rows have scores."""
        return bool(self.score_columns)

    @property
    def score_columns(self) -> list[str]:
        return [name for role in scores.ROLES for name in self.columns.roles.get(role, ())]

    @property
    def expands(self) -> bool:
        """Whether a row of the file may be several pairs."""
        return any(name in self.widths for name in self.columns.roles.get("passage", ()))

    def describe(self) -> str:
        """What was understood, for people: columns used and ignored, negatives a row."""
        if self.split:
            return f"{self.file.path}: BEIR, {self.rows:,} pairs of qrels/{self.split}; {'; '.join(self.described)}"
        notes = {name: f" (lists of up to {width})" for name, width in self.widths.items()}
        return f"{self.file.path}: {self.columns.describe(notes)}; {self.negatives} negatives a row"


@dataclasses.dataclass(frozen=True)
class PairBlock:
    """Consecutive pairs: B rows of one query and one positive."""

    first: int  # number of the first pair, counted from where reading began
    rows: Int[np.ndarray, " B"]  # the row of the file that each is from
    texts: dict[str, Texts]  # "query", "passage", "negative_1", ..., "lang"; a negative that a row does not have is ABSENT
    names: dict[str, str]  # what the file calls each, for messages
    scores: Scores | None = None  # where the file has any

    def required(self, file: PairFile, name: str) -> list[str]:
        """One column, "" for a language that is unknown and a negative that a row does not have.

        Raises:
          UserError: any other text is missing or empty.
        """
        column = self.texts[name]
        values = column.values.to_pylist()
        fine = {"query": (), "passage": (), "lang": (cells.ABSENT, cells.NULL, cells.EMPTY)}.get(name, (cells.ABSENT,))
        for row, value in enumerate(values):
            why = column.reason(row) if value is None else cells.EMPTY if not value.strip() else ""
            if why and why not in fine:
                place = f"{file.file.path}: row {self.rows[row]}, column {self.names[name]!r}"
                raise UserError(f"{place} {why}; give it a text or drop the row")
        return [value or "" for value in values]


def open_pairs(path: epath.PathLike, choice: ColumnChoice = BY_NAME, split: str = "train") -> list[PairFile]:
    """The files of one source, in order.

    Args:
      path: of a file, a folder that is one table, or a BEIR folder.
      choice: the user's columns.
      split: of the judgements of a BEIR folder.

    Raises:
      UserError: a file is missing, unreadable or empty, or its columns are not those of pairs; all such files in one message.
    """
    if is_beir(path):
        judged = read_judged(beir_paths(path, split), dataclasses.replace(choice, columns={}))
        rows = len(judged.positives)
        columns = Columns({"query": ("queries",), "passage": ("corpus",)}, (), tuple(choice.ignored))
        return [PairFile(File(str(path), ("queries", "corpus"), rows, (rows,)), columns, rows, {}, split, tuple(judged.described))]
    found, problems, files = [], [], open_table(path)
    with_rows = {file.names for file in files if file.rows}
    for file in files:
        if not file.rows and file.names in with_rows:  # Spark writes such parts; one of other columns may lack its header
            continue
        try:
            found.append(open_pair_file(file, choice))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return found


def check_positives(files: Sequence[PairFile]) -> None:
    """Raises a UserError where a use of pairs that knows no scores would take all of them for positives, those of a low score too."""
    for pairs in files:
        if pairs.scored and not pairs.negatives:
            raise UserError(
                f"{pairs.file.path}: has a score ({pairs.score_columns[0]}) and no negatives, so some of its pairs may be no positives; "
                f"leave out the rows of a low score, and the column with --ignore-columns {','.join(pairs.score_columns)}"
            )


def open_pair_file(file: File, choice: ColumnChoice = BY_NAME) -> PairFile:
    """A file of pairs whose schema has been read; see `open_pairs`."""
    if not file.rows:
        raise UserError(f"{file.path}: no rows; fill the file or remove it")
    columns = match(file.path, file.names, PAIRS, choice)
    check_types(file, [name for role, names in columns.roles.items() if role not in scores.ROLES for name in names])
    check_types(file, columns.negatives)
    rows, widths = file.rows, {}
    for name in _list_columns(file, columns):
        lists = [cells.text_lists(block.cells[name]) for block in read_blocks(file, [name])]
        widths[name] = max(max(int(found.lengths.max()), bool(found.broken)) for found in lists)
        if name in columns.roles["passage"]:
            rows = sum(int(np.maximum(found.lengths, 1).sum()) for found in lists)
    opened = PairFile(file, columns, rows, widths)
    scores.check_roles(file.path, columns.roles, opened.expands)
    if opened.negatives > MAX_NEGATIVES:
        raise UserError(f"{file.path}: has {opened.negatives} negatives a row; keep {MAX_NEGATIVES} at most")
    return opened


def read_pairs(pairs: PairFile, start: int = 0, stop: int | None = None, instruction: str | None = None) -> Iterator[PairBlock]:
    """The pairs of rows `start <= row < stop` of a file, in order.

    Args:
      pairs: the file.
      start: first row of the file.
      stop: row after the last; None for all.
      instruction: given to queries that carry none and whose row has none; None for none, in a BEIR folder for the default one.

    Raises:
      UserError: rows cannot be read.
    """
    if pairs.split:
        yield from _read_beir(pairs, start, stop, DEFAULT_QUERY_INSTRUCTION if instruction is None else instruction)
        return
    columns = pairs.columns
    read = [name for found in columns.roles.values() for name in found]
    names = list(dict.fromkeys([*read, *columns.negatives]))
    of_scores = {role: columns.roles[role][0] for role in scores.ROLES if role in columns.roles}
    first = 0
    for block in read_blocks(pairs.file, names, start, stop):
        texts: dict[str, Texts] = {role: joined_texts(block, columns.roles[role]) for role in ("query", "lang") if role in columns.roles}
        instructions = cells.texts(block.cells[columns.roles["instruction"][0]]) if "instruction" in columns.roles else None
        texts["query"] = _instructed(texts["query"], instructions, instruction or "")
        labels: dict[str, str] = {role: "+".join(columns.roles[role]) for role in ("query", "passage", "lang") if role in columns.roles}
        _add_negatives(pairs, block, texts, labels)
        rows = block.first_row + np.arange(len(texts["query"].values))
        positives = cells.text_lists(block.cells[columns.roles["passage"][0]]) if pairs.expands else None
        found = None
        if of_scores:
            labels["scores"] = "+".join(of_scores.values())
            count = positives.lengths if positives else np.ones(len(rows), np.int64)
            given = {role: block.cells[name] for role, name in of_scores.items()}
            found = scores.read_scores(given, count, scores.places(texts, pairs.negatives), pairs.negatives)
        if positives:
            rows, texts = _expanded(rows, texts, positives)
        else:
            texts["passage"] = joined_texts(block, columns.roles["passage"])
        yield PairBlock(first, rows, texts, labels, found)
        first += len(rows)


def instructed(queries: Sequence[str], instruction: str) -> list[str]:
    """The queries, those without an instruction with this one; as they are where it is empty."""
    prompt = query_prompt(instruction)
    return [query if leading_prompt(query) else prompt + query for query in queries] if prompt else list(queries)


def _list_columns(file: File, columns: Columns) -> list[str]:
    """Columns of positives or negatives whose cells are lists, or texts that spell one: all of them, or those of a plural name."""
    singles = [*columns.negatives, *(columns.roles["passage"] if len(columns.roles["passage"]) == 1 else ())]
    found = [name for name in singles if name in (*file.lists, *columns.plural) or plain(name) in PLURALS]
    return found + _spelled_lists(file, [name for name in singles if name not in found])


def _spelled_lists(file: File, names: Sequence[str]) -> list[str]:
    """Which columns of texts hold nothing but texts in brackets, hence lists; the first text that is not settles a column.

    A text in brackets that spells no list is an error of its row and not a text, or one such row would make all lists texts.
    """
    left, found = list(names), set[str]()
    for stop in (FIRST_ROWS, file.rows):  # most columns are settled by a look at few rows
        for block in read_blocks(file, list(left), 0, stop) if left else ():
            for name in list(left):
                for value in cells.texts(block.cells[name]).values:
                    text = value.as_py()
                    if text is None or not text.strip():
                        continue
                    if not cells.in_brackets(text):
                        left.remove(name)
                        break
                    found.add(name)
            if not left:
                break
    return [name for name in left if name in found]


def _add_negatives(pairs: PairFile, block: Block, texts: dict[str, Texts], labels: dict[str, str]) -> None:
    number = 0
    for name in pairs.columns.negatives:
        lists = cells.text_lists(block.cells[name]) if name in pairs.widths else None
        for place in range(pairs.widths.get(name, 1)):
            number += 1
            texts[f"negative_{number}"] = lists.item(place) if lists else cells.texts(block.cells[name])
            labels[f"negative_{number}"] = f"{name}[{place}]" if lists else name


def _expanded(rows: np.ndarray, texts: dict[str, Texts], positives: cells.TextLists) -> tuple[np.ndarray, dict[str, Texts]]:
    """A row for each positive; a row without any keeps one, whose positive is null."""
    count = np.maximum(positives.lengths, 1)
    of = np.repeat(np.arange(len(rows)), count)
    at = positives.starts[of] + np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count)
    there = positives.lengths[of] > 0
    taken = pa.array(of)
    found = {}
    for name, column in texts.items():
        broken = {i: column.broken[row] for i, row in enumerate(of.tolist()) if row in column.broken} if column.broken else {}
        found[name] = Texts(column.values.take(taken), broken)
    passages = positives.flat.values.take(pa.array(np.where(there, at, 0), mask=~there))
    broken = {i: positives.broken.get(int(of[i]), "has no text in its list") for i in np.flatnonzero(~there).tolist()}
    broken |= {i: positives.flat.broken[at[i]] for i in np.flatnonzero(there).tolist() if at[i] in positives.flat.broken}
    return rows[of], found | {"passage": Texts(passages, broken)}


def _instructed(queries: Texts, instructions: Texts | None, default: str) -> Texts:
    if instructions is None and not default:
        return queries
    texts = queries.values.to_pylist()
    own = instructions.values.to_pylist() if instructions else [None] * len(texts)
    prompts = [query_prompt(instruction or default) for instruction in own]
    found = [text if text is None or leading_prompt(text) else prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    return Texts(pa.array(found, pa.large_string()), queries.broken)


def _read_beir(pairs: PairFile, start: int, stop: int | None, instruction: str) -> Iterator[PairBlock]:
    judged = read_judged(beir_paths(pairs.file.path, pairs.split), ColumnChoice(ignored=pairs.columns.ignored))
    found = judged.positives[start:stop]
    queries = instructed([judged.queries[query] for query, _ in found], instruction)
    texts = {"query": queries, "passage": [judged.documents[document] for _, document in found]}
    columns = {name: Texts(pa.array(values, pa.large_string()), {}) for name, values in texts.items()}
    yield PairBlock(0, start + np.arange(len(found)), columns, {"query": "queries", "passage": "corpus"})
