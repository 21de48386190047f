"""The input side in figures: order at the size of the composite, and from a prepared folder reading, planning and packing apart.

    python tests/benchmarks/data.py                      order alone, from the shipped catalogue's row counts
    python tests/benchmarks/data.py --prepared DIR       that and the pipeline on a prepared stage-2 folder

Prints one JSON object a line. Seconds are of one thread's CPU time where it says `cpu`, since machines are shared.
"""

import argparse
import hashlib
import json
import resource
import time

import numpy as np

from f2llm_jax.data import records
from f2llm_jax.data.packing import RowShape, lay_out
from f2llm_jax.data.pipeline import BatchConfig, Pipeline
from f2llm_jax.data.plan import Plan, PlanSource
from f2llm_jax.preparation.catalogue import CAP, load_catalogue

BATCH, ROW_TOKENS, ROW_TEXTS = 512, 512, 128
# Rows encoded at once: what a batch does not fill of its last chunk is lost, so a small batch wants small chunks.
CHUNK_ROWS = {512: 8, 16: 1}
TIMED_STEPS = 300
HOSTS = (1, 2, 16, 64)


def composite(cap: int) -> dict[str, PlanSource]:
    """Units of the shipped catalogue; the rows of a source, known as a sum, are spread evenly over its units."""
    units = {}
    for source in load_catalogue("f2llm_v2").sources:
        share, more = divmod(source.rows, len(source.units))
        for i, unit in enumerate(source.units):
            rows = share + (i < more)
            units[unit.name] = PlanSource(min(rows, cap or rows), 1 if source.kind == "classification" else 24, source.kind)
    return units


def order(units: dict[str, PlanSource], name: str) -> None:
    """A whole epoch planned step by step, each row counted; then single steps with packing."""
    begun = time.process_time()
    plan = Plan(units, BATCH, 0)
    plan.step(0)
    planned = time.process_time() - begun
    counts = {unit: np.zeros(source.rows, np.uint8) for unit, source in units.items()}
    begun = time.process_time()
    for step in range(plan.steps_per_epoch):
        found = plan.step(step)
        counts[found.source][found.rows] += 1
    every = time.process_time() - begun
    once = all((count == 1).all() for count in counts.values())
    rows = sum(source.rows for source in units.values())
    result = {"figure": "order", "rows": rows, "units": len(units), "steps": plan.steps_per_epoch, "each_row_once": once}
    result |= {"epoch_order_cpu_s": round(planned, 3), "all_steps_cpu_s": round(every, 1)}
    show(name, result | single_steps(plan) | {"peak_gib": round(peak_gib(), 2)})


def single_steps(plan: Plan) -> dict:
    """Milliseconds of a step's global plan, packing of its 4,608 texts included, and its equality on simulated hosts."""
    rng = np.random.default_rng(0)
    table = np.clip(rng.lognormal(3.7, 0.9, 1_000_000), 2, ROW_TOKENS).astype(np.int32)  # lengths like those of real sources
    retrieval = [step for step in range(3 * TIMED_STEPS) if len(plan.step(step).columns[0]) == plan.max_negatives - 2][:TIMED_STEPS]
    seconds, digests = [], {}
    for step in retrieval:
        begun = time.thread_time()
        packing = pack_step(plan, step, table)
        seconds.append(time.thread_time() - begun)
    for hosts in HOSTS:
        found = set()
        for _ in range(hosts):  # a host knows the sources and the seed, nothing else
            own = Plan(dict(reversed(plan._sources.items())), BATCH, 0)
            packing = pack_step(own, retrieval[0], table)
            found.add(hashlib.sha256(packing.row.tobytes() + packing.start.tobytes()).hexdigest())
        digests[hosts] = found
    texts = len(packing.lengths)
    return {
        "texts": texts,
        "step_plan_ms_median": round(1e3 * float(np.median(seconds)), 2),
        "step_plan_ms_p95": round(1e3 * float(np.percentile(seconds, 95)), 2),
        "same_on_hosts": list(HOSTS) if len(set.union(*digests.values())) == 1 else False,
    }


