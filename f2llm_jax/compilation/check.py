"""Compiles the training step of a configuration for a slice of TPUs, and says what it needs there."""

import collections
import dataclasses
import inspect
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import NamedSharding

from f2llm_jax import sharding
from f2llm_jax.batch import Batch, PackedTexts
from f2llm_jax.compilation.collectives import Collective, collectives
from f2llm_jax.compilation.cost import Cost, trace
from f2llm_jax.compilation.topology import CHIPS, GIB, Chip, slice_devices
from f2llm_jax.data.plan import NEGATIVES
from f2llm_jax.errors import UserError
from f2llm_jax.model.decoder import abstract_decoder
from f2llm_jax.model.flops import Work, training_flops
from f2llm_jax.model.sizes import SIZES, DecoderConfig
from f2llm_jax.training import program
from f2llm_jax.training.step import TrainState

TOTAL_STEPS = 1000  # of the learning rate's schedule, which is a constant of the program
_TOO_LARGE = re.compile(r"Used ([\d.]+)([MG]) of ([\d.]+)([MG]) hbm")


class DoesNotFitError(UserError):
    """The program needs more memory than a device has."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What to compile.

    Attributes:
      config: of the run.
      topology: a slice by name, "v5p:4x4x4".
      slices: how many of them.
      teacher: size of the online teacher; empty for none.
      tokens_per_text: mean length of a text, which decides how many chunks a step has; memory does not depend on it.
    """

    config: ml_collections.ConfigDict
    topology: str
    slices: int = 1
    teacher: str = ""
    tokens_per_text: int = 128


@dataclasses.dataclass(frozen=True)
class Moved:
    """The collectives of one kind in one phase of the step.

    Attributes:
      phase: named scope.
      kind: as XLA calls it.
      times: how often one runs in a step.
      received: bytes that a device receives a step.
      crosses_slices: devices of several slices take part.
    """

    phase: str
    kind: str
    times: int
    received: float
    crosses_slices: bool


@dataclasses.dataclass(frozen=True)
class CompiledStepReport:
    """What was found. Bytes and seconds are of one device and one step, FLOPs of all devices.

    FLOPs of the model are those of a step whose rows are full, one text each; compiled ones are without the teacher's.

    Attributes:
      size: of the student.
      teacher: size of the teacher, or empty.
      topology: the slice.
      slices: their number.
      devices: all together.
      device_kind: JAX's name of them.
      mesh: (data, fsdp, tensor).
      attention: kernel.
      remat: policy.
      microbatch_rows: over all devices.
      chunks: in a step.
      hbm: bytes by kind.
      hbm_capacity: bytes.
      collectives: by phase and kind.
      compiled_flops: of the student's step.
      model_flops: that it needs.
      teacher_flops: of the teacher's part.
      seconds: lower bounds by what they are bounds of.
      mfu: at most.
      compile_seconds: on this machine.
    """

    size: str
    teacher: str
    topology: str
    slices: int
    devices: int
    device_kind: str
    mesh: tuple[int, ...]
    attention: str
    remat: str
    microbatch_rows: int
    chunks: int
    hbm: Mapping[str, int]
    hbm_capacity: int
    collectives: tuple[Moved, ...]
    compiled_flops: float
    model_flops: float
    teacher_flops: float
    seconds: Mapping[str, float]
    mfu: float
    compile_seconds: float

    @property
    def hbm_used(self) -> int:
        """Bytes of one device."""
        return sum(self.hbm.values())

    @property
    def flops_ratio(self) -> float:
        """Compiled to needed."""
        return self.compiled_flops / self.model_flops


