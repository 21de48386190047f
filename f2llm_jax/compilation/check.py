"""Compiles the training step of a configuration for a slice of TPUs, and says what it needs there."""

import collections
import dataclasses
import inspect
import math
import re
import time
from collections.abc import Callable
from typing import Any, cast

import jax
import ml_collections
import numpy as np

from f2llm_jax import sharding
from f2llm_jax.batch import Batch
from f2llm_jax.compilation.arguments import StepArguments, abstract_arguments
from f2llm_jax.compilation.collectives import Collective, collectives
from f2llm_jax.compilation.cost import Cost, trace
from f2llm_jax.compilation.estimate import estimated_cycles
from f2llm_jax.compilation.lengths import loop_trips, steps_of
from f2llm_jax.compilation.report import CompiledStepReport, Moved
from f2llm_jax.compilation.topology import CHIPS, GIB, Chip, slice_devices
from f2llm_jax.data.pipeline import BatchConfig
from f2llm_jax.data.plan import NEGATIVES
from f2llm_jax.errors import UserError
from f2llm_jax.model.flops import training_flops
from f2llm_jax.model.sizes import SIZES, DecoderConfig
from f2llm_jax.training import program
from f2llm_jax.training.step import TrainState

TOTAL_STEPS = 1000  # of the learning rate's schedule, which is a constant of the program
_TOO_LARGE = re.compile(r"Used ([\d.]+)([MG]) of ([\d.]+)([MG]) hbm")


class DoesNotFitError(UserError):
    """The program needs more memory than a device has."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What to compile."""

    config: ml_collections.ConfigDict  # of the run
    topology: str  # a slice by name, "v5p:4x4x4"
    slices: int = 1  # how many of them
    teacher: str = ""  # size of the online teacher; empty for none
    tokens_per_text: int = 0  # length of every text; 0 for the stored lengths. Memory does not depend on it


def check(request: Request) -> CompiledStepReport:
    """Compiles and counts, for retrieval steps.

    Raises:
      TopologyError: there is no such slice, or no compiler for it.
      DoesNotFitError: the program needs more memory than a device has.
      UserError: the configuration does not fit the slice.
    """
    config, model = request.config, SIZES[request.config.size]
    devices = slice_devices(request.topology, request.slices)
    chip = CHIPS[devices[0].device_kind]
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    teacher = SIZES[request.teacher] if request.teacher else None
    batch = BatchConfig(**config.batch.to_dict())
    shape, negatives = batch.rows(sharding.batch_shards(mesh)), {**NEGATIVES, **(batch.negatives or {})}
    drawn = steps_of(shape, batch.size * (2 + negatives["retrieval"]), batch.max_length, request.tokens_per_text)
    with jax.set_mesh(mesh):
        steps = program.build(config, model, TOTAL_STEPS, devices[0].platform, teacher)
        arguments = abstract_arguments(config, model, steps, teacher, mesh)
        counted = {(n, s): costs(config, model, steps, arguments, n, s, teacher) for n, s in {(step.chunks, step.short) for step in drawn}}
        begun = time.perf_counter()
        compiled = _compile(steps, arguments)
        compile_seconds = time.perf_counter() - begun
    cost, teacher_cost = (sum((counted[step.chunks, step.short][i] for step in drawn), Cost()) * (1 / len(drawn)) for i in (0, 1))
    text = compiled.as_text() or ""

    def trips(scope: str) -> float:
        return loop_trips(drawn, shape.group_chunks, scope)

    moved = _summary(collectives(text, trips), len(devices) // request.slices)
    needed = float(np.mean([training_flops(model, step.work) for step in drawn]))
    seconds = _bounds(cost + teacher_cost, moved, chip, len(devices))
    estimated = estimated_cycles(text, trips) / chip.clock
    return CompiledStepReport(
        size=config.size,
        teacher=request.teacher,
        topology=request.topology,
        slices=request.slices,
        devices=len(devices),
        device_kind=chip.kind,
        mesh=tuple(mesh.shape.values()),
        attention=steps.kernel,
        remat=config.remat,
        microbatch_rows=batch.microbatch_rows,
        chunk_rows=shape.chunk_rows,
        rows=float(np.mean([step.rows for step in drawn])),
        real_share=sum(step.work.tokens for step in drawn) / sum(step.computed for step in drawn),
        hbm=_memory(compiled, arguments),
        hbm_capacity=int(chip.hbm),
        collectives=tuple(moved),
        compiled_flops=cost.flops,
        model_flops=needed,
        teacher_flops=teacher_cost.flops,
        seconds=seconds,
        estimated_seconds=estimated,
        mfu=needed / (max(estimated, *seconds.values()) * len(devices) * chip.flops),
        compile_seconds=compile_seconds,
    )


def _compile(steps: program.Program, arguments: StepArguments) -> jax.stages.Compiled:
    try:
        return cast(Any, steps.train_step).lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if not (found := _TOO_LARGE.search(str(error))):
            raise
        used, used_unit, limit, limit_unit = found.groups()
        raise DoesNotFitError(
            f"needs {used} {used_unit}iB of memory a device, of which it has {limit} {limit_unit}iB; "
            "lower batch.microbatch_rows, or take remat=full or a larger slice"
        ) from error


def costs(
    config: ml_collections.ConfigDict,
    model: DecoderConfig,
    steps: program.Program,
    arguments: StepArguments,
    chunks: int,
    short: int,
    teacher: DecoderConfig | None,
) -> tuple[Cost, Cost]:
    """Of a step of `chunks` chunks, of which `short` hold short rows, without its teacher, and what the teacher adds.

    Under the mesh of the arguments.
    """

    def of(steps: program.Program, frozen: Any) -> Cost:
        state, _, batch = arguments
        step = inspect.unwrap(steps.train_step)  # not jitted: numbers that are Python ints stay such

        def static(state: TrainState, frozen: Any, batch: Batch) -> Any:
            texts = dataclasses.replace(batch.texts, chunks=chunks, short_chunks=short)
            return step(state, frozen, dataclasses.replace(batch, texts=texts))

        return trace(static, state, frozen, batch)

    platform = jax.tree.leaves(arguments)[0].sharding.mesh.abstract_mesh.abstract_device.platform
    alone = of(steps if teacher is None else program.build(config, model, TOTAL_STEPS, platform), None)
    if teacher is None:
        return alone, Cost()
    return alone, of(steps, arguments[1]) + alone * -1.0


def _memory(compiled: jax.stages.Compiled, arguments: StepArguments) -> dict[str, int]:
    """Bytes of one device by kind. Gradients are float32 and as large as the parameters; they are among XLA's temporaries."""
    found = compiled.memory_analysis()
    if found is None:
        raise ValueError("this compiler does not tell what memory its program needs")
    state, teacher, batch = arguments
    kinds = {"parameters": _bytes(state.params), "optimizer": _bytes(state.opt_state), "teacher": _bytes(teacher), "batch": _bytes(batch)}
    rest = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes - sum(kinds.values())
    kinds["gradients"] = kinds["parameters"]
    kinds["activations and workspace"] = found.temp_size_in_bytes - kinds["gradients"]
    kinds["program and rest"] = found.generated_code_size_in_bytes + max(0, rest)
    return kinds


def _bytes(tree: Any) -> int:
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))


