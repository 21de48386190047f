"""One flipped bit on one device is seen before anything is saved; equal replicas pass."""

import jax
import numpy as np
import pytest
import tiny

from f2llm_jax import sharding
from f2llm_jax.model.decoder import init_decoder
from f2llm_jax.training.replicas import CorruptionError, check_replicas


def flipped(array, device):
    """The same array, but for the lowest bit of one number on one device."""

    def share(shard):
        data = np.array(shard.data)
        if shard.device == device:
            data.reshape(-1).view(np.uint32)[7] ^= 1
        return jax.device_put(data, shard.device)

    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, [share(shard) for shard in array.addressable_shards])


@pytest.mark.parametrize("shape", [(2, 2, 2), (4, 2, 1), (8, 1, 1)])
def test_a_flipped_bit_is_seen(shape):
    mesh = sharding.make_mesh(*shape)
    params = init_decoder(tiny.CONFIG, 0, mesh)
    with jax.set_mesh(mesh):
        check_replicas(params)
        for name in ("embedding", "norm"):
            leaves, tree = jax.tree.flatten(params)
            names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(params)]
            i = next(i for i, found in enumerate(names) if found.split("/")[0] == name)
            leaves[i] = flipped(leaves[i], mesh.devices.flat[3])
            with pytest.raises(
                CorruptionError, match=rf"1 of {shape[1] * shape[2]} shares of the parameters differ between the {shape[0]}"
            ):
                check_replicas(jax.tree.unflatten(tree, leaves))


def test_one_replica_has_nothing_to_compare_with():
    mesh = sharding.make_mesh(1, 8, 1)
    with jax.set_mesh(mesh):
        check_replicas(init_decoder(tiny.CONFIG, 0, mesh))
    check_replicas(init_decoder(tiny.CONFIG, 0, None))
