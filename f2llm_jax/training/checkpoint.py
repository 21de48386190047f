"""Checkpoints with Orbax: saved asynchronously, complete or absent, restorable on any mesh.

A checkpoint holds `params` and `optimizer`, and `projections` to teachers where there are any, as flat dictionaries from a readable path
(`layers/query`) to an array, so it does not depend on module classes, and JSON metadata: the step, the decoder's shape and what else the
run wants to hand on. The order of data follows from the step, so nothing of the input pipeline is stored.
"""

import dataclasses
import difflib
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jaxtyping import Array, Bool
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src.serialization import tensorstore_utils

from f2llm_jax import sharding
from f2llm_jax.errors import DivergedError, UserError
from f2llm_jax.model.sizes import DecoderConfig
from f2llm_jax.storage.files import absolute, plain, seal
from f2llm_jax.training.step import TrainState
from f2llm_jax.weights import chunks
from f2llm_jax.weights.checkpoint_check import checkpoint_damage, good_steps
from f2llm_jax.weights.checkpoint_reader import PROJECTIONS, check_descriptions, flatten, load_arrays, read_metadata, unflatten

SCORE = "score"
# Where a checkpoint is damaged, Orbax leaves a coroutine that nobody awaits, and Python would say so after our line.
warnings.filterwarnings("ignore", "coroutine 'PyTreeHandler._background_load' was never awaited", RuntimeWarning)

# Orbax has no option for a codec of its own. A CRC-32C behind each chunk is compared by tensorstore whenever the chunk is read.
_orbax_metadata = tensorstore_utils._build_zarr3_metadata


def _with_checksums(*args: Any, **kwargs: Any) -> dict[str, Any]:
    metadata = _orbax_metadata(*args, **kwargs)
    metadata["codecs"][0]["configuration"]["codecs"].append({"name": "crc32c"})
    return metadata


