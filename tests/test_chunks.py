"""How checkpoints are cut into chunks: every size on its slice from abstract shapes, and a vocabulary with few divisors for real."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
import tiny
from jax.sharding import AbstractMesh, AxisType
from orbax.checkpoint._src.arrays.subchunking import choose_chunk_shape

from configs import common
from f2llm_jax import convert, merge, sharding
from f2llm_jax.model.decoder import abstract_decoder, init_decoder
from f2llm_jax.model.sizes import SIZES
from f2llm_jax.training import checkpoint
from f2llm_jax.training.step import TrainState
from f2llm_jax.weights import chunks
from f2llm_jax.weights.checkpoint_reader import array_spec, find_checkpoint, flatten
from f2llm_jax.weights.hf_mapping import EMBEDDING, TABLE
from f2llm_jax.weights.models import find_model

MIB = 2**20
VOCABULARY = 151_669  # 7 x 47 x 461
# By size: chunks of parameters and moments; MiB of the smallest, where a device has a MiB of the array; rows in a chunk of the table.
GOLDEN = {
    "80m": (399, 1.25, 37984),  # 3,648,864 when Orbax cut every first axis into single indices
    "160m": (615, 1.41, 18992),  # 3,650,760
    "330m": (2127, 1.09, 9496),  # 3,652,032
    "0.6b": (4431, 1.0, 9496),  # 3,656,928
    "1.7b": (9615, 1.0, 4748),  # 3,662,688 with fsdp = 8
    "4b": (11343, 1.88, 4748),  # 7,340,352
    "8b": (15183, 1.0, 2374),  # 7,344,960
    "14b": (16527, 1.25, 2374),  # 7,352,448
}


def written(leaf, stored):
    """Shapes of a stored array's chunks by Orbax's own rules, from the part that a device writes, its replicas taken into account."""
    share = leaf.sharding.shard_shape(leaf.shape)
    share = share if len(stored) == len(share) else (stored[0], stored[1], *share[1:])
    replicas = leaf.sharding.mesh.size * math.prod(share) // math.prod(stored)
    axis = next((a for a, size in enumerate(share) if size % replicas == 0), None)
    part = share
    if replicas > 1 and axis is not None and 4 * math.prod(share) // replicas >= MIB:
        part = tuple(size // replicas if a == axis else size for a, size in enumerate(share))
    axes = (0,) if chunks.is_cut(share) else ()
    return share, choose_chunk_shape(stored, part, np.dtype(np.float32), None, shard_axes=axes)


@pytest.mark.parametrize("size", common.SLICE)
def test_chunks_of_every_size_on_its_slice(size):
    devices = math.prod(map(int, common.SLICE[size].partition(":")[2].split("x")))
    fsdp = common.FSDP.get(size, devices)
    mesh = AbstractMesh((devices // fsdp, fsdp, 1), sharding.AXES, axis_types=(AxisType.Explicit,) * 3)
    flat = flatten(abstract_decoder(SIZES[size], mesh)[1])
    stored = checkpoint.stored_shapes(flat)
    count, smallest, rows = 0, math.inf, 0
    for name, leaf in flat.items():
        share, chunk = written(leaf, stored[name])
        count += 3 * math.prod(whole // part for whole, part in zip(stored[name], chunk, strict=True))
        size_of = 4 * math.prod(chunk)
        assert size_of >= min(MIB, 4 * math.prod(share)), (name, chunk)
        if 4 * math.prod(share) >= MIB:
            smallest = min(smallest, size_of)
        # What a release decodes at once: the chunks of all devices that hold the same layers or rows.
        slab = 4 * math.prod(stored[name][1:] if chunks.is_cut(share) else stored[name])
        assert slab <= max(chunks.SLAB_BYTES, 4 * math.prod(leaf.shape[1:])), name
        if name == "embedding":
            rows = stored[name][1]
    assert (count, round(smallest / MIB, 2), rows) == GOLDEN[size]


@pytest.mark.parametrize(("rows", "width", "devices"), list(itertools.product([VOCABULARY, 151_673, 151_936, 64, 1], [320, 5120], [1, 16])))
def test_any_number_of_rows(rows, width, devices):
    """151,673 is prime: its table is one chunk a device, and no row is a chunk of its own."""
    found = chunks.chunk_rows((rows, width), (rows, width // devices), stacked=False)
    assert rows % found == 0
    assert found * (width // devices) * 4 >= MIB or found == rows
    assert rows == 151_673 or found * width * 4 <= chunks.SLAB_BYTES or found * (width // devices) * 4 < 2 * MIB


CONFIG = dataclasses.replace(tiny.CONFIG, vocab_size=VOCABULARY, hidden_size=128)  # a table of 74 MiB


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run's workdir with two checkpoints, saved on 8 devices: replicas, fsdp and tensor."""
    folder = tmp_path_factory.mktemp("chunks")
    mesh = sharding.make_mesh(2, 2, 2)
    params = init_decoder(CONFIG, 0, mesh)
    state = TrainState(jnp.int32(0), params, {"count": jnp.int32(3), "mu": jax.tree.map(lambda x: 2 * x, params)})
    model = tiny.origin(folder / "tokenizer", CONFIG)
    model.tokenizer.save(folder / "run" / "tokenizer")
    metadata = {
        "decoder": dataclasses.asdict(CONFIG),
        "matryoshka_dims": [16, 64],
        "tokenizer_fingerprint": model.tokenizer.fingerprint,
        "max_length": 96,
    }
    with checkpoint.open_checkpoints(folder / "run/checkpoints", checkpoint.CheckpointConfig(every=1, keep=2)) as checkpoints:
        checkpoint.save(checkpoints, 1, state, metadata)
        checkpoint.save(checkpoints, 2, jax.tree.map(lambda x: x + 1, state), metadata)
    return folder / "run", state