def pack_step(plan: Plan, step: int, table: np.ndarray):
    found = plan.step(step)
    texts = np.concatenate([found.rows, found.rows + 1, (found.rows[:, None] + 2 + found.columns).reshape(-1)])
    return RowShape(8, ROW_TOKENS, ROW_TEXTS).pack(table[texts * 7919 % len(table)])


def packing_efficiency(dataset: records.Dataset, batch: int) -> None:
    """Real tokens over computed slots in an epoch, and the same batches padded to their longest text."""
    pipeline = pipeline_of(dataset, batch)
    tokens = slots = padded = 0
    for step in range(pipeline.plan.steps_per_epoch):
        plan = pipeline.plan.step(step)
        lengths, _ = pipeline._texts(plan, pipeline._where(plan))
        packing = pipeline._shape.pack(lengths)
        tokens += int(lengths.sum())
        slots += max(1, -(-packing.rows // CHUNK_ROWS[batch])) * CHUNK_ROWS[batch] * ROW_TOKENS
        padded += int((lengths > 0).sum() * lengths.max())
    result = {"figure": "packing", "batch": batch, "row_tokens": ROW_TOKENS, "chunk_rows": CHUNK_ROWS[batch], "steps": step + 1}
    show("prepared", result | {"efficiency": round(tokens / slots, 4), "padded_efficiency": round(tokens / padded, 4)})


def throughput(dataset: records.Dataset) -> None:
    """Real tokens a second of one core, from disk to host arrays, and how it divides. A second epoch order, files in cache."""
    pipeline = pipeline_of(dataset, BATCH)
    spent, tokens, shapes = dict.fromkeys(("planning", "packing", "reading", "laying_out"), 0.0), 0, set()

    def timed(name, function, *arguments):
        begun = time.process_time()
        result = function(*arguments)
        spent[name] += time.process_time() - begun
        return result

    for step in range(pipeline.plan.steps_per_epoch):  # open every file once
        pipeline._host_arrays(step)
    for step in range(pipeline.plan.steps_per_epoch, 2 * pipeline.plan.steps_per_epoch):
        plan = timed("planning", pipeline.plan.step, step)
        lengths, read = timed("planning", pipeline._texts, plan, pipeline._where(plan))
        packing = timed("packing", pipeline._shape.pack, lengths)
        ids = timed("reading", read, np.flatnonzero(packing.row >= 0))
        worst = -(-len(lengths) // CHUNK_ROWS[BATCH])
        texts = timed("laying_out", lay_out, packing, pipeline._shape, lambda here, ids=ids: ids, worst)
        tokens += int(lengths.sum())
        shapes.add(texts.token_ids.shape)
    rates = {f"{name}_tokens_per_s": round(tokens / seconds) for name, seconds in spent.items()}
    show(
        "prepared",
        {"figure": "throughput", "tokens": tokens, "array_shapes": len(shapes), "tokens_per_cpu_s": round(tokens / sum(spent.values()))}
        | rates,
    )


def pipeline_of(dataset: records.Dataset, batch: int) -> Pipeline:
    shape = BatchConfig(size=batch, row_tokens=ROW_TOKENS, microbatch_rows=CHUNK_ROWS[batch], max_length=ROW_TOKENS, row_texts=ROW_TEXTS)
    return Pipeline(dataset, "train", shape, 0, None)


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def show(name: str, result: dict) -> None:
    print(json.dumps({"data": name} | result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepared", help="prepared stage-2 folder")
    prepared = parser.parse_args().prepared
    order(composite(CAP), "f2llm_v2 stage 2")
    if prepared:
        dataset = records.load_dataset(prepared)
        throughput(dataset)
        for batch in CHUNK_ROWS:
            packing_efficiency(dataset, batch)


if __name__ == "__main__":
    main()
