"""The embedding table in two factors: numpy's SVD to start from, a rank a step, and plain Qwen3 models to serve."""

import contextlib
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentence_transformers
import tiny
from safetensors.numpy import load_file
from small_batches import TEXTS, B, N, encode_chunk, packed, shallow

from f2llm_jax import convert, sharding
from f2llm_jax.batch import Batch, Samples
from f2llm_jax.errors import UserError
from f2llm_jax.inference.encode import load_encoder, truncate_and_normalize
from f2llm_jax.model import low_rank
from f2llm_jax.model.chunk_encoder import ChunkEncoder
from f2llm_jax.model.decoder import abstract_decoder, init_decoder
from f2llm_jax.model.encoder import encode, value_and_grad
from f2llm_jax.objectives import ContrastiveConfig, Objective
from f2llm_jax.text import load_tokenizer
from f2llm_jax.training import checkpoint, start
from f2llm_jax.training.optimizer import OptimizerConfig, make_optimizer
from f2llm_jax.training.step import TableRanks, TrainState, make_train_step
from f2llm_jax.weights.models import find_model
from f2llm_jax.weights.truncation import Truncation

pytestmark = pytest.mark.usefixtures("quick_compilation")
RANK = 16
MARKER = ".made_by_f2llm_jax.json"  # lists the others
CONFIG = dataclasses.replace(tiny.CONFIG, table_rank=RANK)


@pytest.fixture(scope="module")
def params():
    return init_decoder(tiny.CONFIG, 0)


def table(params):
    return np.asarray(params["embedding"].get_value())


