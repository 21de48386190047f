"""The run, on one page: hosts, mesh, data, model, state, step; `loop.py` is what follows.

Re-running the same command resumes: the order of data is a function of the step, so a resumed run sees the very next batch.
"""

import contextlib
import dataclasses
import os
import socket
import sys
from collections.abc import Mapping, Sequence

import jax
import ml_collections
from etils import epath

from f2llm_jax import sharding
from f2llm_jax.data.local_copy import local_dataset
from f2llm_jax.data.order import Sampling
from f2llm_jax.data.pipeline import BatchConfig, Pipeline
from f2llm_jax.data.records import Dataset
from f2llm_jax.errors import Preempted, UserError
from f2llm_jax.model.decoder import count_parameters
from f2llm_jax.objectives import LossFunction
from f2llm_jax.storage.files import workdir_path
from f2llm_jax.storage.folders import check_whole
from f2llm_jax.storage.locks import lock
from f2llm_jax.training import automatic, checkpoint, hosts, loggers, program, resuming, start
from f2llm_jax.training.host_log import HostLog
from f2llm_jax.training.local_inputs import data_folder, fetch, open_teachers
from f2llm_jax.training.loop import Loop
from f2llm_jax.training.metrics import Recorder
from f2llm_jax.training.preemption import StopRequest
from f2llm_jax.training.profile import Profile
from f2llm_jax.training.prompts import trained_prompts
from f2llm_jax.training.provenance import Provenance, write_provenance
from f2llm_jax.training.saving import Saver
from f2llm_jax.training.time_use import TimeUse
from f2llm_jax.training.validation import HeldOut
from f2llm_jax.training.watchdog import Watchdog
from f2llm_jax.weights import checkpoint_reader
from f2llm_jax.weights.embedding_config import EmbeddingConfig


def run(
    config: ml_collections.ConfigDict,
    workdir: epath.PathLike,
    place: hosts.Place = hosts.ALONE,
    limit: int = 300,
    own: LossFunction | None = None,
    callbacks: Sequence[loggers.Logger] = (),
    resume: resuming.Resume = resuming.AS_IT_WAS,
) -> None:
    """Trains as `config` says (see configs/common.py for every field) and leaves checkpoints, metrics and logs in `workdir`.

    Args:
      config: every field of a run.
      workdir: local or `gs://`; of several hosts, one that all see.
      place: of this process among those of the run.
      limit: seconds within which all of them must have started.
      own: objective of the user's in place of `config.objective`.
      callbacks: called on the first host with each line of metrics, besides `config.loggers`.
      resume: from which checkpoint, and whether as another run than it was.

    Raises:
      UserError: something in the configuration, the data or the starting weights does not fit; before the first step.
      LockedError: another process writes the workdir.
      ResumeError: the workdir holds another run.
      StartupError: processes are missing, or run other code or another configuration.
      DivergedError: too many steps in a row had no finite loss and gradient.
      Preempted: SIGTERM came; the state is saved.
    """
    workdir = workdir_path(workdir)
    first = place.process_id == 0
    with (
        hosts.Joining(place, hosts.settings_of(config, workdir, resume), limit) as joining,
        lock(workdir) if first else contextlib.nullcontext(),
        HostLog(workdir, place.process_id) as log,
    ):
        log.say(f"started: process {place.process_id} of {place.num_processes} on {socket.gethostname()}, pid {os.getpid()}")
        fetch(config, workdir, place)
        joining.join()
        mesh = sharding.make_mesh(**config.mesh)
        use = TimeUse(workdir, place.process_id)
        with jax.set_mesh(mesh), contextlib.closing(use), Watchdog(use, log, config.hang_minutes):
            _train(config, workdir, log, use, mesh, own, callbacks, resume)


