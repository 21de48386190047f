"""From raw parquet to the arrays of a step: which text stands in which slot, truncation, masks, meshes, threads."""

import jax
import numpy as np
import pytest
import small_data

from f2llm_jax import sharding
from f2llm_jax.data.pipeline import BatchConfig, Pipeline

CONFIG = BatchConfig(size=24, row_tokens=64, microbatch_rows=8, max_length=small_data.MAX_LENGTH, row_texts=8)


@pytest.fixture(scope="module")
def dataset(small_dataset):
    return small_dataset


@pytest.fixture(scope="module")
def tokenizer(dataset):
    return dataset.tokenizer()


def texts_of(batch):
    """Token ids of each text of a batch by its number, read back through the slots of the chunks in use."""
    packed, found = jax.tree.map(np.asarray, batch.texts), {}
    for chunk, row, slot in np.argwhere(packed.text[: packed.chunks] < batch.text_count):
        last = packed.last[chunk, row, slot]
        here = slice(last - packed.positions[chunk, row, last], last + 1)
        assert (packed.segment_ids[chunk, row, here] == slot + 1).all()
        text = int(packed.text[chunk, row, slot])
        assert text not in found
        found[text] = packed.token_ids[chunk, row, here]
    return found


def decoded(tokenizer, ids):
    assert ids[-1] == tokenizer.end_id and (ids[:-1] != tokenizer.end_id).all()
    return tokenizer.decode(ids[:-1])


def an_epoch(dataset, config, split="train", sources=None):
    pipeline = Pipeline(dataset, split, config, seed=0, mesh=None, sources=sources)
    return pipeline, list(pipeline.steps(0, pipeline.plan.steps_per_epoch))


@pytest.mark.parametrize("per", ["batch", "row"])
def test_slots_hold_the_raw_texts_of_their_sample(dataset, tokenizer, per):
    """Over an epoch: each sample's query, its own positive and the drawn negatives, cut as the tokenizer cuts them."""
    config = BatchConfig(
        **vars(CONFIG) | {"negatives_per_sample": per, "negatives": {"retrieval": 3, "clustering": 5, "classification": 1}}
    )
    pipeline, steps = an_epoch(dataset, config)
    seen, cut = {source: set() for source in dataset.sources}, 0
    for data in steps:
        plan, batch = data.plan, data.batch
        table, found = small_data.raw(plan.source), texts_of(batch)
        B, N = CONFIG.size, pipeline.plan.max_negatives
        assert N == 5 and batch.samples.negative_mask.shape == (B, N)
        b, n = plan.columns.shape
        assert np.asarray(batch.samples.sample_mask).tolist() == [1] * b + [0] * (B - b)
        assert np.asarray(batch.samples.negative_mask).tolist() == [[1] * n + [0] * (N - n)] * b + [[0] * N] * (B - b)
        assert batch.samples.in_batch_weight == (plan.source == "pairs")
        assert data.tokens == sum(map(len, found.values()))
        assert data.padded_tokens == int(batch.texts.chunks) * CONFIG.microbatch_rows * CONFIG.row_tokens
        assert set(found) == {*range(b), *range(B, B + b), *(2 * B + i * N + j for i in range(b) for j in range(n))}
        for i in range(b):
            row = table["query"].index(decoded(tokenizer, found[i]))
            assert row not in seen[plan.source]
            seen[plan.source].add(row)
            wanted = [table["passage"][row], *(table[f"negative_{column + 1}"][row] for column in plan.columns[i])]
            numbers = [B + i, *(2 * B + i * N + j for j in range(n))]
            for number, ids in zip(numbers, tokenizer.encode(wanted, small_data.MAX_LENGTH), strict=True):
                np.testing.assert_array_equal(found[number], ids)
                cut += len(ids) == small_data.MAX_LENGTH
    assert cut > 10
    for source, info in dataset.sources.items():
        assert len(seen[source]) == info.rows["train"]


