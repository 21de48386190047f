"""Meshes, and where every parameter of every size lives on one: a file to read, so that a change shows as a diff.

`python tests/test_parameter_specs.py` writes it anew.
"""

import pathlib

import jax
import pytest

from f2llm_jax import sharding
from f2llm_jax.model.decoder import abstract_decoder
from f2llm_jax.model.sizes import SIZES
from f2llm_jax.weights.checkpoint_reader import flatten

FILE = pathlib.Path(__file__).parent / "fixtures" / "parameter_specs.txt"


def lines():
    """`size path shape spec`, one parameter a line; layers are stacked. On a mesh that divides all sizes: names are all that counts."""
    mesh = sharding.make_mesh(8, 1, 1)
    for size, config in SIZES.items():
        for path, leaf in sorted(flatten(abstract_decoder(config, mesh)[1]).items()):
            spec = ", ".join("-" if axes is None else "+".join([axes] if isinstance(axes, str) else axes) for axes in leaf.sharding.spec)
            yield f"{size:<10}{path:<26}{' x '.join(map(str, leaf.shape)):<24}{spec}"


def test_specs_are_those_written_down():
    assert list(lines()) == FILE.read_text().splitlines()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((-1, -1, 1), "at most one may be -1; set the others"),
        ((-1, 3, 1), "need a multiple of 3 devices, here are 8; lower fsdp or tensor"),
        ((3, 1, 1), "do not fill 8 devices; set one of them to -1"),
    ],
)
def test_a_mesh_that_the_devices_do_not_make_is_refused(sizes, message):
    with pytest.raises(sharding.MeshError, match=message):
        sharding.make_mesh(*sizes)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    FILE.write_text("".join(f"{line}\n" for line in lines()))
