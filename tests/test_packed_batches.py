"""Batches from a prepared dataset: packed they train as padded they would, for every kind of task; pairs alone train too."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_data
import tiny
from hypothesis import given
from hypothesis import strategies as st

from f2llm_jax import objectives, prepare
from f2llm_jax.batch import PackedTexts
from f2llm_jax.data import records
from f2llm_jax.data.pipeline import BatchConfig, Pipeline, used_columns
from f2llm_jax.model.chunk_encoder import ChunkEncoder
from f2llm_jax.model.decoder import init_decoder
from f2llm_jax.model.encoder import value_and_grad
from f2llm_jax.objectives import ContrastiveConfig, Objective
from f2llm_jax.training.step import by_role

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = BatchConfig(size=10, row_tokens=64, microbatch_rows=4, max_length=small_data.MAX_LENGTH, row_texts=8)
OBJECTIVE = Objective(contrastive=ContrastiveConfig(dims=(16, 64)))


@pytest.fixture(scope="module")
def dataset(small_dataset):
    return small_dataset


def padded(texts, count):
    """The texts of a packed batch one a row, padded on the right as the published trainer does."""
    packed, ids = jax.tree.map(np.asarray, texts), [np.zeros(1, np.int32)] * count
    for place in np.argwhere(packed.text[: packed.chunks] < count):
        last = packed.last[tuple(place)]
        chunk, row, _ = place
        ids[packed.text[tuple(place)]] = packed.token_ids[chunk, row, last - packed.positions[chunk, row, last] : last + 1]
    longest = CONFIG.max_length  # of any batch, so that one program serves all
    token_ids = np.stack([np.pad(one, (0, longest - len(one))) for one in ids])[None]
    lengths = np.array([len(one) for one in ids])
    there = np.arange(longest) < lengths[:, None]
    positions = np.where(there, np.arange(longest), 0)[None]
    return PackedTexts(
        token_ids,
        positions,
        there[None].astype(np.int32),
        last=(lengths - 1)[None, :, None],
        text=np.arange(count)[None, :, None],
        chunks=np.int32(1),
        short_chunks=np.int32(1),
    )


@functools.cache
def gradients_of(vocab_size):
    """Loss and gradients of a batch whose texts are laid out in some way."""
    config = tiny.CONFIG if vocab_size <= tiny.CONFIG.vocab_size else dataclasses.replace(tiny.CONFIG, vocab_size=vocab_size)
    encode_chunk = ChunkEncoder(config, jnp.float32, "full")

    @jax.jit
    def gradients(params, batch, texts):
        def loss(embeddings):
            return objectives.total(by_role(embeddings, batch.samples.negative_mask), batch.samples, OBJECTIVE)

        (total, _), found = value_and_grad(loss, encode_chunk, params, texts, batch.text_count)
        return total, found

    return gradients, init_decoder(config, 0)


def assert_packed_is_padded(dataset, source, config=CONFIG):
    gradients, params = gradients_of(dataset.vocab_size)
    pipeline = Pipeline(dataset, "train", config, 0, None)
    batch = next(pipeline.step(step).batch for step in range(999) if pipeline.plan.step(step).source == source)
    loss, packed = gradients(params, batch, batch.texts)
    expected_loss, expected = gradients(params, batch, padded(batch.texts, batch.text_count))
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, packed, expected)) / optax.tree.norm(expected)
    assert float(optax.tree.norm(expected)) > 0
    assert abs(float(loss) / float(expected_loss) - 1) < 1e-5
    assert float(difference) < 1e-5
    return float(difference)


@pytest.mark.parametrize("source", small_data.KINDS)
def test_loss_and_gradients_are_those_of_padded_batches(dataset, source):
    assert_packed_is_padded(dataset, source)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "raw").mkdir()
    table = {name: small_data.raw("pairs")[name] for name in ("query", "passage")}
    pq.write_table(pa.table(table), folder / "raw" / "pairs.parquet")
    tiny.write_tokenizer(folder / "tokenizer")
    flags = ["--raw", folder / "raw", "--tokenizer", folder / "tokenizer", "--out", folder / "data", "--max-length", 48, "--workers", 1]
    assert prepare.main(list(map(str, flags))) == 0
    return records.load_dataset(folder / "data")


def test_pairs_alone_train_by_what_is_in_the_batch(pairs):
    pipeline = Pipeline(pairs, "train", CONFIG, 0, None)
    batch = pipeline.step(0).batch
    assert pairs.sources["pairs"].kind == "retrieval" and pairs.sources["pairs"].negatives == 0
    samples = batch.samples
    assert samples.negative_mask.shape == (CONFIG.size, 1) and not samples.negative_mask.any() and samples.in_batch_weight == 1
    assert_packed_is_padded(pairs, "pairs")
    gradients, params = gradients_of(pairs.vocab_size)
    optimizer = optax.adam(3e-3)
    state, losses = optimizer.init(params), []
    for step in range(9):
        batch = pipeline.step(step).batch
        loss, found = gradients(params, batch, batch.texts)
        updates, state = optimizer.update(found, state)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])


@given(st.data())
def test_a_row_with_fewer_negatives_uses_as_many_of_its_own_as_it_can(data):
    stored, drawn = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 5))
    used = data.draw(st.integers(1, stored))
    counts = data.draw(st.lists(st.integers(0, stored), min_size=drawn, max_size=drawn))
    rows = np.array([[100 * i + j if j < count else -1 for j in range(stored)] for i, count in enumerate(counts)])
    columns = np.array([data.draw(st.permutations(range(stored)))[:used] for _ in counts])
    used_of = used_columns(rows, columns)
    found = np.where(used_of >= 0, np.take_along_axis(rows, np.maximum(used_of, 0), axis=1), -1)
    for row, wanted, got, count in zip(rows, columns, found, counts, strict=True):
        kept = got[got >= 0].tolist()
        assert len(set(kept)) == len(kept) == min(used, count) and set(kept) <= set(row.tolist())
        assert set(row[wanted[wanted < count]].tolist()) <= set(kept)
