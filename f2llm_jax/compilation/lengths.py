"""How many rows the steps of a run take: text lengths that ahead-of-time figures are for, packed as training packs them.

`lengths.json` holds a list of text lengths in tokens for each of eight sources, of short and of long texts (means of 11 to 273 tokens,
none above 512). A step draws all its texts from one source, so steps differ by a factor of forty in size.
"""

import dataclasses
import importlib.resources
import json
import re
from collections.abc import Sequence

import numpy as np

from f2llm_jax.data.packing import RowShape
from f2llm_jax.model.flops import Work


@dataclasses.dataclass(frozen=True)
class StepRows:
    """One step, packed."""

    chunks: int  # in use
    short: int  # of these, as many as hold rows of short texts
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
    rows, short = packing.rows, shape.short_chunks(packing)
    chunks = max(1, -(-rows // shape.chunk_rows))
    computed = chunks * shape.chunk_rows * shape.row_tokens
    return StepRows(chunks, short, rows, computed, Work(int(lengths.sum()), int(lengths @ lengths)))


def loop_trips(steps: Sequence[StepRows], group_chunks: int, scope: str) -> float:
    """How often a loop over groups, or over the chunks of each, runs in a step on average, from the named scope that it is in (see
    model/encoder.py and model/layered.py)."""
    phase, *inner = re.findall(r"\b(teacher|encode|last_group|gradients|chunks|short|long)\b", scope) or ["encode"]
    of_steps = [_group_sizes(step, group_chunks, phase) for step in steps]
    groups = sum(len(sizes) for sizes in of_steps)
    if not inner:
        return groups / len(steps)
    chunks = sum({"chunks": short + long, "short": short, "long": long}[inner[-1]] for sizes in of_steps for short, long in sizes)
    return chunks / (len(steps) if phase == "last_group" else max(groups, 1))


def _group_sizes(step: StepRows, group_chunks: int, phase: str) -> list[tuple[int, int]]:
    """Short and long chunks of each group that a phase of the step visits."""
    firsts = range(0, step.chunks, group_chunks)
    firsts = {"teacher": firsts, "last_group": firsts[-1:]}.get(phase, firsts[:-1])
    sizes = [(first, min(group_chunks, step.chunks - first)) for first in firsts]
    return [(short := min(max(step.short - first, 0), chunks), chunks - short) for first, chunks in sizes]
