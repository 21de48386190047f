"""Which held-out batches a validation scores: one budget over all sources, the same in every run and, but for a rest, at every time.

Losses and accuracies are means over sources. Where the budget is smaller than the number of sources, those that are scored are drawn with
equal chances, and so are the batches of a source; so the figures are unbiased, and their differences from one validation to the next
are not blurred by new rows. A quarter of such a budget goes through the other sources in turn, for their own figures alone.
"""

from collections.abc import Mapping

import numpy as np

IN_TURN = 4  # one batch of so many


def draw(batches: Mapping[str, int], budget: int, seed: int, turn: int) -> tuple[dict[str, int], dict[str, int]]:
    """How many of its first batches are scored of each source: for every figure, and for the figures of that source alone.

    Args:
      batches: of each source; the order of names does not matter.
      budget: batches in all.
      seed: of the draw.
      turn: number of the validation, for the sources that take turns.
    """
    names = sorted(batches)
    if sum(batches.values()) <= budget:
        return {name: batches[name] for name in names}, {}
    if budget >= len(names):
        return _shared(batches, budget), {}
    order = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    in_turn = max(1, budget // IN_TURN) if budget > 1 else 0
    fixed, rest = order[: budget - in_turn], order[budget - in_turn :]
    return dict.fromkeys(sorted(fixed), 1), {rest[(turn * in_turn + i) % len(rest)]: 1 for i in range(in_turn)}


def _shared(batches: Mapping[str, int], budget: int) -> dict[str, int]:
    """At least one of each source, the others in proportion to size; as many as there are."""
    shares = dict.fromkeys(sorted(batches), 1)
    for _ in range(budget - len(shares)):
        # The source furthest behind its proportion (D'Hondt), by name among equals.
        behind = max((name for name in shares if shares[name] < batches[name]), key=lambda name: (batches[name] / shares[name], name))
        shares[behind] += 1
    return shares
