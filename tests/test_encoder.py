"""Chunks are memory and nothing else: gradients as without them, one program for any number of them."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from small_batches import CHUNKS, LENGTHS, SHAPES, TEXTS, B, N, encode_chunk, packed

from f2llm_jax import objectives, sharding
from f2llm_jax.batch import PackedTexts
from f2llm_jax.data.packing import RowShape
from f2llm_jax.model.decoder import REMAT_POLICIES, abstract_decoder, init_decoder
from f2llm_jax.model.encoder import encode, value_and_grad
from f2llm_jax.objectives import ContrastiveConfig, Objective, Samples
from f2llm_jax.training.step import by_role

pytestmark = pytest.mark.usefixtures("quick_compilation")
OBJECTIVES = {
    "published": Objective(contrastive=ContrastiveConfig(dims=(8, 64))),
    "no passage gradient": Objective(contrastive=ContrastiveConfig(in_batch_passage_grad="none")),
    "distillation": Objective(distillation_weight=2.0, spread_out_weight=1.0),
}


@pytest.fixture(scope="module")
def params():
    return init_decoder(tiny.CONFIG, 0)


def objective(weights):
    """All objectives added up by traced weights, so that one program serves every one of them."""
    teacher = by_role(jax.random.normal(jax.random.key(3), (TEXTS, 80)), jnp.ones((B, N)))
    sample_mask, negative_mask = jnp.ones(B).at[3].set(0), jnp.ones((B, N)).at[3].set(0).at[1, 1].set(0)
    samples = Samples(sample_mask, negative_mask, jnp.float32(1), jnp.arange(B), B + jnp.arange(B * N).reshape(B, N))

    def loss(embeddings):
        values = [objectives.total(by_role(embeddings, negative_mask), samples, o, teacher)[0] for o in OBJECTIVES.values()]
        return jnp.vdot(weights, jnp.stack(values)), embeddings

    return loss


@pytest.fixture(scope="module")
def in_chunks():
    return jax.jit(lambda params, texts, weights: value_and_grad(objective(weights), encode_chunk(), params, texts, TEXTS))


@pytest.fixture(scope="module")
def plain():
    """The same by nothing but automatic differentiation through all rows together."""

    def loss(params, texts, weights):
        rows = (a.reshape(-1, a.shape[-1]) for a in (texts.token_ids, texts.positions, texts.segment_ids, texts.last))
        pooled = encode_chunk(remat="none")(params, *rows)
        return objective(weights)(jnp.zeros((TEXTS, pooled.shape[-1])).at[texts.text.reshape(-1, texts.text.shape[-1])].set(pooled))

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("chunks", LENGTHS)
@pytest.mark.parametrize("term", OBJECTIVES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_one_chunk(params, in_chunks, plain, shape, term, chunks):
    weights = jnp.asarray([float(term == t) for t in OBJECTIVES])
    texts = packed(chunks, SHAPES[shape])
    (got_loss, got_embeddings), got = in_chunks(params, texts, weights)
    (want_loss, want_embeddings), want = plain(params, texts, weights)
    np.testing.assert_allclose(got_loss, want_loss, rtol=2e-6)
    np.testing.assert_allclose(got_embeddings, want_embeddings, atol=1e-5)
    np.testing.assert_array_equal(got_embeddings[3], 0)
    for (path, leaf), ours in zip(jax.tree.leaves_with_path(want), jax.tree.leaves(got), strict=True):
        largest = np.abs(leaf).max()
        assert largest > 0, path
        np.testing.assert_allclose(ours, leaf, atol=5e-6 * largest, rtol=0, err_msg=str(path))


def test_remat_changes_memory_and_not_gradients(params):
    """Where all chunks are one group, so that what each keeps is kept of all."""
    texts, gradients, memory = packed(5, SHAPES["one group, rows in halves"]), {}, {}
    for remat in REMAT_POLICIES:
        step = lambda p, t: value_and_grad(lambda e: (jnp.sum(e**3), None), encode_chunk(remat=remat), p, t, TEXTS)[1]  # noqa: B023, E731
        compiled = jax.jit(step).lower(params, texts).compile()
        memory[remat], gradients[remat] = compiled.memory_analysis().temp_size_in_bytes, compiled(params, texts)
    assert memory["full"] < memory["attention"] < memory["dots"] < memory["none"]
    for remat in REMAT_POLICIES:
        for got, want in zip(jax.tree.leaves(gradients[remat]), jax.tree.leaves(gradients["none"]), strict=True):
            np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max(), rtol=0)


def test_one_program_serves_any_number_of_chunks(params, in_chunks):
    for chunks in LENGTHS:
        in_chunks(params, packed(chunks), jnp.ones(len(OBJECTIVES)))
    assert in_chunks._cache_size() <= len(SHAPES)


def test_chunks_that_are_not_in_use_are_not_read(params, in_chunks):
    """Whatever they hold, here the first chunk's texts once more under other tokens."""
    clean, weights = packed(2), jnp.ones(len(OBJECTIVES))
    parts = {name: np.array(getattr(clean, name)) for name in ("token_ids", "positions", "segment_ids", "last", "text")}
    for array in parts.values():
        array[2:] = array[0]
    parts["token_ids"][2:] += 1
    dirty = PackedTexts(**parts, chunks=clean.chunks, short_chunks=clean.short_chunks)
    for got, want in zip(*(jax.tree.leaves(in_chunks(params, texts, weights)) for texts in (dirty, clean)), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("shape", SHAPES)
def test_encoding_alone_gives_the_same_embeddings(params, in_chunks, shape):
    texts = packed(5, SHAPES[shape])
    (_, want), _ = in_chunks(params, texts, jnp.ones(len(OBJECTIVES)))
    got = jax.jit(lambda params, texts: encode(encode_chunk(), params, texts, TEXTS))(params, texts)
    assert got.shape == (TEXTS, 64) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("depths", [(), (1, 3)])
@pytest.mark.parametrize("remat", ["none", "attention"])
@pytest.mark.parametrize("whole", ["gradient", "weights"])
def test_gradients_on_a_mesh_are_those_of_one_device(params, whole, remat, depths):
    """Of two groups with long and short rows, the last group not full."""
    texts = packed(5, RowShape(chunk_rows=4, row_tokens=16, row_texts=16, group_chunks=2, parts=2))
    assert 0 < texts.short_chunks < texts.chunks == 3  # in groups of two and one

    def step(params, texts):
        encoder = encode_chunk(remat=remat, layers=depths, whole=whole)
        return value_and_grad(lambda e: (jnp.sum(jnp.sin(e) * jnp.arange(64)), e), encoder, params, texts, TEXTS)

    want = jax.jit(step)(params, texts)
    mesh = sharding.make_mesh(2, 2, 2)
    placed = [sharding.to_global(np.asarray(a), mesh, sharding.CHUNKS_RT if np.ndim(a) else sharding.P()) for a in jax.tree.leaves(texts)]
    with jax.set_mesh(mesh):
        got = jax.jit(step)(init_decoder(tiny.CONFIG, 0, mesh), jax.tree.unflatten(jax.tree.structure(texts), placed))
    for ours, one in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, one, atol=1e-5 * np.abs(one).max(), rtol=0)


