"""How many rows the steps of a run take: text lengths that ahead-of-time figures are for, packed as training packs them.

`lengths.json` holds a list of text lengths in tokens for each of eight sources, of short and of long texts (means of 11 to 273 tokens,
none above 512). A step draws all its texts from one source, so steps differ by a factor of forty in size.
"""

import dataclasses
import importlib.resources
import json

import numpy as np

from f2llm_jax.data.packing import RowShape
from f2llm_jax.model.flops import Work


@dataclasses.dataclass(frozen=True)
class StepRows:
    """One step, packed."""

    chunks: int  # in use
    groups: int  # of chunks that are encoded at once
    rows: int  # in use
    computed: int  # tokens that are computed on, padding included
    work: Work


def stored_lengths() -> list[list[int]]:
    """Text lengths by source."""
    return json.loads((importlib.resources.files(__package__) / "lengths.json").read_text())


def steps_of(shape: RowShape, texts: int, max_length: int, tokens_per_text: int = 0) -> list[StepRows]:
    """A step of so many texts from each source of the stored lengths, or one whose texts all have `tokens_per_text` tokens."""
    draw = np.random.default_rng(0)
    sources = [[tokens_per_text]] if tokens_per_text else stored_lengths()
    return [_packed(shape, np.minimum(draw.choice(lengths, texts), max_length)) for lengths in sources]


def _packed(shape: RowShape, lengths: np.ndarray) -> StepRows:
    lengths = lengths.astype(np.int64)
    packing = shape.pack(lengths)
    rows, groups = packing.rows, shape.groups(packing)
    chunks = max(1, -(-rows // shape.chunk_rows))
    computed = chunks * shape.chunk_rows * shape.row_tokens
    return StepRows(chunks, groups, rows, computed, Work(int(lengths.sum()), int(lengths @ lengths)))


def loop_trips(step: StepRows, at_once: int, scope: str) -> int:
    """How often a loop over chunks runs in a step, from the named scope that it is in (see model/encoder.py)."""
    if "tail" in scope:
        return step.chunks - step.groups * at_once
    return step.groups if "teacher" in scope else max(0, step.groups - 1)


def takes_branch(step: StepRows, scope: str) -> bool:
    """Whether a step does what is conditional in a named scope: there is a last group only where a group is filled."""
    return step.groups > 0 or "last_group" not in scope
