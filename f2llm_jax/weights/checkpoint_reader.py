"""The model part of a checkpoint, and the layout in which checkpoints hold trees of arrays.

A tree is stored flat, from a readable path (`layers/query`) to an array, so a checkpoint does not depend on module classes.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from etils import epath
from flax import nnx
from jaxtyping import Float
from orbax.checkpoint import v1 as ocp

from f2llm_jax.errors import UserError
from f2llm_jax.model.decoder import abstract_decoder
from f2llm_jax.model.sizes import DecoderConfig
from f2llm_jax.storage.files import FileError, absolute, is_remote, read_json, unseal
from f2llm_jax.weights import chunks
from f2llm_jax.weights.embedding_config import EmbeddingConfig
from f2llm_jax.weights.hf_mapping import Entry
from f2llm_jax.weights.parameters import Shape, parameter_shapes

PROJECTIONS = "projections"  # of a checkpoint: the maps into the teachers' spaces, by number


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """A complete checkpoint whose weights have not been read yet."""

    step: int  # updates made
    config: DecoderConfig
    embedding: EmbeddingConfig
    run_folder: epath.Path  # the workdir that holds the checkpoint

    @property
    def depths(self) -> tuple[int, ...]:
        """Numbers of layers that it was trained to serve with, ascending."""
        return self.embedding.depths or (self.config.num_hidden_layers,)

    def load(self, mesh: jax.sharding.Mesh | None = None) -> nnx.State:
        """The parameters, fp32, on the mesh or on this machine's first device."""
        abstract = _placed(abstract_decoder(self.config, mesh)[1])
        with ocp.training.Checkpointer(self.run_folder / "checkpoints") as checkpoints:
            loaded = load_arrays(checkpoints, self.step, {"params": flatten(abstract)})
        return unflatten(abstract, loaded["params"])

    @contextlib.contextmanager
    def open_params(self) -> Iterator["StoredParameters"]:
        """The parameters, to be read a block at a time on the host.

        Raises:
          UserError: they do not have the shapes that the metadata names; all are listed at once.
        """
        folder = self.run_folder / "checkpoints" / str(self.step) / "params"
        stored = {entry: _open_array(folder, entry) for entry in parameter_shapes(self.config)}
        wrong = [
            f"{'/'.join(entry.path)} is {list(stored[entry].shape)}, must be {list(shape)}"
            for entry, shape in parameter_shapes(self.config).items()
            if chunks.whole_shape(stored[entry].shape, len(shape)) != shape
        ]
        if wrong:
            raise UserError(f"{folder} is of another architecture than its metadata says:\n  " + "\n  ".join(wrong))
        yield StoredParameters(folder, stored, parameter_shapes(self.config))

    def load_projections(self) -> list[Float[np.ndarray, "D W"]]:
        """The maps into the spaces of the teachers that it was trained with, float32; empty where there was none."""
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        with ocp.training.Checkpointer(self.run_folder / "checkpoints") as checkpoints:
            stored = checkpoints.checkpointables_metadata(self.step).metadata.get(PROJECTIONS) or {}
            shapes = {name: chunks.whole_shape(tuple(leaf.shape), 2) for name, leaf in stored.items()}
            targets = {name: jax.ShapeDtypeStruct(shape, np.float32, sharding=here) for name, shape in shapes.items()}
            loaded = load_arrays(checkpoints, self.step, {PROJECTIONS: targets})[PROJECTIONS] if targets else {}
        return [np.asarray(loaded[name]) for name in sorted(loaded, key=int)]


