"""The collectives of a compiled program, from its text: what moves, how much, how often, in which phase of the step.

XLA writes an asynchronous collective several times, in computations that start it, go on with it and end it; a reduce-scatter of a
TPU as an all-reduce in a computation of its own; and what goes between slices as a transfer by the hosts. All are seen through here
(channel ids tell nothing: reductions share them). The body of a loop counts as often as the loop runs.

The text is XLA's own and promised to nobody; it was read as JAX 0.10 to 0.12 write it.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from f2llm_jax.jax_version import warn_if_newer

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
_TRANSFER = re.compile(r" = (\(.*?) recv\(.*xla_megascale_runtime")
_SLICES = re.compile(r'_xla_megascale_target="\{([\d,]+)\}x\{0:(\d+)\}"')
_TRANSFER_KIND = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_CALLS = re.compile(r"(?:calls|to_apply|branch_computations|called_computations)=\{?%?([\w.\-]+(?:, ?%?[\w.\-]+)*)")
_LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")
_LIMIT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_MESH = re.compile(
    r"replica_groups=mesh\[(?P<sizes>[^\]]*)\](?:, device_ids=\(\[(?P<shape>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?\))? ?\{(?P<axes>[^}]*)\}"
)
_NAME = re.compile(r'op_name="jit\(\w+\)/([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
      kind: one of `KINDS`.
      shapes: of its result on one device, as XLA writes them.
      group: devices that take part together, by their place in the mesh; the first group of several alike.
      phase: named scope of the step that it belongs to.
      times: how often a step runs it.
      received: bytes that a device receives each time.
    """

    kind: str
    shapes: tuple[str, ...]
    group: tuple[int, ...]
    phase: str
    times: float
    received: float

    @property
    def devices(self) -> int:
        """How many devices take part together."""
        return len(self.group)


def collectives(text: str, trips: Callable[[str], float]) -> list[Collective]:
    """Of the program `text`; `trips` says how often a loop without a static length runs, from the scope that it is in."""
    warn_if_newer(__name__, "collectives may be missed or miscounted")
    lines_of, entry = computations(text)
    found: list[Collective] = []

    def visit(name: str, times: float, phase: str) -> None:
        lines = lines_of.get(name, [])
        goes_on = name.startswith("async_collective_fusion") or any("AsyncCollectiveDone" in line for line in lines)
        for line in lines:
            here = scope_of(line) or phase
            if (match := _COLLECTIVE.search(line)) and not goes_on:
                found.append(_collective(match, line, name, times, here or _reader_scope(line, lines)))
            elif match := _TRANSFER.search(line):
                found.append(_transfer(match, line, times, here))
            if loop := loop_of(line, lines_of):
                body, length = loop
                visit(body, times * (trips(here) if length is None else length), here)
            elif calls := _CALLS.search(line):
                for called in re.findall(r"[\w.\-]+", calls[1]):
                    visit(called, times, here)

    visit(entry, 1, "")
    return found


def _reader_scope(line: str, lines: Sequence[str]) -> str:
    """The scope of the first line that reads the result of `line`: from JAX 0.11 on, the gather of an argument has the argument's name."""
    result = re.compile(rf"[(, ]{re.escape(line.split(' = ')[0].strip())}[,)]")
    return next((scope[1] for other in lines if result.search(other) and (scope := _NAME.search(other))), "")


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, and the name of the entry."""
    lines: dict[str, list[str]] = collections.defaultdict(list)
    entry = current = ""
    for line in text.splitlines():
        if (head := _COMPUTATION.match(line)) and not line.startswith(" "):
            current = head[2]
            entry = current if head[1] else entry
        elif current:
            lines[current].append(line)
    return lines, entry


def scope_of(line: str) -> str:
    """The named scope of an operation, or nothing."""
    found = _NAME.search(line)
    return found[1] if found else ""


def loop_of(line: str, lines: dict[str, list[str]]) -> tuple[str, int | None] | None:
    """The computation that a loop repeats and how often; None for what the program decides as it runs."""
    if not (loop := _LOOP.search(line)):
        return None
    limits = [int(n) for inner in lines[loop[1]] for n in _LIMIT.findall(inner)]
    return loop[2], limits[0] if limits else None


def _collective(match: re.Match, line: str, computation: str, times: float, scope: str) -> Collective:
    kind = "reduce-scatter" if "all-reduce-scatter" in computation else match[2]
    arrays = _ARRAY.findall(match[1])
    if "-start(" in line and len(arrays) > 1:  # operands, then results
        arrays = arrays[len(arrays) // 2 :]
    # A reduce-scatter that XLA writes as an all-reduce shows its whole operand, a plain one its result.
    return _counted(kind, arrays, _group(line), times, scope, scattered=match[2] == "reduce-scatter")


def _transfer(match: re.Match, line: str, times: float, scope: str) -> Collective:
    """Between the devices at the same place of several slices, which are written as `{1,2}x{0:7}` for two of eight."""
    slices, named = _SLICES.search(line), _TRANSFER_KIND.search(line)
    kind = named[1].lower().replace("_", "-") if named else ""
    if not slices or kind not in KINDS:
        raise ValueError(f"a transfer between slices that is not understood: {line.strip()[:600]}")
    slice_devices = int(slices[2]) + 1
    group = tuple(range(0, len(slices[1].split(",")) * slice_devices, slice_devices))
    return _counted(kind, _ARRAY.findall(match[1])[:-1], group, times, scope, scattered=kind == "reduce-scatter")  # the last is a context


def _counted(kind: str, arrays: list[tuple[str, str]], group: tuple[int, ...], times: float, scope: str, scattered: bool) -> Collective:
    size = sum(BYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in arrays)
    devices = len(group)
    received = {"all-reduce": 2 * (devices - 1) / devices, "collective-permute": 1.0}.get(kind, (devices - 1) / devices)
    shapes = tuple(f"{dtype}[{dims}]" for dtype, dims in arrays)
    return Collective(kind, shapes, group, scope, times, received * size * (devices if scattered else 1))


def _group(line: str) -> tuple[int, ...]:
    """The first group of devices: written by axes of a mesh, as an iota or as a list; of a permutation its first pair."""
    if named := _MESH.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'?(\w+)'?=(\d+)", named["sizes"])}
        axes = re.findall(r"\w+", named["axes"])
        ids = _iota(named["shape"], named["order"]) if named["shape"] else np.arange(math.prod(sizes.values()))
        together = np.moveaxis(ids.reshape(*sizes.values()), [list(sizes).index(axis) for axis in axes], range(len(axes)))
        return tuple(together.reshape(math.prod(sizes[axis] for axis in axes), -1)[:, 0].tolist())
    if written := re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return tuple(_iota(written[2], written[3]).reshape(-1, int(written[1]))[0].tolist())
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", line):
        return tuple(int(n) for n in listed[1].split(","))
    raise ValueError(f"a collective without devices: {line.strip()[:200]}")


def _iota(shape: str, order: str | None) -> np.ndarray:
    """XLA's `[2,4]T(1,0)`: 0 to 7 in that shape, transposed."""
    sizes = [int(n) for n in shape.split(",")]
    return np.arange(math.prod(sizes)).reshape(sizes).transpose([int(n) for n in order.split(",")] if order else range(len(sizes)))
