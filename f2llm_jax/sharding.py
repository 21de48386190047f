"""The mesh, and every PartitionSpec of the project, named once by dims.

The mesh always has the axes `data`, `fsdp` and `tensor`, size 1 where unused. Rows of tokens and samples are split over
`data` and `fsdp` together; parameters over `fsdp` (gathered at use) and `tensor` (heads and ffn, Megatron style). Under an
explicit mesh a missing collective is a type error, so each one is a visible `shard(...)` call or `out_sharding=`.

Without a mesh in context `shard` is the identity and `spec` is None: the same model code runs on one device.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from f2llm_jax.batch import Batch
from f2llm_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes over which rows and samples are split

# Parameters: V vocab, Z rank of the table, D model, H query heads, K key/value heads, E head dim, F ffn, W teacher width.
# A leading L is never split.
# A layer's weights all have D first, also those that project back to it: where one is split finely by its last dim, XLA for TPUs
# sums its gradient whole instead of scattering it.
PARAMETER_SPECS = {
    "VD": P(None, ("fsdp", "tensor")),
    "VZ": P(None, ("fsdp", "tensor")),
    "ZD": P(None, ("fsdp", "tensor")),
    "DHE": P("fsdp", "tensor", None),
    "DKE": P("fsdp", "tensor", None),
    "DF": P("fsdp", "tensor"),
    "DW": P("fsdp", None),
    "D": P(None),
    "E": P(None),
}
# The same parameters as a layer multiplies with them: gathered over fsdp, still split over tensor (the table of tokens is never
# gathered: its rows are fetched). "Reduced" over an axis means that every device there multiplies it with other positions; its
# gradient then is a sum that is still to be taken (see `unreduced`).
GATHERED_SPECS = {
    "ZD": P(None, None, reduced=set(BATCH)),
    "DHE": P(None, "tensor", None, reduced=set(BATCH)),
    "DKE": P(None, "tensor", None, reduced=set(BATCH)),
    "DF": P(None, "tensor", reduced=set(BATCH)),
    "D": P(None, reduced=set(BATCH)),
    "E": P(None, reduced=set(AXES)),  # of heads, which are split over tensor
}
# Activations: R rows of T tokens, P = R * T positions; B samples.
ROWS_T = P(BATCH, None)
ROWS_TD = P(BATCH, None, None)
ROWS_HTE = P(BATCH, "tensor", None, None)
HEADS_PE = P("tensor", BATCH, None)
HEADS_RTE = P("tensor", BATCH, None, None)
POSITIONS = P(BATCH)
POSITIONS_D = P(BATCH, None)
POSITIONS_F = P(BATCH, "tensor")
TABLE_IDS = P("data")  # ids of all positions that meet one copy of the embedding table
TABLE_ROWS = P("data", ("fsdp", "tensor"))  # their rows, still in columns as the table is
TABLE_ROWS_GATHERED = P("data", "fsdp")  # the same gathered over tensor; what is left is one all-to-all
CHUNKS_RT = P(None, BATCH, None)  # a batch on its way in: chunks, rows of a chunk, positions
SAMPLES_D = P(BATCH, None)


class MeshError(UserError):
    """The devices do not make this mesh, or it does not divide a parameter; the message names the remedy."""


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """An explicit `(data, fsdp, tensor)` mesh over `devices` (all by default); one size may be -1 and is filled in.

    Where the devices are in several slices, `data` goes across them: the one sum of gradients a step is all that leaves a slice.

    Raises:
      MeshError: more than one -1, the sizes do not multiply to the number of devices, or `data` to that of slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1:
        raise MeshError(f"mesh sizes (data, fsdp, tensor) = {tuple(sizes)}: at most one may be -1; set the others")
    if -1 in sizes:
        given = math.prod(s for s in sizes if s != -1)
        if len(devices) % given:
            raise MeshError(
                f"mesh sizes (data, fsdp, tensor) = {tuple(sizes)} need a multiple of {given} devices, here are {len(devices)}; "
                "lower fsdp or tensor"
            )
        sizes[sizes.index(-1)] = len(devices) // given
    if math.prod(sizes) != len(devices):
        raise MeshError(
            f"mesh sizes (data, fsdp, tensor) = {(data, fsdp, tensor)} do not fill {len(devices)} devices; set one of them to -1"
        )
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if sizes[0] % slices:
        raise MeshError(f"the devices are in {slices} slices, over which mesh size data={data} cannot be split; set it to {slices}")
    if slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)  # a mesh of 4 x 16 on 8 x 8 chips, say
    else:
        inside, across = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Explicit,) * len(AXES))


