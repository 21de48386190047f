"""Every published size compiled for its recommended slice, stage by stage, teachers included: the table of launch/README.md.

    make tpu-check                                             needs no TPU; half an hour on two cores
    python tests/benchmarks/slices.py --out DIR [--only 14b]   with libtpu installed; what stands in DIR is not compiled again

At the stored text lengths. Exit code 1 if a program leaves less than a tenth of a device's memory free, computes on less than 90% real
tokens or on more than 1.40 times what the model needs, or took more than five minutes to compile. Sizes whose stage 2 has no teacher have
one program for both stages.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from f2llm_jax.configs import common, family  # noqa: E402

MOST_OF_MEMORY, LEAST_REAL, MOST_FLOPS, MOST_SECONDS = 0.9, 0.9, 1.40, 300
COLUMNS = (
    *("size", "stage", "teacher", "slice", "memory of a device", "rows a device", "collectives", "compiled / needed", "real tokens"),
    *("compiler's estimate", "MFU at most", "compiled in"),
)


def programs() -> list[tuple[str, str, dict[str, str]]]:
    """Name, stage and flags of each distinct program."""
    found = []
    for size in (*reversed(family.LARGE), *family.PRUNED):
        teacher = family.TEACHERS.get(size, "")
        if size in family.LARGE:
            stages = "1" if teacher else "1 and 2"
            found.append((f"{size}-stage1", stages, {"--config": f"configs/stage1.py:size={size}", "--topology": common.SLICE[size]}))
        if teacher:
            flags = {"--config": f"configs/stage2.py:size={size}", "--topology": common.SLICE[size], "--teacher": teacher}
            found.append((f"{size}-stage2", "2", flags))
    flags = {"--config": "configs/stage2.py:size=0.6b", "--topology": common.SLICE["0.6b"], "--teacher": "1.7b", "--slices": "2"}
    return [*found, ("0.6b-two-slices", "2", flags | {"--config.mesh.data": "2"})]


def report_of(name: str, flags: dict[str, str], out: pathlib.Path) -> dict:
    file = out / f"{name}.json"
    if not file.exists():
        command = [sys.executable, "-m", "f2llm_jax.compile_check", f"--json={file}", *(f"{flag}={value}" for flag, value in flags.items())]
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.DEVNULL)
    return json.loads(file.read_text())


def line(stage: str, report: dict) -> str:
    """One row of the table; collectives are gigabytes that a device receives a step."""
    kinds: dict[str, float] = {}
    for moved in report["collectives"]:
        kind = "across slices" if moved["crosses_slices"] else moved["kind"]
        kinds[kind] = kinds.get(kind, 0) + moved["received"]
    moved = ", ".join(f"{kind} {size / 1e9:.1f} GB" for kind, size in sorted(kinds.items(), key=lambda one: -one[1]) if size >= 5e7)
    slices = f"{report['slices']} x " if report["slices"] > 1 else ""
    cells = (
        report["size"],
        stage,
        report["teacher"] or "-",
        slices + report["topology"],
        f"{report['hbm_used'] / 2**30:.1f} of {report['hbm_capacity'] / 2**30:.0f} GiB",
        f"{report['microbatch_rows'] / report['devices']:g}",
        moved,
        f"{report['flops_ratio']:.2f}",
        f"{report['real_share']:.0%}",
        f"{report['estimated_seconds']:.2f} s",
        f"{report['mfu']:.0%}",
        f"{report['compile_seconds']:.0f} s",
    )
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=pathlib.Path, help="folder of the reports")
    parser.add_argument("--only", default="", help="programs whose name begins so")
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    failed = []
    for name, stage, arguments in programs():
        if not name.startswith(flags.only):
            continue
        report = report_of(name, arguments, flags.out)
        print(line(stage, report), flush=True)
        if report["hbm_used"] > MOST_OF_MEMORY * report["hbm_capacity"]:
            failed.append(f"{name} leaves too little memory")
        if report["real_share"] < LEAST_REAL:
            failed.append(f"{name} computes on {report['real_share']:.0%} real tokens")
        if report["flops_ratio"] > MOST_FLOPS:
            failed.append(f"{name} computes {report['flops_ratio']:.2f} times what it needs")
        if report["compile_seconds"] > MOST_SECONDS:
            failed.append(f"{name} took {report['compile_seconds']:.0f} s to compile")
    print("\n".join(failed), file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