def check(request: Request) -> CompiledStepReport:
    """Compiles and counts.

    Raises:
      TopologyError: there is no such slice, or no compiler for it.
      DoesNotFitError: the program needs more memory than a device has.
      ValueError: the configuration does not fit the slice.
    """
    config, model = request.config, SIZES[request.config.size]
    devices = slice_devices(request.topology, request.slices)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    teacher = SIZES[request.teacher] if request.teacher else None
    with jax.set_mesh(mesh):
        steps = program.build(config, model, TOTAL_STEPS, devices[0].platform, teacher)
        arguments = abstract_arguments(config, model, steps, teacher, mesh)
        chunks = _chunks(request)
        cost, teacher_cost = costs(config, model, steps, arguments, chunks, teacher)
        begun = time.perf_counter()
        compiled = _compile(steps, arguments)
        compile_seconds = time.perf_counter() - begun
    chip = CHIPS[devices[0].device_kind]
    moved = _summary(collectives(compiled.as_text(), lambda scope: chunks - ("teacher" not in scope)), len(devices) // request.slices)
    tokens = chunks * config.batch.microbatch_rows * config.batch.row_tokens
    needed = training_flops(model, Work(tokens, tokens * config.batch.row_tokens))
    seconds = _bounds(cost + teacher_cost, moved, chip, len(devices))
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
        microbatch_rows=config.batch.microbatch_rows,
        chunks=chunks,
        hbm=_memory(compiled, arguments),
        hbm_capacity=int(chip.hbm),
        collectives=tuple(moved),
        compiled_flops=cost.flops,
        model_flops=needed,
        teacher_flops=teacher_cost.flops,
        seconds=seconds,
        mfu=needed / (max(seconds.values()) * len(devices) * chip.flops),
        compile_seconds=compile_seconds,
    )


Arguments = tuple[TrainState, Any, Batch]  # of the step: shapes and shardings of state, teacher's parameters and batch


def abstract_arguments(
    config: ml_collections.ConfigDict, model: DecoderConfig, steps: program.Program, teacher: DecoderConfig | None, mesh: jax.sharding.Mesh
) -> Arguments:
    """What the step of `config` is called with on `mesh`.

    Raises:
      ValueError: its rows cannot be split over the mesh.
    """
    state = program.abstract_state(model, steps.optimizer, mesh)
    frozen = None
    if teacher:
        _, params = abstract_decoder(teacher, mesh)
        frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(config.dtype), sharding=x.sharding), params)
    return state, frozen, abstract_batch(config.batch, mesh)


