"""Which held-out batches are scored: a budget that is kept, every source over time, unbiased figures, a small share of the time."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from f2llm_jax.configs import common
from f2llm_jax.model.flops import Work, training_flops
from f2llm_jax.model.sizes import SIZES
from f2llm_jax.training.held_out import draw

SIZES_OF = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=4), st.integers(1, 40), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(batches=SIZES_OF, budget=st.integers(1, 60), seed=st.integers(0, 9), turn=st.integers(0, 50))
def test_the_budget_is_kept(batches, budget, seed, turn):
    every, in_turn = draw(batches, budget, seed, turn)
    assert sum(every.values()) + sum(in_turn.values()) == min(budget, sum(batches.values()))
    assert not every.keys() & in_turn.keys() and every
    assert all(1 <= count <= batches[name] for name, count in (every | in_turn).items())
    assert (every, in_turn) == draw(dict(reversed(batches.items())), budget, seed, turn)
    assert every == draw(batches, budget, seed, turn + 1)[0]
    if budget >= len(batches):
        assert every.keys() == batches.keys() and not in_turn


def test_every_source_has_its_turn():
    batches = dict.fromkeys(map(str, range(484)), 2)
    seen = collections.Counter(name for turn in range(30) for part in draw(batches, 64, 0, turn) for name in part)
    assert seen.keys() == batches.keys()
    fixed = draw(batches, 64, 0, 0)[0]
    assert len(fixed) == 48 and all(seen[name] == 30 for name in fixed)


def test_more_than_one_of_each_in_proportion():
    assert draw({"a": 100, "b": 50, "c": 1}, 31, 0, 0)[0] == {"a": 20, "b": 10, "c": 1}


def test_the_figure_is_unbiased():
    """Simulated: sources of very different size and difficulty; the mean over draws against the mean over all sources, within 4 errors."""
    rng = np.random.default_rng(0)
    batches = {str(i): int(size) for i, size in enumerate(rng.integers(1, 30, 200))}
    loss = {name: rng.normal(3 + 0.05 * size, 0.2, size) + rng.normal() for name, size in batches.items()}  # larger ones are harder
    want = np.mean([loss[name].mean() for name in batches])
    for budget in (20, 64, 400):
        found = []
        for seed in range(600):
            every, _ = draw(batches, budget, seed, 0)
            shuffled = np.random.default_rng((seed, 1))
            found.append(np.mean([shuffled.permutation(loss[name])[:count].mean() for name, count in every.items()]))
        error = np.std(found) / np.sqrt(len(found))
        assert abs(np.mean(found) - want) < 4 * error + 1e-9, budget
        if budget < 200:
            proportional = np.mean([loss[name].mean() for name in batches for _ in range(batches[name])])
            assert abs(proportional - want) > 20 * error / np.sqrt(64 / budget)  # what a draw in proportion to size alone would give


@pytest.mark.parametrize("size", common.LEARNING_RATE)
def test_a_validation_takes_less_than_three_hundredths_of_the_time(size):
    """By FLOPs: a training step is three forward passes of the student at least, a held-out batch is one."""
    config = common.base(size, False, 2)
    step = training_flops(SIZES[size], Work(tokens=4608 * 128, squares=4608 * 128**2))
    spent = config.eval.batches * step / 3
    assert 0.01 < spent / (spent + config.eval.every * step) < 0.03
