"""The compiler's own estimate of a program's time: the cycles that XLA's cost model for TPUs writes at each operation.

Fused attention kernels carry none, and synchronous collectives are not waited for, so a real step is slower.
"""

import re
from collections.abc import Callable

from f2llm_jax.compilation.collectives import computations, loop_of, scope_of

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_BRANCHES = re.compile(r" (?:call|conditional)\(.*?(?:to_apply|branch_computations|(?:true|false)_computation)=")
_NAMES = re.compile(r"(?:to_apply|branch_computations|(?:true|false)_computation)=\{?%?([\w.\-]+(?:, ?%?[\w.\-]+)*)")


def estimated_cycles(text: str, trips: Callable[[str], float]) -> float:
    """Of the program `text` on one device. Of what is conditional every branch is counted.

    Args:
      text: of the optimised program.
      trips: how often a loop of traced length runs, from the scope that it is in.
    """
    lines, entry = computations(text)

    def of(name: str, scope: str) -> float:
        total = 0.0
        for line in lines.get(name, ()):
            here = scope_of(line) or scope
            if loop := loop_of(line, lines):
                body, length = loop
                total += of(body, here) * (trips(here) if length is None else length)
            elif _BRANCHES.search(line):
                called = sum(of(name, here) for names in _NAMES.findall(line) for name in re.findall(r"[\w.\-]+", names))
                total += called
            elif found := _CYCLES.search(line):
                total += int(found[1])
        return total

    return of(entry, "")