tensorstore_utils._build_zarr3_metadata = _with_checksums


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Which updates are saved and which checkpoints stay: those of any of the rules.

    Attributes:
      every: updates between two saves.
      minutes: after which a checkpoint is made that the next one replaces, if no other rule asks for it; 0 for never.
      keep: how many of the last stay.
      keep_every: the checkpoint of every such update is made and stays; 0 for none.
      merge_every: updates between checkpoints that are made for an average of weights, in the last `merge_last * merge_every` of a run.
      merge_last: how many of these stay; 0 for none. The published trainer: five, 500 apart.
      best: metric of a validation by which the best stays; "" for none.
    """

    every: int
    keep: int
    keep_every: int = 0
    merge_every: int = 500
    merge_last: int = 0
    best: str = ""
    minutes: float = 0.0

    def __post_init__(self):
        if self.minutes < 0 or self.every < 1 or self.keep < 1 or self.keep_every < 0 or self.merge_last < 0 or self.merge_every < 1:
            raise UserError(
                f"config.checkpoint: every={self.every}, keep={self.keep} and merge_every={self.merge_every} must be at least 1, "
                f"keep_every={self.keep_every}, merge_last={self.merge_last} and minutes={self.minutes:g} at least 0"
            )

    def due(self, step: int, total: int) -> bool:
        """Whether the state after update `step` of `total` is to be saved."""
        merging = step > total - self.merge_last * self.merge_every and step % self.merge_every == 0
        return step == total or step % self.every == 0 or merging or bool(self.keep_every and step % self.keep_every == 0)


@dataclasses.dataclass(frozen=True)
class _Multiples:
    """An Orbax preservation policy: of the checkpoints at multiples of `every` the `last`, or all. Its EveryNSteps keeps step 0 too."""

    every: int
    last: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        steps = [found.step for found in checkpoints if found.step and found.step % self.every == 0]
        kept = steps if self.last is None else steps[-self.last :]
        return [found.step in kept for found in checkpoints]


@dataclasses.dataclass(frozen=True)
class _Steps:
    """An Orbax preservation policy: the checkpoints of these steps."""

    steps: Sequence[int]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        return [found.step in self.steps for found in checkpoints]


def open_checkpoints(folder: epath.PathLike, config: CheckpointConfig, always: Sequence[int] = ()) -> ocp.training.Checkpointer:
    """The checkpoints in `folder` (made if absent), of which those stay that `config` names, and those of the steps `always`.

    Remains of a killed save are removed.
    """
    if (folder := absolute(folder)).exists():
        check_descriptions(folder)
    policies = ocp.training.preservation_policies
    # Of saves by minutes the newest stays, until the next save.
    latest = [policies.LatestN(1), _Multiples(config.every, config.keep)] if config.minutes else [policies.LatestN(config.keep)]
    kept = [*latest, _Steps(always)]
    if config.keep_every:
        kept.append(_Multiples(config.keep_every))
    if config.merge_last:
        kept.append(_Multiples(config.merge_every, config.merge_last))
    if config.best:
        kept.append(policies.BestN(get_metric_fn=lambda metrics: metrics[SCORE], n=1, keep_checkpoints_without_metrics=False))
    context = ocp.Context()
    context.array.saving.use_compression = False  # trained weights and moments shrink by a tenth, and reading them takes twice as long
    context.array.saving.scoped_storage_options_creator = _storage_options
    # Replicas share the writing of an array only where each of them writes as much as a chunk.
    context.array.saving.min_slice_bytes_for_replica_parallel = chunks.LEAST_BYTES
    mesh = sharding.mesh_in_use()
    if mesh is not None and mesh.shape["data"] > 1:  # one replica reads and gives to the others, over the faster network
        context.array.loading.use_load_and_broadcast = True
        context.array.loading.load_and_broadcast_options.replica_axis_index = sharding.AXES.index("data")
    return ocp.training.Checkpointer(
        folder,
        context=context,
        preservation_policy=policies.AnyPreservationPolicy(kept),
        cleanup_tmp_directories=True,
    )


def _storage_options(keypath: Any, value: jax.Array) -> ocp.options.ArrayOptions.Saving.StorageOptions:
    del keypath
    cut = value.ndim and chunks.is_cut(value.sharding.shard_shape(value.shape))
    return ocp.options.ArrayOptions.Saving.StorageOptions(shard_axes=(0,) if cut else ())


def stored_shapes(flat: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> dict[str, tuple[int, ...]]:
    """The shape in which each array of a flattened tree is stored (see `chunks`)."""
    return {name: _stored_shape(name, leaf) for name, leaf in flat.items()}


def _stored_shape(name: str, leaf: jax.Array | jax.ShapeDtypeStruct) -> tuple[int, ...]:
    if not leaf.ndim:
        return ()
    share = leaf.sharding.shard_shape(leaf.shape)
    replicas = leaf.sharding.num_devices * math.prod(share) // math.prod(leaf.shape)
    rows = chunks.chunk_rows(leaf.shape, share, stacked="layers" in name.split("/"), replicas=replicas)
    return chunks.stored_shape(leaf.shape, rows)


HIGHER_IS_BETTER = ("/accuracy", "/spearman")  # in the names of metrics; every other one of a validation is a loss


def score(name: str, found: Mapping[str, float]) -> dict[str, float] | None:
    """What a checkpoint is ranked by: the metric `name`, negated if it is a loss, so that higher is better; None without name or metrics.

    Raises:
      ValueError: there is no such metric.
    """
    if not name or not found:
        return None
    if name not in found:
        offered = difflib.get_close_matches(name, found, n=3) or ["validation/accuracy", "validation/loss"]
        raise UserError(f"config.checkpoint.best={name!r} is no metric of a validation; take for example {', '.join(offered)}")
    return {SCORE: found[name] if any(part in name for part in HIGHER_IS_BETTER) else -found[name]}


def save(
    checkpoints: ocp.training.Checkpointer, step: int, state: TrainState, metadata: dict[str, Any], metrics: dict[str, float] | None = None
) -> None:
    """Starts saving `state`, with its `score`; its arrays are copied off the device before this returns and may be donated then.

    Raises:
      DivergedError: a parameter or moment is not finite; nothing is saved.
    """
    if not _all_finite((state.params, state.opt_state, state.projections)):
        kept = f"checkpoint {checkpoints.latest.step} is unharmed" if checkpoints.latest else "there is no checkpoint"
        raise DivergedError(f"after update {step} a parameter is not finite, so it is not saved; {kept}: resume with a lower learning rate")
    trees = _trees(state)
    trees = {part: chunks.reshaped(tree, stored_shapes(tree)) for part, tree in trees.items()}
    checkpoints.save_checkpointables_async(step, trees, force=True, custom_metadata=seal(metadata), metrics=metrics)


@jax.jit
def _all_finite(tree: Any) -> Bool[Array, ""]:
    # Not by the largest magnitude, which a CPU finds four times as fast: its vectorised maximum loses some NaN.
    return jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def recorded(checkpoints: ocp.training.Checkpointer, step: int) -> dict[str, Any]:
    """What the run handed on with the checkpoint of `step`.

    Raises:
      UserError: there is no such checkpoint, or its metadata is damaged.
    """
    steps = [found.step for found in checkpoints.checkpoints]
    if step not in steps:
        raise UserError(f"{checkpoints.directory} holds no complete checkpoint of step {step}; there are: {steps or 'none'}")
    return read_metadata(checkpoints, step)


def check_same_model(checkpoints: ocp.training.Checkpointer, metadata: Mapping[str, Any], model: DecoderConfig) -> None:
    """Raises a UserError if the checkpoint with this metadata is of a model of another shape; a field not recorded has its default."""
    defaults = {field.name: field.default for field in dataclasses.fields(model) if field.default is not dataclasses.MISSING}
    asked, saved = plain(dataclasses.asdict(model)), defaults | metadata["decoder"]
    if different := [f"{name} {saved[name]} and not {asked[name]}" for name in asked if name in saved and saved[name] != asked[name]]:
        raise UserError(
            f"{checkpoints.directory} holds a run of another model than this configuration's ({', '.join(different)}); "
            "use another --workdir, or pass the size or init that it was started with"
        )


def drop_after(checkpoints: ocp.training.Checkpointer, step: int) -> None:
    """Deletes the checkpoints of later steps."""
    for found in list(checkpoints.checkpoints):
        if found.step > step:
            checkpoints.delete(found.step)


def restore(checkpoints: ocp.training.Checkpointer, step: int, abstract: TrainState) -> TrainState:
    """The state saved at `step`, placed as `abstract` (shapes, dtypes, shardings) says.

    Raises:
      UserError: the checkpoint is of another model or optimizer, or damaged; the message names an older one that is not.
    """
    targets = _trees(abstract)
    try:
        loaded = load_arrays(checkpoints, step, targets)
    except UserError:
        raise
    except Exception as error:  # Orbax and tensorstore have a class for each way in which a file can be wrong
        workdir = epath.Path(checkpoints.directory).parent
        if problem := checkpoint_damage(workdir / "checkpoints" / str(step)):
            good = good_steps(workdir, step)
            remedy = f"resume from the one of step {good[0]} with --resume_from {good[0]}" if good else "no older one is undamaged"
            raise UserError(f"{workdir}/checkpoints/{step} is damaged ({problem}); {remedy}") from error
        raise
    return TrainState(
        step=_like(abstract.step, step),
        params=unflatten(abstract.params, loaded["params"]),
        opt_state=unflatten(abstract.opt_state, loaded["optimizer"]),
        projections=unflatten(abstract.projections, loaded.get(PROJECTIONS, {})),
    )


def _trees(state: TrainState) -> dict[str, dict[str, Any]]:
    """The arrays of a state as a checkpoint holds them. Readers of the model open `params` alone."""
    trees = {"params": flatten(state.params), "optimizer": flatten(state.opt_state)}
    return trees | {PROJECTIONS: flatten(state.projections)} if state.projections else trees


def _like(abstract: Any, value: int) -> jax.Array:
    return jax.device_put(jnp.asarray(value, abstract.dtype), abstract.sharding)
