"""The decoder against transformers' Qwen3 layer by layer; layouts, causality, remat, dtypes and sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from flax import nnx

from f2llm_jax import sharding
from f2llm_jax.data.packing import RowShape, lay_out
from f2llm_jax.model.chunk_encoder import ChunkEncoder, last_token
from f2llm_jax.model.decoder import abstract_decoder, count_parameters, init_decoder
from f2llm_jax.model.sizes import SIZES, DecoderConfig
from f2llm_jax.weights import hf_config, hf_reader

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROWS, TOKENS = 4, 24
LENGTHS = (24, 1, 9, 13, 2, 17, 5)


def config(vocab, hidden, ffn, layers, heads, kv_heads, head_dim, theta=1e6, eps=1e-6):
    return DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=theta,
        rms_norm_eps=eps,
        max_position_embeddings=512,
    )


# heads x head_dim above, below and at the hidden size; 3, 1, 8 and 4 query heads a key/value head.
CONFIGS = {
    "grouped": config(97, 48, 80, 2, heads=6, kv_heads=2, head_dim=16, theta=1e4),
    "multi_head": config(64, 64, 40, 3, heads=4, kv_heads=4, head_dim=8),
    "multi_query": config(51, 40, 112, 4, heads=8, kv_heads=1, head_dim=10, theta=5e5, eps=1e-3),
    "sharded": config(96, 64, 96, 3, heads=8, kv_heads=2, head_dim=12),
}


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """By name: transformers' model, random in every tensor, and the folder it saved."""
    made = {}
    for name, c in CONFIGS.items():
        torch.manual_seed(len(made))
        rope = {"rope_type": "default", "rope_theta": c.rope_theta}
        names = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "rms_norm_eps", "max_position_embeddings",
        )  # fmt: skip
        facts = {field: getattr(c, field) for field in names}
        model = transformers.Qwen3Model(transformers.Qwen3Config(**facts, rope_parameters=rope, attn_implementation="eager"))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.uniform_(0.5, 1.5) if parameter.ndim == 1 else parameter.normal_(0, 0.2)  # norms start at one: tell them apart
        folder = tmp_path_factory.mktemp(name)
        model.eval().save_pretrained(folder)
        made[name] = model, folder
    return made


def peer_states(model, token_ids):
    """Every layer's output `[L, R, T, D]` and the final hidden states `[R, T, D]`."""
    outputs = []
    hooks = [layer.register_forward_hook(lambda _, __, output: outputs.append(output)) for layer in model.layers]
    with torch.no_grad():
        hidden = model(torch.tensor(token_ids, dtype=torch.long)).last_hidden_state
    for hook in hooks:
        hook.remove()
    return torch.stack(outputs).numpy(), hidden.numpy()


@functools.cache
def forward(decoder_config, dtype="float32", tapped=False):
    graphdef, _ = abstract_decoder(decoder_config)
    tap = (lambda x: x) if tapped else None
    return jax.jit(lambda params, *rows: nnx.merge(graphdef, params)(*rows, dtype=jnp.dtype(dtype), tap=tap))


@functools.cache
def tiny_params():
    return init_decoder(tiny.CONFIG, 0)


def worst_relative(got, want):
    """Largest L2 of a vector's difference over that of the wanted vector."""
    difference = np.linalg.norm(np.asarray(got, np.float64) - want, axis=-1)
    return float(np.max(difference / np.linalg.norm(np.asarray(want, np.float64), axis=-1)))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_layer_is_that_of_transformers(peers, name):
    model, folder = peers[name]
    mesh = sharding.make_mesh(2, 2, 2) if name == "sharded" else None
    assert hf_config.read_settings(folder).decoder == CONFIGS[name]
    params = hf_reader.load_params(folder, CONFIGS[name], mesh)
    token_ids = np.random.default_rng(0).integers(0, CONFIGS[name].vocab_size, (ROWS, TOKENS), np.int32)
    rows = token_ids, np.tile(np.arange(TOKENS, dtype=np.int32), (ROWS, 1)), np.ones((ROWS, TOKENS), np.int32)
    if mesh is None:
        hidden, layers = forward(CONFIGS[name], tapped=True)(params, *rows)
    else:
        with jax.set_mesh(mesh):
            hidden, layers = forward(CONFIGS[name], tapped=True)(params, *(sharding.to_global(x, mesh, sharding.ROWS_T) for x in rows))
        assert len(hidden.sharding.device_set) == 8 and hidden.addressable_shards[0].data.shape == (1, TOKENS, 64)
    want_layers, want_hidden = peer_states(model, token_ids)
    assert layers.shape == want_layers.shape
    for layer, want in zip(layers, want_layers, strict=True):
        assert worst_relative(layer, want) <= 1e-4
    assert worst_relative(hidden, want_hidden) <= 1e-4