def test_a_shorter_limit_cuts_again_and_keeps_the_eos(dataset, tokenizer):
    config = BatchConfig(**vars(CONFIG) | {"max_length": 13, "row_tokens": 13})
    data = Pipeline(dataset, "train", config, seed=0, mesh=None, sources=["pairs"]).step(0)
    found = texts_of(data.batch).values()
    assert max(map(len, found)) == 13
    assert all(decoded(tokenizer, ids).startswith("pairs ") for ids in found)


def test_held_out_rows_are_not_trained_on(dataset, tokenizer):
    queries = {}
    for split in ("train", "validation"):
        _, steps = an_epoch(dataset, CONFIG, split, ["pairs"])
        queries[split] = {decoded(tokenizer, ids) for data in steps for text, ids in texts_of(data.batch).items() if text < CONFIG.size}
    assert queries["train"] | queries["validation"] == set(small_data.raw("pairs")["query"])
    assert not queries["train"] & queries["validation"] and queries["validation"]


def same(one, other):
    np.testing.assert_array_equal(one.plan.rows, other.plan.rows)
    for got, want in zip(jax.tree.leaves(one.batch), jax.tree.leaves(other.batch), strict=True):
        np.testing.assert_array_equal(got, want)


def test_threads_and_the_starting_point_change_nothing(dataset):
    pipeline = Pipeline(dataset, "train", CONFIG, seed=3, mesh=None)
    alone = [pipeline.step(step) for step in range(12)]
    for start, threads, ahead in ((0, 1, 1), (5, 4, 8)):
        run = list(Pipeline(dataset, "train", CONFIG, seed=3, mesh=None).steps(start, 12, threads, ahead))
        assert len(run) == 12 - start
        for got, want in zip(run, alone[start:], strict=True):
            same(got, want)


def test_eight_devices_hold_what_one_does(dataset):
    mesh = sharding.make_mesh(2, 2, 2)
    one, many = (Pipeline(dataset, "train", CONFIG, seed=0, mesh=m) for m in (None, mesh))
    for step in range(4):
        same(many.step(step), one.step(step))
    batch = many.step(0).batch
    assert batch.texts.token_ids.addressable_shards[0].data.shape[1:] == (2, 64)
    assert batch.samples.sample_mask.addressable_shards[0].data.shape == (6,)
    assert len(batch.texts.chunks.sharding.device_set) == 8


def test_a_batch_that_does_not_split_is_filled_up_with_absent_samples(dataset):
    config = BatchConfig(**vars(CONFIG) | {"size": 21})
    data = Pipeline(dataset, "train", config, seed=0, mesh=sharding.make_mesh(2, 2, 2), sources=["pairs"]).step(0)
    assert np.asarray(data.batch.samples.sample_mask).tolist() == [1] * 21 + [0] * 3
    assert not np.asarray(data.batch.samples.negative_mask)[21:].any()
    assert not {21, 24 + 21} & set(texts_of(data.batch))


def test_every_step_of_a_run_has_the_same_shapes(dataset):
    """So one program serves them all, whatever the source and however full its last batch."""
    _, steps = an_epoch(dataset, CONFIG)
    assert len({tuple(leaf.shape for leaf in jax.tree.leaves(data.batch)) for data in steps}) == 1
    assert len({int(data.batch.texts.chunks) for data in steps}) > 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"microbatch_rows": 6}, "microbatch_rows=6 must be a multiple of the 4 shards"),
        ({"max_length": 65}, "max_length=65 must be between 1 and row_tokens=64"),
        ({"max_length": 0}, "max_length=0 must be between 1"),
    ],
)
def test_shapes_that_cannot_work_are_refused(dataset, wrong, message):
    with pytest.raises(ValueError, match=message):
        Pipeline(dataset, "train", BatchConfig(**vars(CONFIG) | wrong), seed=0, mesh=sharding.make_mesh(2, 2, 2))
