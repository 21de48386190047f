"""The devices and hosts that a command computes on: every device of a host holds a part of the model, and hosts deal the texts out.

No collective crosses hosts but the barriers of `all_here`, so hosts need a common folder and no fast network.
"""

import jax
from jax.experimental import multihost_utils

from f2llm_jax import sharding


def local_mesh() -> jax.sharding.Mesh | None:
    """This host's devices, with parameters split over all of them; None for a single device."""
    devices = jax.local_devices()
    return sharding.make_mesh(devices=devices) if len(devices) > 1 else None


def is_first() -> bool:
    """Whether this is the process that writes what there is one of."""
    return jax.process_index() == 0


def is_mine(digest: bytes) -> bool:
    """Whether the text of this digest is this process's to encode: each has its share, whatever another has found done."""
    return int.from_bytes(digest[:8], "little") % jax.process_count() == jax.process_index()


def all_here(name: str) -> None:
    """Returns when every process has called this."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"f2llm_jax: {name}")
