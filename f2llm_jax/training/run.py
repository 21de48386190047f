"""The run, on one page: mesh, data, model, state, step, loop.

Re-running the same command resumes: the order of data is a function of the step, so a resumed run sees the very next batch.
"""

import dataclasses
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections
from etils import epath
from flax import nnx
from jax.sharding import NamedSharding

from f2llm_jax import sharding
from f2llm_jax.data import embedded
from f2llm_jax.data.pipeline import BatchConfig, Pipeline
from f2llm_jax.data.records import Dataset, load_dataset
from f2llm_jax.data.teacher_cache import TeacherCache
from f2llm_jax.model.decoder import abstract_decoder, count_parameters
from f2llm_jax.model.encoder import chunk_encoder, layer_matryoshka
from f2llm_jax.model.stored import absolute
from f2llm_jax.objectives import ContrastiveConfig, Objective, matryoshka_dims
from f2llm_jax.training import checkpoint, start
from f2llm_jax.training.facts import write_facts
from f2llm_jax.training.metrics import Recorder
from f2llm_jax.training.optimizer import OptimizerConfig, make_optimizer
from f2llm_jax.training.preemption import Preempted, StopRequest
from f2llm_jax.training.profile import Profile
from f2llm_jax.training.step import TableRanks, Teacher, TrainState, make_eval_step, make_train_step
from f2llm_jax.training.validation import validate


