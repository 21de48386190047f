"""Slices of TPUs by name, and what their chips can do. Nothing here needs a TPU: libtpu describes them and compiles for them."""

import dataclasses
import os

import jax
from jax.experimental import topologies

from f2llm_jax.errors import UserError
from f2llm_jax.model.flops import PEAK_FLOPS

GIB = 2**30
# Away from a TPU libtpu asks a cloud's metadata server who we are, warns of missing settings, and locks a device that does not exist.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


AXIS_BANDWIDTH = 200e9  # bytes/s; the slower slices get half of it


class TopologyError(UserError):
    """There is no such slice, or no compiler for it; the message names the remedy."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device has (vendor's data sheets; of TPU7x a device is half a chip)."""

    kind: str  # JAX's name of it
    hbm: float  # bytes of memory; the compiler keeps a little of it for itself
    hbm_bandwidth: float  # bytes/s to and from it
    ici_bandwidth: float  # bytes/s that it receives from its neighbours at most, all links together
    dcn_bandwidth: float  # bytes/s that it receives from other slices: its share of its host's network
    clock: float  # Hz: the bfloat16 peak over the operations of a cycle of all matrix units (of TPU7x assumed, it is not published)

    @property
    def flops(self) -> float:
        """Dense bfloat16 FLOP/s."""
        return PEAK_FLOPS[self.kind]

    @property
    def collective_bandwidth(self) -> float:
        """bytes/s that a device receives in a collective over one axis of a slice, which uses the links of that axis only."""
        return min(self.ici_bandwidth, AXIS_BANDWIDTH)


CHIPS = {
    chip.kind: chip
    for chip in (
        Chip("TPU v5 lite", 16 * GIB, 819e9, 200e9, 3.1e9, 1.5e9),
        Chip("TPU v5", 95 * GIB, 2765e9, 600e9, 6.2e9, 1.75e9),
        Chip("TPU v6 lite", 32 * GIB, 1640e9, 400e9, 12.5e9, 1.75e9),
        Chip("TPU7x", 96 * GIB, 3690e9, 300e9, 6.2e9, 2.2e9),
    )
}


def slice_devices(name: str, slices: int = 1) -> list[jax.Device]:
    """Descriptions of the devices of `slices` slices called `name`, as in "v5p:4x4x4".

    Raises:
      TopologyError: libtpu is missing, or knows no such slice.
    """
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=slices).devices
    except Exception as error:  # libtpu raises what it likes
        if "not installed" in str(error):
            raise TopologyError("compiling for TPUs needs libtpu; install it: pip install -e '.[tpu]'") from error
        reason = str(error).splitlines()[0]
        raise TopologyError(f"there is no slice {name!r}; they are written v5e:2x4, v6e:4x4, v5p:4x4x4, tpu7x:2x2x1 ({reason})") from error
    if devices[0].device_kind not in CHIPS:
        raise TopologyError(f"nothing is known of {devices[0].device_kind!r}; take a slice of {', '.join(CHIPS)}")
    return list(devices)