def _train(
    config: ml_collections.ConfigDict,
    workdir: epath.Path,
    log: HostLog,
    use: TimeUse,
    mesh: jax.sharding.Mesh,
    own: LossFunction | None,
    callbacks: Sequence[loggers.Logger],
    resume: resuming.Resume,
) -> None:
    loggers.check(config.loggers)
    program.keep_compiled(workdir / "compiled", mesh.devices.flat[0].platform)

    # Data and model
    _say(log, "reading the dataset and the starting model")
    dataset = local_dataset(data_folder(config, workdir), config.data.copy_to)
    check_whole(dataset.folder, "Prepare it again with --overwrite", whole=resume.verify)
    model = start.student(config.init, config.size, config.seed, dataset, config.table_rank, shared=workdir)
    text_limit = automatic.text_limit(config, model.config, dataset)
    config = automatic.batch(config, model.config, dataset, mesh)
    batch_config = BatchConfig(**config.batch.to_dict())

    # Teacher
    objective = config.objective
    any_width = objective.projection or objective.distillation == "scores" or not objective.distillation_weight or own is not None
    compared = None if any_width else model.config.hidden_size
    teacher = start.teacher(config.teacher, compared, dataset, shared=workdir) if config.teacher else None
    cached = open_teachers(config, dataset, batch_config.max_length, compared)
    if cached and resume.verify:
        cached.verify()
    if teacher and cached:
        raise UserError("config.teacher and config.teacher_cache are both set: one teacher at a time; clear one of them")

    # Order and program
    batches = Pipeline(dataset, "train", batch_config, config.seed, mesh, teacher=cached, sampling=Sampling.of(config.data.to_dict()))
    epochs = batches.plan.epochs
    total = config.steps or epochs.steps(config.epochs)
    ends = () if config.steps else [epochs.steps(epoch) for epoch in range(1, config.epochs + 1)]
    config = automatic.schedule(config, total)
    platform, frozen = mesh.devices.flat[0].platform, teacher.config if teacher else None
    steps = program.build(config, model.config, total, platform, frozen, cached.widths if cached else (), own)

    # State: from this run, else from the given weights, else random
    kept = checkpoint.CheckpointConfig(**config.checkpoint)
    held_out = HeldOut(dataset, batch_config, config, mesh, ends)
    if kept.best and not held_out.scored:
        raise UserError("config.checkpoint.best needs validations: config.eval.every and config.eval.batches above 0, and held-out rows")
    checkpoints = checkpoint.open_checkpoints(workdir / "checkpoints", kept, ends)
    provenance = Provenance.of(
        config, dataset, resuming.teacher_digest(teacher.digest if teacher else None, cached), hosts.source_digest(), own
    )
    point = resuming.find(checkpoints, resume, provenance, total, model.config)
    if point is not None:
        _say(log, f"reading checkpoint {point.step}")
        state = checkpoint.restore(checkpoints, point.step, program.abstract_state(model.config, steps.optimizer, mesh, steps.projected))
        checkpoint.drop_after(checkpoints, point.step)
    else:
        _say(log, f"placing weights {model.description}")
        projections = program.init_projections(model.config.hidden_size, steps.projected, config.seed, mesh)
        state = program.fresh_state(model.load(mesh), steps.optimizer, projections)
    if jax.process_index() == 0:  # only now: a run that is refused leaves the workdir as it was
        write_provenance(workdir, provenance, dataset, point)
    teacher_params = None if teacher is None else jax.tree.map(lambda x: x.astype(config.dtype), teacher.load(mesh))
    embedding = EmbeddingConfig(
        matryoshka_dims=steps.dims,
        depths=steps.depths,
        table_ranks=steps.table_ranks,
        max_length=text_limit,
        prompts=trained_prompts(dataset),
        tokenizer_fingerprint=dataset.tokenizer_fingerprint,
    )
    metadata = checkpoint_reader.metadata(model.config, embedding) | {"provenance": dataclasses.asdict(provenance)}

    # Loop
    first, again = int(state.step), point is not None
    saver = Saver(checkpoints, kept, metadata, total, ends)
    use.resumed(first)
    with (
        checkpoints,
        StopRequest() as stop,
        Profile(workdir / "profile", **config.profile) as profile,
        loggers.opened(config.loggers, workdir, config, first + again) as outputs,
        Recorder(
            workdir, first, total, config.log_every, config.max_skipped_steps, resumed=again, loggers=[*outputs, *callbacks]
        ) as recorder,
    ):
        for line in _banner(model, dataset, batches, mesh, steps, batch_config, total, first):
            recorder.say(line)
            log.say(line)
        log.store()
        loop = Loop(
            model=model.config,
            program=steps,
            teacher_params=teacher_params,
            batches=batches,
            held_out=held_out,
            saver=saver,
            recorder=recorder,
            profile=profile,
            use=use,
            total=total,
            threads=config.data.threads,
            ahead=config.data.ahead,
        )
        made = loop.run(state, first, again, stop)
    if made < total:
        raise Preempted(f"stopped on request after update {made} of {total}, which is saved; the same command resumes")


def _say(log: HostLog, line: str) -> None:
    log.say(line)
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


def _banner(
    model: start.StartingPoint,
    dataset: Dataset,
    batches: Pipeline,
    mesh: jax.sharding.Mesh,
    steps: program.Program,
    batch: BatchConfig,
    total: int,
    first: int,
) -> list[str]:
    shape: Mapping[str, int] = mesh.shape
    if first == total:
        return [f"finished: all {total} steps are done; raise config.epochs or config.steps, or choose another --workdir, to train further"]
    lines = [
        f"{count_parameters(model.config):,} parameters {model.description}; {len(dataset.sources)} sources, "
        f"{batches.plan.steps_per_epoch} steps an epoch of {batch.size} samples, of which up to {batch.microbatch_rows} rows of "
        f"{batch.row_tokens} tokens are encoded once; mesh {dict(shape)} of {jax.devices()[0].device_kind}, {steps.kernel} attention; "
        f"learning rate {steps.optimizer.learning_rate:g} after {steps.optimizer.warmup} steps of warm-up; "
        f"{'starts' if first == 0 else f'resumes at step {first}'}, {total} steps"
    ]
    if longer := dataset.longer_than(batch.max_length):
        lines.append(f"{longer:,} texts are longer than config.batch.max_length={batch.max_length} tokens and are truncated")
    return lines
