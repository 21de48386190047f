"""From where a run resumes: its checkpoint of last, or the one asked for, if that is of this run."""

import dataclasses
import sys
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from f2llm_jax.data.teacher_cache import TeacherCache, TeacherCaches
from f2llm_jax.model.sizes import DecoderConfig
from f2llm_jax.training import checkpoint
from f2llm_jax.training.provenance import Provenance, ResumeError, ResumePoint, check_changes, tell


@dataclasses.dataclass(frozen=True)
class Resume:
    """What the user says about resuming."""

    step: int | None = None  # of the checkpoint; None for the last
    with_changes: bool = False  # of what is trained and in which order
    verify: bool = False  # read data and cached teacher vectors whole, and compare checksums, before the first step


AS_IT_WAS = Resume()


def find(
    checkpoints: ocp.training.Checkpointer, resume: Resume, provenance: Provenance, total: int, model: DecoderConfig
) -> ResumePoint | None:
    """The checkpoint to resume from, None if there is none and none was asked for. Allowed changes are printed.

    Raises:
      ResumeError: the checkpoint is of another run, or beyond the `total` updates of this one.
      UserError: it is missing or damaged.
    """
    if resume.step is None and checkpoints.latest is None:
        return None
    step = checkpoints.latest.step if resume.step is None else resume.step
    recorded = checkpoint.recorded(checkpoints, step)
    workdir = checkpoints.directory.parent
    changes = provenance.changes(recorded.get("provenance"), workdir)
    check_changes(changes, workdir, resume.with_changes)
    checkpoint.check_same_model(checkpoints, recorded, model)
    if step > total:
        raise ResumeError(
            f"{workdir} has made {step} updates, and config.steps or config.epochs ask for {total}; ask for at least {step}, use another "
            "--workdir, or pass --resume_from with an earlier checkpoint"
        )
    if changes and jax.process_index() == 0:
        print(f"resumes with changes:\n  {tell(changes)}", file=sys.stderr, flush=True)
    return ResumePoint(step, changes)


def teacher_digest(digest: Callable[[], str] | None, cached: TeacherCache | TeacherCaches | None) -> str:
    """What identifies the teacher's weights, "" without one; read on the first host, the same on all."""
    if cached:
        return cached.digest
    if not digest:
        return ""
    found = digest() if jax.process_index() == 0 else ""
    if jax.process_count() == 1:
        return found
    held = np.frombuffer(found.encode().ljust(64), np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(held)).decode().strip()
