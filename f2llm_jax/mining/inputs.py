"""Queries with their positives, whole in memory, from files of pairs (`f2llm_jax.inputs.pairs`)."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from etils import epath

from f2llm_jax.errors import UserError
from f2llm_jax.inputs import folders, pairs
from f2llm_jax.inputs.columns import BY_NAME, ColumnChoice
from f2llm_jax.storage.files import check_name


@dataclasses.dataclass(frozen=True)
class SourcePairs:
    """The rows of one source."""

    name: str
    queries: list[str]  # instruction included
    passages: list[str]  # a positive of each
    languages: list[str]  # "" where unknown
    kind: str = "retrieval"  # of task, for `prepare`
    given: list[list[str]] = dataclasses.field(default_factory=list)  # by row, negatives that are known already and come first
    described: list[str] = dataclasses.field(default_factory=list)  # what was understood of its files


def read_pairs(path: epath.PathLike, instruction: str | None = None, choice: ColumnChoice = BY_NAME, qrels: str = "train") -> SourcePairs:
    """Reads a file, a folder that is a table, or a BEIR folder.

    Args:
      path: of it.
      instruction: given to queries that carry none; None for none in a file and `DEFAULT_QUERY_INSTRUCTION` in a BEIR folder.
      choice: the user's columns.
      qrels: which split of a BEIR folder.

    Raises:
      UserError: a file is missing, unreadable, empty or malformed, or a text is missing; names file, row and column.
    """
    files = pairs.open_pairs(path, choice, qrels)
    pairs.check_positives(files)
    found = SourcePairs(folders.table_name(path), [], [], [], described=[one.describe() for one in files])
    for file, block in ((one, block) for one in files for block in pairs.read_pairs(one, instruction=instruction)):
        columns = {name: block.required(file, name) for name in block.texts}
        rows = len(block.rows)
        found.queries.extend(columns["query"])
        found.passages.extend(columns["passage"])
        found.languages.extend(columns.get("lang", [""] * rows))
        negatives = [texts for name, texts in columns.items() if name.startswith("negative")]
        found.given.extend([text for text in row if text] for row in (zip(*negatives, strict=True) if negatives else [()] * rows))
    return found


def check_names(sources: Sequence[SourcePairs]) -> None:
    """Raises a UserError if two sources have one name, hence one file to be written to, or one has a name that no file can have."""
    for source in sources:
        check_name(source.name, "source")
    counts = Counter(source.name for source in sources)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise UserError(f"two inputs are one source by name: {', '.join(twice)}; rename one of them")


def distinct(texts: Sequence[str]) -> tuple[pa.LargeStringArray, np.ndarray]:
    """The distinct texts in order of first appearance, and the number among them of each of `texts`, int64."""
    encoded = pa.array(texts, pa.large_string()).dictionary_encode()
    return encoded.dictionary, encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
