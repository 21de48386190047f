"""What was found about a compiled step: the fields, as text and as JSON."""

import dataclasses
from collections.abc import Mapping

from etils import epath

from f2llm_jax.compilation.topology import GIB
from f2llm_jax.storage import files

LEAST_REAL = 0.7  # share of real tokens below which a user is warned


@dataclasses.dataclass(frozen=True)
class Moved:
    """The collectives of one kind in one phase of the step."""

    phase: str  # named scope
    kind: str  # as XLA calls it
    times: float  # how often one runs in a step, on average
    received: float  # bytes that a device receives a step
    crosses_slices: bool  # devices of several slices take part


@dataclasses.dataclass(frozen=True)
class CompiledStepReport:
    """Means over steps of the given text lengths. Bytes and seconds are of one device and one step, FLOPs of all devices."""

    size: str  # of the student
    teacher: str  # size of the teacher, or empty
    topology: str
    slices: int
    devices: int  # all together
    device_kind: str  # JAX's name of them
    mesh: tuple[int, ...]  # (data, fsdp, tensor)
    attention: str  # kernel
    remat: str
    microbatch_rows: int  # over all devices
    chunk_rows: int  # over all devices
    rows: float  # that a step takes
    real_share: float  # of the tokens that are computed on
    hbm: Mapping[str, int]  # bytes by kind
    hbm_capacity: int
    collectives: tuple[Moved, ...]
    compiled_flops: float  # of the student's step
    model_flops: float  # that it needs for these texts
    teacher_flops: float  # of the teacher's part
    seconds: Mapping[str, float]  # lower bounds, by what they are bounds of
    estimated_seconds: float  # by the compiler's cost model; kernels and waiting for other devices not included
    mfu: float  # at most, by the largest of all these
    compile_seconds: float  # on this machine

    @property
    def hbm_used(self) -> int:
        """Bytes of one device."""
        return sum(self.hbm.values())

    @property
    def flops_ratio(self) -> float:
        """Compiled to needed."""
        return self.compiled_flops / self.model_flops


def describe(report: CompiledStepReport) -> str:
    """Some thirty lines for a terminal."""
    teacher = f", distilled from {report.teacher}" if report.teacher else ""
    slices = f"{report.slices} slices of " if report.slices > 1 else ""
    lines = [
        f"{report.size}{teacher} on {slices}{report.topology}: {report.devices} devices {report.device_kind}, "
        f"mesh (data, fsdp, tensor) {report.mesh}",
        f"{report.attention} attention, remat {report.remat}; {report.rows:.0f} rows a step, {report.microbatch_rows} kept for the "
        f"backward pass, {report.chunk_rows} in a layer at once; compiled in {report.compile_seconds:.0f} s",
        "",
        f"memory of a device: {report.hbm_used / GIB:.2f} of {report.hbm_capacity / GIB:.0f} GiB",
        *(f"  {kind:<26}{size / GIB:>9.3f} GiB" for kind, size in report.hbm.items()),
        "",
        "collectives of a step, received by a device",
        *(
            f"  {moved.phase:<14}{moved.kind:<20}{moved.times:>7,.0f} times{moved.received / 1e9:>10.3f} GB"
            f"{'  across slices' if moved.crosses_slices else ''}"
            for moved in report.collectives
        ),
        "",
        f"floating-point operations: {report.compiled_flops:.3e} compiled, {report.model_flops:.3e} needed: "
        f"{report.flops_ratio:.2f} times; teacher {report.teacher_flops:.3e}",
        f"real tokens of those computed on: {report.real_share:.0%}",
        "a step takes at least",
        *(f"  {seconds:>9.3f} s for {bound}" for bound, seconds in report.seconds.items()),
        f"  {report.estimated_seconds:>9.3f} s by the compiler's estimate, attention kernels and synchronous collectives not included",
        f"model FLOP utilisation at most {report.mfu:.0%}",
    ]
    if report.real_share < LEAST_REAL:
        lines.append("WARNING: most steps do not fill their rows: lower batch.chunk_rows, or take fewer devices or a larger batch.size")
    return "\n".join(lines)


def write_report(report: CompiledStepReport, path: epath.PathLike) -> None:
    """Writes the fields and what follows from them."""
    derived = {"hbm_used": report.hbm_used, "flops_ratio": report.flops_ratio}
    files.write_json(files.absolute(path), dataclasses.asdict(report) | derived)
