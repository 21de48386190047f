"""How a parameter is cut into the chunks that a checkpoint stores, from its shape and from each device's share of it.

A chunk is the least that can be read. It spans `chunk_rows` indices of the first axis (layers of a stacked parameter, rows of the
embedding table) and the whole of a device's share along the others, so a device writes and restores whole chunks, and a reader on a
host can take a parameter a few layers or rows at a time.

Orbax cuts an axis into single indices or not at all. Where a chunk spans several indices but not all, the parameter is stored with its
first axis in two, `[n, ...]` as `[n / rows, rows, ...]`, so the stored shape says how it was cut. Older checkpoints store every shape as
it is.
"""

import math
from collections.abc import Mapping

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

Shape = tuple[int, ...]

LEAST_BYTES = 2**20  # of a chunk, unless the share is smaller: object stores and file systems pay by the chunk
SLAB_BYTES = 2**26  # at most, of the chunks of all devices that hold the same rows of the embedding table: what a reader decodes at once
ITEM_BYTES = 4  # float32, as all parameters and moments are


def chunk_rows(shape: Shape, share: Shape, *, stacked: bool, replicas: int = 1) -> int:
    """The number of first-axis indices in a chunk, a divisor of `shape[0]` (Orbax stores equal chunks).

    A layer is a chunk of its own unless that is less than `LEAST_BYTES`. Rows of a table come in chunks of up to `SLAB_BYTES` over all
    devices. A number of rows without a fitting divisor leaves each share whole.

    Args:
      shape: of the parameter, at least one axis.
      share: of one device; its first axis is whole.
      stacked: whether the first axis is that of layers.
      replicas: devices that hold the same share. They share the writing, by the first axis that they divide.
    """
    rows, row_bytes = shape[0], ITEM_BYTES * math.prod(share[1:])

    def chunk_bytes(n: int) -> int:
        return n * row_bytes if rows // n % replicas == 0 else n * row_bytes // replicas

    wanted = 1 if stacked else max(1, SLAB_BYTES // max(1, ITEM_BYTES * math.prod(shape[1:])))
    possible = [n for n in range(1, rows + 1) if rows % n == 0 and (chunk_bytes(n) >= LEAST_BYTES or n == rows)]
    return max((n for n in possible if n <= wanted), default=possible[0])


def stored_shape(shape: Shape, rows: int) -> Shape:
    """The shape in which a parameter is stored whose chunks span `rows` of its first axis."""
    return shape if rows in (1, shape[0]) else (shape[0] // rows, rows, *shape[1:])


def whole_shape(stored: Shape, rank: int) -> Shape:
    """The shape of a parameter of `rank` axes, from the shape in which it is stored."""
    return stored if len(stored) != rank + 1 else (stored[0] * stored[1], *stored[2:])


def is_cut(share: Shape) -> bool:
    """Whether an array, in the shape in which it is stored, has a chunk for each index of its first axis; else each share is a chunk."""
    return ITEM_BYTES * math.prod(share[1:]) >= LEAST_BYTES


def with_shape(leaf: jax.ShapeDtypeStruct, shape: Shape) -> jax.ShapeDtypeStruct:
    """`leaf` with its first axis in two or whole again, on the devices as it is."""
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding) and len(shape) != leaf.ndim:
        spec = (*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec)))
        sharding = NamedSharding(sharding.mesh, P(None, *spec) if len(shape) > leaf.ndim else P(*spec[1:]))
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)


def reshaped(arrays: Mapping[str, jax.Array], shapes: Mapping[str, Shape], donate: bool = False) -> dict[str, jax.Array]:
    """The arrays with their first axes in two or whole again; no data moves between devices. Donated arrays are no more afterwards."""
    return {name: array if array.shape == shapes[name] else _reshape(array, shapes[name], donate) for name, array in arrays.items()}


def _reshape(array: jax.Array, shape: Shape, donate: bool) -> jax.Array:
    like = with_shape(jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), shape)
    return (_donating_program if donate else _program)(array, shape, like.sharding)


def _reshape_on_device(array: jax.Array, shape: Shape, sharding: jax.sharding.Sharding) -> jax.Array:
    return array.reshape(shape, out_sharding=sharding if isinstance(sharding, NamedSharding) else None)


_program = jax.jit(_reshape_on_device, static_argnums=(1, 2))
_donating_program = jax.jit(_reshape_on_device, static_argnums=(1, 2), donate_argnums=0)