def _summary(found: list[Collective], slice_devices: int) -> list[Moved]:
    times: dict[tuple[str, str, bool], float] = collections.defaultdict(float)
    received: dict[tuple[str, str, bool], float] = collections.defaultdict(float)
    for one in found:
        phase = one.phase.split("/")[0].removeprefix("transpose(").removeprefix("jvp(").rstrip(")") or "other"
        key = phase, one.kind, len({device // slice_devices for device in one.group}) > 1
        times[key] += one.times
        received[key] += one.times * one.received
    return [Moved(key[0], key[1], times[key], received[key], key[2]) for key in sorted(times) if times[key]]


def _bounds(cost: Cost, moved: list[Moved], chip: Chip, devices: int) -> dict[str, float]:
    """Seconds that a step takes at least, by what it would wait for."""
    inside, across = (sum(one.received for one in moved if one.crosses_slices == crosses) for crosses in (False, True))
    return {
        "matrix products": cost.flops / devices / chip.flops,
        "memory": cost.bytes / devices / chip.hbm_bandwidth,
        "collectives": inside / chip.collective_bandwidth,
        "network": across / chip.dcn_bandwidth,
    }


def search(request: Request, report: Callable[[str], None] = lambda line: None) -> CompiledStepReport:
    """The report of the largest `batch.microbatch_rows` that fits, of those that are a power of two for each shard of the batch.

    `report` is told of each try. At most, one group of rows takes a whole step.

    Raises:
      DoesNotFitError: not even one row a shard fits.
    """
    devices = slice_devices(request.topology, request.slices)
    shards, rows, best = sharding.batch_shards(sharding.make_mesh(**request.config.mesh, devices=devices)), 1, None
    while True:
        config = request.config.copy_and_resolve_references()
        config.batch.microbatch_rows = shards * rows
        try:
            best = check(dataclasses.replace(request, config=config))
        except DoesNotFitError as error:
            report(f"{shards * rows} rows: {error}")
            if best is None:
                raise
            return best
        report(f"{shards * rows} rows: {best.hbm_used / GIB:.2f} GiB")
        if best.rows <= shards * rows:
            return best
        rows *= 2
