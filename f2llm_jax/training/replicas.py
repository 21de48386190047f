"""Data replicas hold the same parameters bit for bit. Where they do not, a device has computed something wrong without saying so."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt

from f2llm_jax import sharding
from f2llm_jax.sharding import P


class CorruptionError(RuntimeError):
    """Replicas that differ: not the user's to fix, hence a traceback, and an exit code after which the run is started again."""


def check_replicas(params: Any) -> None:
    """Compares the bits of all data replicas, by a checksum of each device's share; nothing where there is one replica.

    Raises:
      CorruptionError: they differ; what is to be saved must not be.
    """
    mesh = sharding.mesh_in_use()
    if mesh is None or mesh.shape["data"] == 1:
        return
    if wrong := int(_shares_that_differ(params)):
        raise CorruptionError(
            f"{wrong} of {mesh.shape['fsdp'] * mesh.shape['tensor']} shares of the parameters differ between the {mesh.shape['data']} data "
            "replicas: silent data corruption. Nothing was saved; start again from the last checkpoint, on other hosts if it comes back"
        )


@jax.jit
def _shares_that_differ(params: Any) -> jax.Array:
    leaves = jax.tree.leaves(params)
    specs = tuple(P(*jax.typeof(leaf).sharding.spec) for leaf in leaves)

    def compared(*shares: Array) -> Array:
        found = sum((_checksum(share) for share in shares), jnp.uint32(0))
        differs = (jax.lax.pmax(found, "data") != jax.lax.pmin(found, "data")).astype(jnp.int32)
        return jax.lax.psum(differs, ("fsdp", "tensor"))

    return jax.shard_map(compared, in_specs=specs, out_specs=P(), check_vma=False)(*leaves)


def _checksum(share: Array) -> UInt[Array, ""]:
    """Changes with any single bit of a float32 array."""
    return jnp.sum(jax.lax.bitcast_convert_type(share, jnp.uint32), dtype=jnp.uint32)
