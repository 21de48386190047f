"""A report of a compiled step as text and as JSON."""

import dataclasses

from etils import epath

from f2llm_jax.compilation.check import CompiledStepReport
from f2llm_jax.compilation.topology import GIB
from f2llm_jax.data import records


def describe(report: CompiledStepReport) -> str:
    """Some thirty lines for a terminal."""
    teacher = f", distilled from {report.teacher}" if report.teacher else ""
    slices = f"{report.slices} slices of " if report.slices > 1 else ""
    lines = [
        f"{report.size}{teacher} on {slices}{report.topology}: {report.devices} devices {report.device_kind}, "
        f"mesh (data, fsdp, tensor) {report.mesh}",
        f"{report.attention} attention, remat {report.remat}, {report.microbatch_rows} rows at once, {report.chunks} chunks a step; "
        f"compiled in {report.compile_seconds:.0f} s",
        "",
        f"memory of a device: {report.hbm_used / GIB:.2f} of {report.hbm_capacity / GIB:.0f} GiB",
        *(f"  {kind:<26}{size / GIB:>9.3f} GiB" for kind, size in report.hbm.items()),
        "",
        "collectives of a step, received by a device",
        *(
            f"  {moved.phase:<14}{moved.kind:<20}{moved.times:>7,} times{moved.received / 1e9:>10.3f} GB"
            f"{'  across slices' if moved.crosses_slices else ''}"
            for moved in report.collectives
        ),
        "",
        f"floating-point operations: {report.compiled_flops:.3e} compiled, {report.model_flops:.3e} needed (full rows of one text each): "
        f"{report.flops_ratio:.2f} times; teacher {report.teacher_flops:.3e}",
        "a step takes at least",
        *(f"  {seconds:>9.3f} s for {bound}" for bound, seconds in report.seconds.items()),
        f"model FLOP utilisation at most {report.mfu:.0%}",
    ]
    return "\n".join(lines)


def write_json(report: CompiledStepReport, path: epath.PathLike) -> None:
    """Writes beside the file, then renames."""
    derived = {"hbm_used": report.hbm_used, "flops_ratio": report.flops_ratio}
    records.write_json(epath.Path(path), dataclasses.asdict(report) | derived)