def mesh_in_use() -> jax.sharding.AbstractMesh | None:
    """The mesh that is set, without its devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def in_mesh() -> bool:
    """Whether a mesh is set, i.e. whether specs mean something."""
    return mesh_in_use() is not None


def spec(value: P) -> P | None:
    """`value` for an `out_sharding=` argument; None without a mesh."""
    return value if in_mesh() else None


def shard(x: jax.Array, value: P) -> jax.Array:
    """Moves `x` to the sharding `value`: a collective if it differs from what `x` has. Identity without a mesh."""
    return jax.sharding.reshard(x, value) if in_mesh() else x


def unreduced(params: Any) -> Any:
    """The same parameters, such that gradients with respect to them stay unsummed over `data`: `reduce_over_data` sums them, once."""
    return _each(params, lambda value: P(*value.partitions, reduced={"data"}))


def zero_gradients(params: Any) -> Any:
    """Zeros in float32 of the type that the gradients of these parameters have, `unreduced` ones or as a layer multiplies with them."""

    def zeros(x: Any) -> jax.Array:
        place = P(*_spec(x).partitions, unreduced=_spec(x).reduced) if in_mesh() else None
        return jnp.zeros(x.shape, jnp.float32, out_sharding=place)

    return jax.tree.map(zeros, params)


def scatter_gradients(gradients: Any, params: Any, dtype: jnp.dtype) -> Any:
    """Gradients of gathered parameters as those of `params`, which are `unreduced`; they travel over `fsdp` in `dtype`."""
    mesh = mesh_in_use()
    if mesh is None:
        return gradients

    def scatter(gradient: jax.Array, parameter: Any) -> jax.Array:
        there = gradient.astype(dtype) if mesh.shape["fsdp"] > 1 else gradient
        place = P(*_spec(parameter).partitions, unreduced=_spec(parameter).reduced)
        return gradient if _spec(gradient) == place else jax.sharding.reshard(there, place).astype(gradient.dtype)

    return jax.tree.map(scatter, gradients, params)


def reduce_over_data(gradients: Any) -> Any:
    """The gradients that `unreduced` parameters got, summed over `data`. Over `fsdp` they are scattered already."""
    return _each(gradients, lambda value: P(*value.partitions))


def _each(tree: Any, change: Callable[[P], P]) -> Any:
    if not in_mesh():
        return tree
    return jax.tree.map(lambda x: jax.sharding.reshard(x, change(_spec(x))), tree)


def _spec(x: Any) -> P:
    """Of an array that is traced, or of its shape."""
    return x.sharding.spec if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x).sharding.spec


def stacked(value: P) -> P:
    """The spec of L such parameters stacked on a new leading axis."""
    return P(None, *value)


def batch_shards(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None) -> int:
    """The number of parts that rows and samples are split into."""
    return 1 if mesh is None else math.prod(mesh.shape[a] for a in BATCH)


def local_part(count: int, mesh: jax.sharding.Mesh | None) -> np.ndarray:
    """bool `[count]`: which of `count` rows or samples, split over `BATCH`, live on this process's devices."""
    mine = np.ones(count, bool)
    if mesh is not None:
        mine[:] = False
        for index in NamedSharding(mesh, P(BATCH)).addressable_devices_indices_map((count,)).values():
            mine[index or ()] = True
    return mine


def to_global(array: np.ndarray, mesh: jax.sharding.Mesh, value: P) -> jax.Array:
    """A global array from a host array of its full shape, of which only this process's part needs to be filled in."""
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, value), lambda index: array[index])


def batch_specs(batch: Batch) -> Batch:
    """The spec of each array of a batch: rows of each chunk, and samples, are split over `BATCH`."""
    of_samples = jax.tree.map(lambda x: P(BATCH, *[None] * (x.ndim - 1)) if x.ndim else P(), (batch.samples, batch.teacher))
    texts = jax.tree.map(lambda x: CHUNKS_RT if x.ndim else P(), batch.texts)
    return Batch(texts, *of_samples)


def batch_to_devices(batch: Batch, mesh: jax.sharding.Mesh | None) -> Batch:
    """A host batch as global arrays."""
    if mesh is None:
        return jax.device_put(batch)
    batch = jax.tree.map(np.asarray, batch)
    return jax.tree.map(lambda array, spec: to_global(array, mesh, spec), batch, batch_specs(batch))