def nearest(table, rank):
    """By numpy's SVD: no matrix of this rank is nearer."""
    u, s, v = np.linalg.svd(table.astype(np.float64), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def test_the_ranks_are_the_published_ones():
    assert low_rank.ranks(512) == (64, 128, 256, 512)
    assert low_rank.ranks(96) == (64, 96) and low_rank.ranks(64) == (64,) and low_rank.ranks(16) == (16,)


def test_a_rank_is_drawn_in_proportion_to_itself():
    drawn = np.asarray(jax.jit(jax.vmap(TableRanks(512, seed=3).draw))(jnp.arange(20_000)))
    shares = {rank: float((drawn == rank).mean()) for rank in (64, 128, 256, 512)}
    assert shares == pytest.approx({64: 1 / 15, 128: 2 / 15, 256: 4 / 15, 512: 8 / 15}, abs=0.012)
    np.testing.assert_array_equal(drawn[:9], [TableRanks(512, seed=3).draw(step) for step in range(9)])
    assert (np.asarray(jax.vmap(TableRanks(512, seed=4).draw)(jnp.arange(100))) != drawn[:100]).any()


@pytest.mark.parametrize("axes", [None, (2, 2, 2)])
def test_factors_are_the_singular_value_decomposition(axes):
    mesh = sharding.make_mesh(*axes) if axes else None
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        plain = init_decoder(tiny.CONFIG, 0, mesh)
        factors = low_rank.factorised(plain, RANK)
        _, expected = abstract_decoder(CONFIG, mesh)
        assert jax.tree.structure(factors) == jax.tree.structure(expected)
        for got, want in zip(jax.tree.leaves(factors), jax.tree.leaves(expected), strict=True):
            assert (got.shape, got.dtype) == (want.shape, want.dtype) and (mesh is None or got.sharding == want.sharding)
        for rank in (RANK, 5):  # the first columns are the decomposition of lower rank
            narrowed = low_rank.narrowed(factors, jnp.int32(rank))
            np.testing.assert_allclose(table(low_rank.multiplied(narrowed)), nearest(table(plain), rank), atol=1e-6)
        whole = low_rank.multiplied(low_rank.factorised(plain, tiny.CONFIG.hidden_size))
        assert jax.tree.structure(whole) == jax.tree.structure(plain)
        np.testing.assert_allclose(table(whole), table(plain), atol=1e-6)


def test_the_decoder_computes_with_the_product(params):
    factors, texts = low_rank.factorised(params, RANK), jax.device_put(packed(2))
    plain = jax.jit(lambda p: encode(encode_chunk(), p, texts, TEXTS))(low_rank.multiplied(factors))
    factored = ChunkEncoder(CONFIG, jnp.float32, "full")
    np.testing.assert_allclose(jax.jit(lambda p: encode(factored, p, texts, TEXTS))(factors), plain, atol=2e-6)


def test_a_step_trains_the_columns_of_its_rank_alone(params):
    """Against automatic differentiation through the plain table, whose gradient G gives the factors G V^T and U^T G."""
    factors, texts, rank = low_rank.factorised(params, 64), jax.device_put(packed(2)), 24
    config = dataclasses.replace(tiny.CONFIG, table_rank=64)
    narrowed = low_rank.narrowed(factors, jnp.int32(rank))
    loss = lambda e: (jnp.sum(jnp.sin(e)), None)  # noqa: E731
    factored = ChunkEncoder(config, jnp.float32, "full")
    _, got = jax.jit(lambda p: value_and_grad(loss, factored, p, texts, TEXTS))(narrowed)
    got = low_rank.narrowed(got, jnp.int32(rank))
    _, want = jax.jit(lambda p: value_and_grad(loss, encode_chunk(), p, texts, TEXTS))(low_rank.multiplied(narrowed))
    left, right = (np.asarray(narrowed[name].get_value()) for name in ("embedding_left", "embedding_right"))
    want_left, want_right = table(want) @ right.T, left.T @ table(want)
    want_left[:, rank:] = 0
    for name, expected in {"embedding_left": want_left, "embedding_right": want_right}.items():
        np.testing.assert_allclose(got[name].get_value(), expected, atol=5e-6 * np.abs(expected).max())
        assert np.abs(expected).max() > 0
    assert not np.asarray(got["embedding_right"].get_value())[rank:].any()


def test_a_step_draws_its_rank_and_trains_all_depths_together(params):
    """Depths, widths and rank at once: the loss is that of a model with the narrowed plain table, other columns stay as they are."""
    ranks = TableRanks(96, seed=0)
    config = dataclasses.replace(tiny.CONFIG, hidden_size=128, table_rank=96)
    weights = low_rank.factorised(init_decoder(dataclasses.replace(config, table_rank=0), 0), 96)
    ids = jnp.arange(B), jnp.arange(B, B + B * N).reshape(B, N)
    batch = Batch(jax.device_put(packed(2)), Samples(jnp.ones(B).at[3].set(0), jnp.ones((B, N)).at[3].set(0), jnp.float32(1), *ids))
    objective = Objective(contrastive=ContrastiveConfig(dims=(8, 128)))
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, total_steps=99, weight_decay=0.0)

    def step(config, weights, number, ranks=None):
        state = TrainState(jnp.int32(number), weights, make_optimizer(optimizer).init(weights))
        encoder = ChunkEncoder(config, jnp.float32, "full", (1, 3))
        return jax.jit(make_train_step(encoder, objective, optimizer, None, ranks))(state, None, batch)

    number = next(number for number in range(99) if int(ranks.draw(number)) == 64)
    after, got = step(config, weights, number, ranks)
    assert float(got["table_rank"].value) == 64
    alone = low_rank.multiplied(low_rank.narrowed(weights, jnp.int32(64)))
    _, want = step(dataclasses.replace(config, table_rank=0), alone, number)
    np.testing.assert_allclose(got["loss"].value, want["loss"].value, rtol=1e-6)
    changed = (after.params["embedding_left"].get_value() != weights["embedding_left"].get_value()).any(axis=0)
    np.testing.assert_array_equal(changed, np.arange(96) < 64)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of 3 layers, all trained to serve, and a table of rank 96."""
    folder = tmp_path_factory.mktemp("run")
    config = dataclasses.replace(tiny.CONFIG, hidden_size=128, table_rank=96)
    weights = low_rank.factorised(init_decoder(dataclasses.replace(config, table_rank=0), 0), 96)
    tokenizer = load_tokenizer(tiny.write_tokenizer(folder / "tokenizer"))
    checkpoints = checkpoint.open_checkpoints(folder / "checkpoints", checkpoint.CheckpointConfig(every=1, keep=1))
    metadata = {"tokenizer_fingerprint": tokenizer.fingerprint, "max_length": 96, "matryoshka_dims": (8, 128), "depths": (1, 2, 3)}
    state = TrainState(jnp.int32(0), weights, {"count": jnp.int32(0)})
    checkpoint.save(checkpoints, 0, state, {"decoder": dataclasses.asdict(config), **metadata})
    checkpoints.close()
    return folder, weights


@pytest.mark.parametrize(("layers", "rank"), [(None, None), (2, None), (None, 64), (1, 64)])
def test_every_cut_is_a_model_that_sentence_transformers_loads(trained, tmp_path, layers, rank):
    folder, weights = trained
    flags = [*(["--layers", str(layers)] if layers else []), *(["--table-rank", str(rank)] if rank else [])]
    assert convert.main(["to-hf", str(folder), str(tmp_path / "out"), *flags]) == 0
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    ours = load_encoder(find_model(str(folder), Truncation(layers, rank))).encode(tiny.TEXTS)
    cosine = (truncate_and_normalize(ours, 128) * theirs.encode(tiny.TEXTS)).sum(1)
    assert cosine.min() >= 0.99999
    plain = nearest_table(weights, rank or 96)
    np.testing.assert_allclose(theirs[0].auto_model.embed_tokens.weight.detach().numpy(), plain, atol=1e-6)
    assert theirs[0].auto_model.config.num_hidden_layers == len(theirs[0].auto_model.layers) == (layers or 3)
    _, cut = shallow(weights, layers or 3)
    last = theirs[0].auto_model.layers[-1].mlp.down_proj.weight.detach().numpy()
    np.testing.assert_array_equal(last, cut["layers"]["down"].get_value()[-1])


def released(folder, out, *flags):
    assert convert.main(["to-hf", str(folder), str(out), "--no-golden", *flags]) == 0
    return out


def test_factors_are_released_next_to_an_unchanged_release_and_come_back_bit_exact(trained, tmp_path):
    folder, weights = trained
    plain, both = released(folder, tmp_path / "plain"), released(folder, tmp_path / "both", "--factors")
    files = lambda out: {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file() and file.name != MARKER}  # noqa: E731
    added = files(both).keys() - files(plain).keys()
    assert added == {"factors/embedding.safetensors"} and {name: files(both)[name] for name in files(plain)} == files(plain)
    stored = load_file(both / "factors" / "embedding.safetensors")
    np.testing.assert_array_equal(stored["U"], weights["embedding_left"].get_value())
    np.testing.assert_array_equal(stored["V"], weights["embedding_right"].get_value())
    for mesh in (None, sharding.make_mesh(2, 2, 2)):
        back = find_model(str(both), Truncation(factored=True))
        assert back.config.table_rank == 96
        loaded = back.load(mesh)
        for name in ("embedding_left", "embedding_right"):
            np.testing.assert_array_equal(loaded[name].get_value(), weights[name].get_value())
    ours, served = load_encoder(back), load_encoder(find_model(str(both)))
    np.testing.assert_allclose(ours.encode(tiny.TEXTS), served.encode(tiny.TEXTS), atol=2e-5)
    transformers_reads = sentence_transformers.SentenceTransformer(str(both), device="cpu")
    np.testing.assert_allclose(transformers_reads[0].auto_model.embed_tokens.weight.detach(), nearest_table(weights, 96), atol=1e-6)


def test_training_starts_from_released_factors_as_they_are(trained, tmp_path):
    folder, weights = trained
    both = released(folder, tmp_path / "both", "--factors")
    dataset = types.SimpleNamespace(
        vocab_size=300, tokenizer_fingerprint=load_tokenizer(folder / "tokenizer").fingerprint, folder="data", eos_id=0
    )
    point = start.student(str(both), "toy", 0, dataset, table_rank=96)
    np.testing.assert_array_equal(point.load(None)["embedding_left"].get_value(), weights["embedding_left"].get_value())


@pytest.mark.parametrize("rank", [16, 64, 96])
def test_a_refactorisation_is_the_nearest_table_of_its_rank(trained, tmp_path, rank):
    folder, weights = trained
    flags = ("--table-rank", str(rank), "--refactorise")
    out = released(folder, tmp_path / "out", *flags, "--factors")
    want = nearest(nearest_table(weights, 96), rank)
    stored = load_file(out / "factors" / "embedding.safetensors")
    assert stored["U"].shape == (tiny.CONFIG.vocab_size, rank) and stored["V"].shape == (rank, 128)
    np.testing.assert_allclose(stored["U"] @ stored["V"], want, atol=2e-6)
    np.testing.assert_allclose(load_file(out / "model.safetensors")["embed_tokens.weight"], want, atol=2e-6)
    loaded = find_model(str(folder), Truncation(table_rank=rank, refactorise=True)).load(None)
    np.testing.assert_allclose(loaded["embedding"].get_value(), want, atol=5e-6)


def test_ranks_that_cannot_be_released_are_refused(trained, tmp_path, capsys):
    folder, _ = trained
    plain = released(folder, tmp_path / "plain")
    for source, flags, message in (
        (folder, ("--table-rank", "32"), "--refactorise takes the nearest table of any rank up to 96"),
        (folder, ("--table-rank", "128", "--refactorise"), "was not trained for a table of rank 128"),
        (folder, ("--refactorise",), "add --table-rank Z"),
        (plain, ("--factors",), "has a plain embedding table and no factors"),
    ):
        assert convert.main(["to-hf", str(source), str(tmp_path / "refused"), *flags]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="only for 96"):
        Truncation(table_rank=64).check("it", dataclasses.replace(CONFIG, table_rank=96, hidden_size=128), (3,), (96,))


def nearest_table(weights, rank):
    left, right = (np.asarray(weights[name].get_value()) for name in ("embedding_left", "embedding_right"))
    return left[:, :rank] @ right[:rank]


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (Truncation(layers=5), "was not trained to serve with 5 layers, only with 1, 2, 3"),
        (Truncation(table_rank=32), "was not trained for a table of rank 32, only for 64, 96"),
    ],
)
def test_other_cuts_are_refused(trained, cut, message):
    with pytest.raises(UserError, match=message):
        find_model(str(trained[0]), cut)


def test_a_plain_table_has_no_other_rank(tmp_path):
    tiny_model = tiny.origin(tmp_path / "tokenizer")
    assert tiny_model.config.table_rank == 0
    with pytest.raises(UserError, match="plain embedding table"):
        Truncation(table_rank=64).check("it", tiny_model.config, (3,))