def test_what_is_stored_is_what_the_table_above_counts(workdir):
    folder, state = workdir
    for prefix, part in (("", "params"), ("mu/", "optimizer")):
        for name, leaf in flatten(state.params).items():
            spec = array_spec(folder / f"checkpoints/1/{part}", EMBEDDING)
            spec["kvstore"]["path"] = f"{prefix}{name}/"
            stored = ts.open(spec).result()
            assert stored.shape == checkpoint.stored_shapes({name: leaf})[name]
            assert stored.chunk_layout.read_chunk.shape == written(leaf, stored.shape)[1], name
            assert name != "embedding" or stored.shape == (7, VOCABULARY // 7, 128)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1), (8, 1, 1)])
def test_resumed_on_another_mesh(workdir, shape):
    folder, state = workdir
    mesh = sharding.make_mesh(*shape)
    _, params = abstract_decoder(CONFIG, mesh)
    everywhere = jax.ShapeDtypeStruct((), jnp.int32, sharding=jax.NamedSharding(mesh, sharding.P()))
    abstract = TrainState(everywhere, params, {"count": everywhere, "mu": params})
    with checkpoint.open_checkpoints(folder / "checkpoints", checkpoint.CheckpointConfig(every=1, keep=2)) as checkpoints:
        back = checkpoint.restore(checkpoints, 1, abstract)
    for want, got, like in zip(*map(jax.tree.leaves, (state.params, back.params, params)), strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.sharding == like.sharding
    np.testing.assert_array_equal(flatten(back.opt_state)["mu/embedding"], 2 * np.asarray(flatten(state.params)["embedding"]))


def test_the_checkpoint_of_another_vocabulary_is_refused(workdir):
    folder, _ = workdir
    mesh = sharding.make_mesh(1, 8, 1)
    _, params = abstract_decoder(dataclasses.replace(CONFIG, vocab_size=VOCABULARY - 7), mesh)
    with (
        checkpoint.open_checkpoints(folder / "checkpoints", checkpoint.CheckpointConfig(every=1, keep=2)) as checkpoints,
        pytest.raises(ValueError, match="params/embedding: stored"),
    ):
        checkpoint.restore(checkpoints, 1, TrainState(params["norm"], params, {"count": params["norm"], "mu": params}))


def test_released_and_merged(workdir, tmp_path):
    folder, state = workdir
    whole = {name: np.asarray(leaf) for name, leaf in flatten(state.params).items()}
    with find_checkpoint(folder / "checkpoints/1").open_params() as parameters:
        for entry in TABLE:
            name, rows = "/".join(entry.path), parameters.unit(entry)
            for start, stop in ((0, len(whole[name])), (rows // 2, rows // 2 + 2), (max(0, rows - 1), rows + 1)):
                np.testing.assert_array_equal(parameters.read(entry, start, min(stop, len(whole[name]))), whole[name][start:stop])
    assert convert.main(["to-hf", str(folder / "checkpoints/1"), str(tmp_path / "model"), "--no-golden"]) == 0
    assert convert.main(["from-hf", str(tmp_path / "model"), str(tmp_path / "again")]) == 0
    for found in (tmp_path / "model", tmp_path / "again"):
        for got, want in zip(jax.tree.leaves(find_model(str(found)).load(None)), jax.tree.leaves(state.params), strict=True):
            np.testing.assert_array_equal(got, want)
    inputs = [str(folder / f"checkpoints/{step}") for step in (1, 2)]
    assert merge.main([*inputs, "--out", str(tmp_path / "merged"), "--no-golden"]) == 0
    merged = flatten(find_model(str(tmp_path / "merged")).load(None))
    np.testing.assert_allclose(merged["embedding"], whole["embedding"] + np.float32(0.5), rtol=1e-6)


def test_a_checkpoint_from_before_is_read(tmp_path, monkeypatch):
    """Every parameter stored in its own shape."""
    mesh = sharding.make_mesh(1, 8, 1)
    params = init_decoder(tiny.CONFIG, 0, mesh)
    monkeypatch.setattr(chunks, "stored_shape", lambda shape, rows: shape)
    with checkpoint.open_checkpoints(tmp_path / "checkpoints", checkpoint.CheckpointConfig(every=1, keep=1)) as checkpoints:
        checkpoint.save(
            checkpoints, 1, TrainState(jnp.int32(0), params, {"count": jnp.int32(3)}), {"decoder": dataclasses.asdict(tiny.CONFIG)}
        )
    saved = find_checkpoint(tmp_path)
    for got, want in zip(jax.tree.leaves(saved.load(mesh)), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(got, want)
    with saved.open_params() as parameters:
        np.testing.assert_array_equal(parameters.read(EMBEDDING, 7, 90), np.asarray(flatten(params)["embedding"])[7:90])