@pytest.mark.parametrize("grouped", [1, 3, CHUNKS])
@pytest.mark.parametrize("depths", [(), (1, 2, 3)])
def test_gradients_come_back_where_the_parameters_are(depths, grouped):
    """On types alone: under a mesh every gradient has its parameter's sharding, so nothing is gathered to be kept."""
    mesh = sharding.make_mesh(2, 2, 2)
    _, abstract = abstract_decoder(tiny.CONFIG, mesh)
    texts = abstract_texts(mesh, rows=4, row_texts=16, group_chunks=grouped)
    with jax.set_mesh(mesh):
        step = lambda p, t: value_and_grad(lambda e: (jnp.sum(e), None), encode_chunk(layers=depths), p, t, TEXTS)  # noqa: E731
        _, gradients = jax.eval_shape(step, abstract, texts)
    for gradient, parameter in zip(jax.tree.leaves(gradients), jax.tree.leaves(abstract), strict=True):
        assert gradient.sharding.spec == parameter.sharding.spec


@pytest.mark.parametrize("grouped", [1, 3, CHUNKS])
def test_gradients_are_summed_over_data_once(grouped):
    """The compiled program: in its loops no sum crosses the `data` axis, after them one does; hidden states stay where they are."""
    mesh = sharding.make_mesh(2, 2, 2)
    hidden_states = 12 * 16 * tiny.CONFIG.hidden_size  # of the rows of a chunk
    with jax.set_mesh(mesh):
        step = lambda p, t: value_and_grad(lambda e: (jnp.sum(e), None), encode_chunk(), p, t, TEXTS)  # noqa: E731
        lowered = jax.jit(step).lower(
            abstract_decoder(tiny.CONFIG, mesh)[1], abstract_texts(mesh, rows=12, row_texts=3, group_chunks=grouped)
        )
    crossing, computation = [], ""
    for line in lowered.compile().as_text().splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = line.split()[0]
        if (sums := re.search(r"= (.*?) all-reduce(?:-start)?\(.*replica_groups=\{\{([0-9,]+)\}", line)) and spans_data(sums[2]):
            crossing.append(computation)
        if moved := re.search(r"= f32\[([0-9,]+)\]\S* all-gather", line):
            assert math.prod(map(int, moved[1].split(","))) != hidden_states, line
    assert crossing == ["ENTRY"]


def spans_data(group):
    """Whether a group of devices, "0,4", has members in both halves of the (2, 2, 2) mesh."""
    return len({int(device) // 4 for device in group.split(",")}) == 2


def abstract_texts(mesh, rows, row_texts, group_chunks):
    """Types of the texts of a step, 16 tokens a row."""

    def row(length):
        return jax.ShapeDtypeStruct((CHUNKS, rows, length), jnp.int32, sharding=jax.NamedSharding(mesh, sharding.CHUNKS_RT))

    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=jax.NamedSharding(mesh, sharding.P()))
    return PackedTexts(row(16), row(16), row(16), row(row_texts), row(row_texts), count, count, group_chunks)