def texts(vocab):
    rng = np.random.default_rng(1)
    return [rng.integers(0, vocab, length).astype(np.int32) for length in LENGTHS]


def padded(values, side, filler=0):
    """One text a row, the rest of the row `filler` in tokens and positions; and where each text ends."""
    token_ids, positions = (np.full((len(values), TOKENS), filler, np.int32) for _ in range(2))
    segments, last = np.zeros((len(values), TOKENS), np.int32), np.zeros((len(values), 1), np.int32)
    for r, ids in enumerate(values):
        start = 0 if side == "right" else TOKENS - len(ids)
        here = slice(start, start + len(ids))
        token_ids[r, here], positions[r, here], segments[r, here] = ids, np.arange(len(ids)), 1
        last[r] = start + len(ids) - 1
    return token_ids, positions, segments, last


def pooled(name, params, token_ids, positions, segments, last):
    return last_token(forward(CONFIGS[name])(params, token_ids, positions, segments), last)


def test_every_layout_gives_the_same_pooled_vectors(peers):
    """Left-padded, right-padded, packed with others and alone without padding: all equal transformers' on the bare text."""
    name = "grouped"
    model, folder = peers[name]
    params = hf_reader.load_params(folder, CONFIGS[name])
    values = texts(CONFIGS[name].vocab_size)
    want = np.stack([peer_states(model, ids[None])[1][0, -1] for ids in values])
    for side in ("left", "right"):
        assert worst_relative(pooled(name, params, *padded(values, side))[:, 0], want) <= 1e-5
    shape = RowShape(chunk_rows=len(values), row_tokens=TOKENS)
    packed = lay_out(shape.pack(LENGTHS), shape, lambda wanted: [values[i] for i in wanted])
    assert packed.segment_ids.max() > 2 and len(packed.token_ids) == 1
    vectors = np.asarray(pooled(name, params, packed.token_ids[0], packed.positions[0], packed.segment_ids[0], packed.last[0]))
    got = np.zeros_like(want)
    for row, slots in enumerate(packed.text[0]):
        for slot, text in enumerate(slots):
            if text < len(values):
                got[text] = vectors[row, slot]
    assert worst_relative(got, want) <= 1e-5
    ids = values[2]
    alone = pooled(name, params, ids[None], np.arange(len(ids))[None], np.ones((1, len(ids)), int), np.array([[len(ids) - 1]]))
    assert worst_relative(alone[0], want[2:3]) <= 1e-5


def test_what_stands_in_padding_does_not_matter(peers):
    name = "grouped"
    params = hf_reader.load_params(peers[name][1], CONFIGS[name])
    values = texts(CONFIGS[name].vocab_size)
    for side in ("left", "right"):
        clean, dirty = (pooled(name, params, *padded(values, side, filler)) for filler in (0, 77))
        np.testing.assert_array_equal(clean, dirty)