def run(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> None:
    """Trains as `config` says (see configs/common.py for every field) and leaves checkpoints and metrics in `workdir`.

    Raises:
      ValueError: something in the configuration, the data or the starting weights does not fit; before the first step.
      DivergedError: too many steps in a row had no finite loss and gradient.
      Preempted: SIGTERM came; the state is saved.
    """
    workdir = absolute(workdir)

    # Mesh
    mesh = sharding.make_mesh(**config.mesh)
    jax.set_mesh(mesh)

    # Data
    dataset = load_dataset(_data_folder(config, workdir))
    batch_config = BatchConfig(**config.batch.to_dict())
    held_out = {
        name: Pipeline(dataset, "validation", batch_config, config.seed, mesh, [name])
        for name, source in dataset.sources.items()
        if source.rows["validation"]
    }

    # Model and teacher
    model = start.student(config.init, config.size, config.seed, dataset, config.table_rank)
    teacher = start.teacher(config.teacher, model.config, dataset) if config.teacher else None
    cached = None
    if config.teacher_cache:
        cached = TeacherCache(config.teacher_cache, dataset, batch_config.max_length, model.config.hidden_size)
    if teacher and cached:
        raise ValueError("config.teacher and config.teacher_cache are both set: one teacher at a time; clear one of them")
    dtype = jnp.dtype(config.dtype)
    depths = layer_matryoshka(model.config.num_hidden_layers) if config.objective.layer_matryoshka else ()
    encode_chunk = _chunk_encoder(model.config, dtype, config.remat)
    encode_depths = _chunk_encoder(model.config, dtype, config.remat, depths)

    # Order, objective and optimizer
    batches = Pipeline(dataset, "train", batch_config, config.seed, mesh, teacher=cached)
    total = config.steps or config.epochs * batches.plan.steps_per_epoch
    width = model.config.hidden_size
    widths = tuple(config.objective.matryoshka_dims) or matryoshka_dims(width, config.objective.matryoshka_minimum)
    dims = widths if config.objective.matryoshka else ()
    objective = _objective(config.objective, dims, distil=bool(teacher or cached))
    optimizer = OptimizerConfig(total_steps=total, **config.optimizer)

    # State: from this run, else from the given weights, else random
    checkpoints = checkpoint.open_checkpoints(workdir / "checkpoints", config.checkpoint.keep, best=bool(config.checkpoint.best))
    if checkpoints.latest is not None:
        checkpoint.check_tokenizer(checkpoints, dataset.tokenizer_fingerprint)
        state = checkpoint.restore(checkpoints, checkpoints.latest.step, _abstract_state(model.config, optimizer, mesh))
    else:
        state = _fresh_state(model.load(mesh), optimizer)
    write_facts(workdir, config, dataset)  # only now: a run that is refused leaves the workdir as it was
    teacher_params = None if teacher is None else jax.tree.map(lambda x: x.astype(dtype), teacher.load(mesh))

    # Step
    frozen = None if teacher is None else Teacher(_chunk_encoder(teacher.config, dtype, "none"))
    train_step = jax.jit(make_train_step(encode_depths, objective, optimizer, frozen, _table_ranks(config)), donate_argnums=0)
    scored = tuple(sorted({*widths, width}))
    eval_step = jax.jit(make_eval_step(encode_chunk, objective, scored))
    metadata = {
        "decoder": dataclasses.asdict(model.config),
        "matryoshka_dims": dims,
        "depths": depths,
        "tokenizer_fingerprint": dataset.tokenizer_fingerprint,
        "max_length": batch_config.max_length,
    }

    # Loop: validate and save before the batch is drawn, so that a resumed run repeats neither
    first = int(state.step)
    recorder = Recorder(workdir, first, total, config.log_every, config.max_skipped_steps)
    with checkpoints, StopRequest() as stop, Profile(workdir / "profile", **config.profile) as profile, recorder:
        recorder.say(_banner(model, dataset, batches, mesh, total, first))
        arrivals = batches.steps(first, total, config.data.threads, config.data.ahead)
        for step in range(first, total + 1):
            done, found = step == total, {}
            resumed = step == first and checkpoints.latest is not None
            validating, saving = (not resumed and (done or step % every == 0) for every in (config.eval.every, config.checkpoint.every))
            stopping = not done and stop.before(step)
            saving |= (validating and bool(config.checkpoint.best)) or (stopping and not resumed)
            if validating or saving:
                recorder.flush()  # a checkpoint never knows more than the metrics beside it
            if validating:
                begun = time.perf_counter()
                found = validate(eval_step, state.params, held_out, dataset, config.eval.batches, scored)
                recorder.validation(step, found, time.perf_counter() - begun)
            if saving:
                checkpoint.save(checkpoints, step, state, metadata, checkpoint.score(config.checkpoint.best, found))
            if done or stopping:
                break
            profile.before(step)
            waited = time.perf_counter()
            data = next(arrivals)
            waited = time.perf_counter() - waited
            state, means = train_step(state, teacher_params, data.batch)
            facts = {"epoch": data.plan.epoch, "source": data.plan.source, "kind": data.plan.kind}
            recorder.step(step + 1, means, facts, data.tokens, data.slots, waited)
    if stopping:
        raise Preempted(f"stopped on request after update {step} of {total}, which is saved; the same command goes on")


def _data_folder(config: ml_collections.ConfigDict, workdir: epath.Path) -> epath.PathLike:
    """The prepared dataset: the given one, or for a local run the embedded corpus, made in the workdir if need be."""
    if config.data.folder:
        return config.data.folder
    if not config.data.embedded_stage:
        raise ValueError(
            "config.data.folder is empty; make one with `python -m f2llm_jax.prepare`, or pass :runlocal for the embedded corpus"
        )
    return embedded.prepare(workdir / "data", config.data.embedded_stage, config.batch.max_length)


def _objective(config: ml_collections.ConfigDict, dims: tuple[int, ...], distil: bool) -> Objective:
    contrastive = ContrastiveConfig(
        temperature=config.temperature,
        dims=dims,
        weights=tuple(config.matryoshka_weights) if dims else (),
        in_batch_pool=config.in_batch_pool,
        in_batch_passage_grad=config.in_batch_passage_grad,
        mask_false_negatives=config.mask_false_negatives,
        false_negative_margin=config.false_negative_margin,
    )
    weight = config.distillation_weight if distil else 0.0
    return Objective(
        contrastive=contrastive, distillation=config.distillation, distillation_weight=weight, spread_out_weight=config.spread_out_weight
    )


def _chunk_encoder(config, dtype: jnp.dtype, remat: str, depths: tuple[int, ...] = ()):
    graphdef, _ = abstract_decoder(config)
    return chunk_encoder(graphdef, dtype, remat, depths)


def _table_ranks(config: ml_collections.ConfigDict) -> TableRanks | None:
    return TableRanks(config.table_rank, config.seed) if config.table_rank else None


def _fresh_state(params: nnx.State, optimizer: OptimizerConfig) -> TrainState:
    return TrainState(jnp.int32(0), params, jax.jit(make_optimizer(optimizer).init)(params))


def _abstract_state(config, optimizer: OptimizerConfig, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, from nothing but the configuration."""
    _, params = abstract_decoder(config, mesh)
    abstract = jax.eval_shape(lambda p: _fresh_state(p, optimizer), params)

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = leaf.sharding.spec if leaf.sharding else sharding.P()  # counters carry none: they are everywhere
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, abstract)


def _banner(model: start.StartingPoint, dataset: Dataset, batches: Pipeline, mesh: jax.sharding.Mesh, total: int, first: int) -> str:
    shape: Mapping[str, int] = mesh.shape
    return (
        f"{count_parameters(model.config):,} parameters {model.description}; {len(dataset.sources)} sources, "
        f"{batches.plan.steps_per_epoch} steps an epoch; mesh {dict(shape)} of {jax.devices()[0].device_kind}; "
        f"{'starts' if first == 0 else f'resumes at step {first}'}, {total} steps"
    )