class StoredParameters:
    """The parameters of an opened checkpoint, decoded as they are asked for."""

    def __init__(self, folder: epath.Path, arrays: dict[Entry, ts.TensorStore], shapes: dict[Entry, Shape]):
        self._folder, self._arrays, self._shapes = folder, arrays, shapes

    def unit(self, entry: Entry) -> int:
        """Layers or rows of a stored chunk, which can only be decoded whole."""
        return int((self._arrays[entry].chunk_layout.read_chunk.shape or (1,))[0] or 1) * self._rows(entry)

    def read(self, entry: Entry, start: int, stop: int) -> Float[np.ndarray, "..."]:
        """Our parameter's `[start:stop]` along its first axis, float32."""
        rows = self._rows(entry)
        first = start // rows
        try:
            block = self._arrays[entry][first : -(-stop // rows)].read().result()
        except (ValueError, OSError) as error:  # what tensorstore raises for a chunk whose CRC-32C differs
            name = "/".join(entry.path)
            raise UserError(f"{self._folder}/{name} is damaged ({str(error).splitlines()[0]}); use another checkpoint") from error
        whole = block.reshape(-1, *self._shapes[entry][1:])
        return whole[start - first * rows : stop - first * rows]

    def _rows(self, entry: Entry) -> int:
        """First-axis indices of the parameter in one of the stored array (see `chunks`)."""
        return self._shapes[entry][0] // self._arrays[entry].shape[0]


def load_arrays(
    checkpoints: ocp.training.Checkpointer, step: int, targets: dict[str, dict[str, jax.ShapeDtypeStruct]]
) -> dict[str, dict[str, jax.Array]]:
    """Flattened trees of a checkpoint by name, in shapes, dtypes and shardings of `targets`.

    Raises:
      UserError: the checkpoint is of another model or optimizer; every difference is listed.
    """
    stored = {found.step: found for found in checkpoints.checkpoints}[step]
    held = checkpoints.checkpointables_metadata(stored).metadata
    shapes = {part: {name: tuple(leaf.shape) for name, leaf in (held.get(part) or {}).items()} for part in targets}
    problems = []
    for part, target in targets.items():
        for name in sorted(shapes[part].keys() | target.keys()):
            here, there = shapes[part].get(name), tuple(target[name].shape) if name in target else None
            if here is None or there is None or chunks.whole_shape(here, len(there)) != there:
                problems.append(f"{part}/{name}: stored {here}, this run has {there}")
    if problems:
        where = f"{checkpoints.directory}/{step}"
        raise UserError(f"{where} does not fit this run; use another --workdir or the run's own config:\n  " + "\n  ".join(problems))
    as_stored = {
        part: {name: chunks.with_shape(leaf, shapes[part][name]) for name, leaf in target.items()} for part, target in targets.items()
    }
    loaded = checkpoints.load_checkpointables(step, as_stored)
    shapes = {part: {name: leaf.shape for name, leaf in target.items()} for part, target in targets.items()}
    return {part: chunks.reshaped(loaded[part], shapes[part], donate=True) for part in targets}


def array_spec(folder: epath.Path, entry: Entry) -> dict[str, Any]:
    """How tensorstore finds a parameter in a checkpoint's `params` folder: as Orbax lays it out, zarr 3 in OCDBT."""
    return {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": file_store(folder), "path": f"{'/'.join(entry.path)}/"}}


def file_store(folder: epath.Path) -> dict[str, str]:
    """A folder as tensorstore wants it; a URL would need every `%`, `?` and `#` of its name quoted."""
    if not is_remote(folder):
        return {"driver": "file", "path": f"{folder}/"}
    bucket, _, path = str(folder).removeprefix("gs://").partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}


def _open_array(folder: epath.Path, entry: Entry) -> ts.TensorStore:
    try:
        return ts.open(array_spec(folder, entry), read=True).result()
    except ValueError as error:
        name = "/".join(entry.path)
        raise UserError(f"{folder} holds no {name}; it is no checkpoint of this project, or an incomplete one ({error})") from error


def find_checkpoint(path: epath.PathLike) -> SavedModel:
    """A workdir's latest checkpoint, or one of its checkpoints (`WORKDIR/checkpoints/STEP`).

    Raises:
      UserError: there is no complete checkpoint at `path`.
    """
    path = absolute(path)
    is_step = path.name.isdigit() and not (path / "checkpoints").exists()  # a workdir may have a number for a name
    folder, step = (path.parent, int(path.name)) if is_step else (path / "checkpoints", None)
    if not folder.exists():
        raise UserError(f"{path} is neither a workdir with checkpoints/ nor a checkpoint (WORKDIR/checkpoints/STEP)")
    check_descriptions(folder)
    with ocp.training.Checkpointer(folder) as checkpoints:
        steps = [m.step for m in checkpoints.checkpoints]
        step = max(steps, default=None) if step is None else step
        if step is None or step not in steps:
            raise UserError(f"{path}: no complete checkpoint{'' if step is None else f' of step {step}'}; there are: {steps or 'none'}")
        stored = read_metadata(checkpoints, step)
    try:
        config, embedding = DecoderConfig(**stored["decoder"]), EmbeddingConfig.from_metadata(stored)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} was not written by this project: its metadata describes no Qwen3 decoder ({error!r})") from error
    return SavedModel(step, config, embedding, folder.parent)


def metadata(config: DecoderConfig, embedding: EmbeddingConfig) -> dict[str, Any]:
    """What a checkpoint carries next to its arrays."""
    return {"decoder": dataclasses.asdict(config), **embedding.to_metadata()}


def check_descriptions(folder: epath.Path) -> None:
    """Orbax reads what every checkpoint of `folder` says of itself before it gives any of them, and fails for one that is damaged.

    Raises:
      UserError: one is; the message names it.
    """
    for file in (path / "_CHECKPOINT_METADATA" for path in folder.iterdir() if path.name.isdigit()):
        try:
            if file.exists():
                read_json(file, kind=dict)
        except FileError as error:
            raise UserError(f"{error}: a damaged checkpoint; delete {file.parent}, and the newest of the others is taken") from error


def read_metadata(checkpoints: ocp.training.Checkpointer, step: int) -> dict[str, Any]:
    """What a run, an import or a pruning said of the checkpoint of `step`.

    Raises:
      UserError: it cannot be read, or has changed since.
    """
    path = epath.Path(checkpoints.directory) / str(step)
    try:
        metadata = checkpoints.checkpointables_metadata(step).custom_metadata
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path}: its metadata cannot be read ({error}); use another checkpoint, or make it anew") from error
    if not isinstance(metadata, dict):
        raise UserError(f"{path} was not written by this project: it has no metadata of its own")
    return unseal(metadata, path / "_CHECKPOINT_METADATA")


def steps_of(workdir: epath.PathLike) -> list[int]:
    """The steps of a workdir's complete checkpoints, ascending.

    Raises:
      UserError: there are none.
    """
    folder = absolute(workdir) / "checkpoints"
    if not folder.exists():
        raise UserError(f"{workdir} is no workdir: it has no checkpoints/")
    check_descriptions(folder)
    with ocp.training.Checkpointer(folder) as checkpoints:
        steps = sorted(m.step for m in checkpoints.checkpoints)
    if not steps:
        raise UserError(f"{workdir} has no complete checkpoint")
    return steps


def _placed(abstract: nnx.State) -> nnx.State:
    """Without a mesh Orbax would ask for the devices of the saving run: say that it is this machine's first."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: x if x.sharding else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)


def _name(path: tuple[Any, ...]) -> str:
    # Parameters are nnx variables, whose own last key ("value") is no news to a reader of the checkpoint.
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves of a tree by path."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(like: Any, flat: dict[str, Any]) -> Any:
    """A tree of the structure of `like` with the leaves of `flat`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: flat[_name(path)], like)