def test_a_position_depends_on_earlier_ones_of_its_own_text_and_on_nothing_else():
    """By gradients: with a token of its own at each position, rows of the embedding table are positions."""
    segments = jnp.array([[0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 0, 0]])
    positions = jnp.array([[0, 0, 0, 1, 2, 0, 1, 2, 3, 0, 0, 0]])
    length = segments.shape[1]
    graphdef, _ = abstract_decoder(tiny.CONFIG)
    # Larger weights than training starts from, so that no path is lost below fp32's resolution.
    params = jax.tree.map(lambda x: x if x.ndim < 3 else 5 * x, tiny_params())
    probe = jax.random.normal(jax.random.key(1), (tiny.CONFIG.hidden_size,))

    def outputs(table):
        changed = jax.tree.map(lambda x: x, params)
        changed["embedding"] = changed["embedding"].replace(table)
        hidden = nnx.merge(graphdef, changed)(jnp.arange(length)[None], positions, segments)
        return hidden[0] @ probe

    jacobian = jax.jit(jax.jacrev(outputs))(params["embedding"].get_value())  # [position, V, D]
    reached = np.linalg.norm(jacobian[:, :length], axis=-1)
    order = np.arange(length)
    allowed = (order[:, None] >= order[None, :]) & np.array(segments[0][:, None] == segments[0][None, :])
    assert (reached[~allowed] == 0).all()
    assert (reached[allowed] > 1e-6 * reached.max()).all()


def rows_of_two():
    segments = jnp.array([[1] * 10 + [2] * 9 + [0] * 5] * ROWS)
    positions = jnp.array([[*range(10), *range(9), *[0] * 5]] * ROWS)
    return jax.random.randint(jax.random.key(3), (ROWS, TOKENS), 0, tiny.CONFIG.vocab_size), positions, segments


def test_bfloat16_stays_near_float32():
    rows = rows_of_two()
    wide, narrow = (forward(tiny.CONFIG, dtype)(tiny_params(), *rows) for dtype in ("float32", "bfloat16"))
    assert (wide.dtype, narrow.dtype) == (jnp.float32, jnp.bfloat16)
    assert 1e-4 < worst_relative(narrow, np.asarray(wide)) < 0.03
    encode_chunk = ChunkEncoder(tiny.CONFIG, jnp.bfloat16, "full")
    last = jnp.array([[9, 18]] * ROWS)
    embeddings = jax.eval_shape(encode_chunk, tiny_params(), *rows, last)
    assert (embeddings.shape, embeddings.dtype) == ((ROWS, 2, 64), jnp.float32)  # whoever compares them wants fp32


def test_random_weights_are_the_same_on_any_mesh():
    sharded = init_decoder(tiny.CONFIG, 0, sharding.make_mesh(2, 2, 2))
    for one, many in zip(jax.tree.leaves(tiny_params()), jax.tree.leaves(sharded), strict=True):
        assert len(many.sharding.device_set) == 8
        np.testing.assert_array_equal(one, many)
    other = init_decoder(tiny.CONFIG, 1)
    assert not np.array_equal(other["embedding"].get_value(), tiny_params()["embedding"].get_value())


def test_a_mesh_that_does_not_divide_a_parameter_is_refused_by_name():
    with pytest.raises(sharding.MeshError, match=r"64 wide: layers/key of .* data=1, fsdp=1, tensor=4 .* tensor that divide it"):
        abstract_decoder(tiny.CONFIG, sharding.make_mesh(1, 1, 4, devices=jax.devices()[:4]))


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("80m", 80_084_288),
        ("160m", 159_185_024),
        ("330m", 334_349_184),
        ("0.6b", 596_049_920),
        ("1.7b", 1_720_574_976),
        ("4b", 4_022_468_096),
        ("8b", 7_568_405_504),
        ("14b", 13_990_394_880),
    ],
)
def test_parameter_counts_are_the_published_ones(size, parameters):
    assert count_parameters(SIZES[size]) == parameters


def test_shapes_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="num_key_value_heads=4 must divide num_attention_heads=6"):
        config(10, 8, 8, 1, heads=6, kv_heads=4, head_dim=4)
    with pytest.raises(ValueError, match="head_dim=5 must be even"):
        config(10, 8, 8, 1, heads=2, kv_heads=1, head_dim=5)