def abstract_batch(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> Batch:
    """The shapes of a step's batch, as `Pipeline` gives it to the devices of `mesh`.

    Raises:
      ValueError: its rows cannot be split over the mesh.
    """
    ways = sharding.batch_shards(mesh)
    M, T, X = config.microbatch_rows, config.row_tokens, config.row_texts
    if M % ways:
        raise UserError(f"batch.microbatch_rows={M} must be a multiple of the {ways} ways that rows are split over")
    B, N = -(-config.size // ways) * ways, max({**NEGATIVES, **config.negatives}.values())
    C = -(-B * (2 + N) // M)

    def array(shape: tuple[int, ...], dtype: jnp.dtype, spec: sharding.P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    tokens, slots = (array((C, M, width), jnp.int32, sharding.CHUNKS_RT) for width in (T, X))
    samples = sharding.P(sharding.BATCH)
    negatives = sharding.P(sharding.BATCH, None)
    return Batch(
        PackedTexts(tokens, tokens, tokens, slots, slots, array((), jnp.int32, sharding.P())),
        sample_mask=array((B,), jnp.float32, samples),
        negative_mask=array((B, N), jnp.float32, negatives),
        in_batch_weight=array((), jnp.float32, sharding.P()),
        passage_ids=array((B,), jnp.int32, samples),
        negative_ids=array((B, N), jnp.int32, negatives),
    )


def _chunks(request: Request) -> int:
    """Of a retrieval step with texts of the mean length."""
    batch = request.config.batch
    texts = batch.size * (2 + {**NEGATIVES, **batch.negatives}["retrieval"])
    return max(1, -(-texts * request.tokens_per_text // (batch.microbatch_rows * batch.row_tokens)))


def _compile(steps: program.Program, arguments: Arguments) -> jax.stages.Compiled:
    try:
        return steps.train_step.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if not (found := _TOO_LARGE.search(str(error))):
            raise
        used, used_unit, limit, limit_unit = found.groups()
        raise DoesNotFitError(
            f"needs {used} {used_unit}iB of memory a device, of which {limit} {limit_unit}iB are there; "
            "lower batch.microbatch_rows, take remat=full or a larger slice"
        ) from error


def costs(
    config: ml_collections.ConfigDict,
    model: DecoderConfig,
    steps: program.Program,
    arguments: Arguments,
    chunks: int,
    teacher: DecoderConfig | None,
) -> tuple[Cost, Cost]:
    """Of a step of `chunks` chunks without its teacher, and what the teacher adds; under the mesh of the arguments."""

    def of(steps: program.Program, frozen: Any) -> Cost:
        state, _, batch = arguments
        step = inspect.unwrap(steps.train_step)  # not jitted: a number of chunks that is a Python int stays one

        def static(state: TrainState, frozen: Any, batch: Batch) -> Any:
            return step(state, frozen, dataclasses.replace(batch, texts=dataclasses.replace(batch.texts, chunks=chunks)))

        return trace(static, state, frozen, batch)

    platform = jax.tree.leaves(arguments)[0].sharding.mesh.abstract_mesh.abstract_device.platform
    alone = of(steps if teacher is None else program.build(config, model, TOTAL_STEPS, platform), None)
    if teacher is None:
        return alone, Cost()
    return alone, of(steps, arguments[1]) + alone * -1.0


def _memory(compiled: jax.stages.Compiled, arguments: Arguments) -> dict[str, int]:
    """Bytes of one device by kind. Gradients are float32 and as large as the parameters; they are among XLA's temporaries."""
    found = compiled.memory_analysis()
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
    times, received = collections.Counter(), collections.Counter()
    for one in found:
        phase = one.phase.split("/")[0].removeprefix("transpose(").removeprefix("jvp(").rstrip(")") or "other"
        key = phase, one.kind, len({device // slice_devices for device in one.group}) > 1
        times[key] += one.times
        received[key] += one.times * one.received
    return [Moved(*key[:2], times[key], received[key], key[2]) for key in sorted(times) if times[key]]


def _bounds(cost: Cost, moved: list[Moved], chip: Chip, devices: int) -> dict[str, float]:
    """Seconds that a step takes at least, by what it would wait for."""
    inside, across = (sum(one.received for one in moved if one.crosses_slices == crosses) for crosses in (False, True))
    return {
        "matrix products": cost.flops / devices / chip.flops,
        "memory": cost.bytes / devices / chip.hbm_bandwidth,
        "collectives": inside / chip.ici_bandwidth,
        "network": across / chip.dcn_bandwidth,
    }


def search(request: Request, report: Callable[[str], None] = lambda line: None) -> CompiledStepReport:
    """The report of the largest `batch.microbatch_rows` that fits, of those that are a power of two for each of the mesh's ways.

    `report` is told of each try. At most, one chunk takes a whole step.

    Raises:
      DoesNotFitError: not even one row a way fits.
    """
    devices = slice_devices(request.topology, request.slices)
    ways, rows, best = sharding.batch_shards(sharding.make_mesh(**request.config.mesh, devices=devices)), 1, None
    while True:
        config = request.config.copy_and_resolve_references()
        config.batch.microbatch_rows = ways * rows
        try:
            best = check(dataclasses.replace(request, config=config))
        except DoesNotFitError as error:
            report(f"{ways * rows} rows: {error}")
            if best is None:
                raise
            return best
        report(f"{ways * rows} rows: {best.hbm_used / GIB:.2f} GiB")
        if best.chunks == 1:
            return best
        rows *= 2
