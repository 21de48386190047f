"""The order of data: every row once an epoch, one source a step, a function of (seed, step) and nothing else."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from f2llm_jax.data.plan import NEGATIVES, Plan, PlanSource

KINDS = ("retrieval", "clustering", "classification")
SOURCES = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.builds(PlanSource, rows=st.integers(0, 23), negatives=st.integers(1, 12), kind=st.sampled_from(KINDS)),
    min_size=1,
    max_size=5,
).filter(lambda sources: any(source.rows for source in sources.values()))
few = settings(max_examples=25, deadline=None)


def epoch_steps(plan, epoch):
    return [plan.step(epoch * plan.steps_per_epoch + i) for i in range(plan.steps_per_epoch)]


def same(one, other):
    return all(np.array_equal(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))


@given(sources=SOURCES, batch_size=st.integers(1, 9), seed=st.integers(0, 2**31), epoch=st.integers(0, 3))
@few
def test_an_epoch_holds_every_row_once(sources, batch_size, seed, epoch):
    plan = Plan(sources, batch_size, seed)
    steps = epoch_steps(plan, epoch)
    assert {step.epoch for step in steps} == {epoch}
    assert plan.steps_per_epoch == sum(-(-source.rows // batch_size) for source in sources.values())
    for name, source in sources.items():
        mine = [step for step in steps if step.source == name]
        assert sorted(row for step in mine for row in step.rows) == list(range(source.rows))
        assert {step.kind for step in mine} <= {source.kind}
        # Batches are full but for one, which holds what is left.
        sizes = sorted((len(step.rows) for step in mine), reverse=True)
        assert sizes == [min(batch_size, source.rows - start) for start in range(0, source.rows, batch_size)]


@given(
    sources=SOURCES,
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    per=st.sampled_from(["batch", "row"]),
    wanted=st.dictionaries(st.sampled_from(KINDS), st.integers(0, 12)),
)
@few
def test_negatives_are_distinct_columns_that_exist(sources, batch_size, seed, per, wanted):
    plan = Plan(sources, batch_size, seed, wanted, per)
    for step in epoch_steps(plan, 0):
        stored = sources[step.source].negatives
        used = min((NEGATIVES | wanted)[step.kind], stored)
        assert step.columns.shape == (len(step.rows), used)
        assert used <= plan.max_negatives
        assert ((step.columns >= 0) & (step.columns < stored)).all()
        assert all(len(set(columns)) == used for columns in step.columns.tolist())
        assert per == "row" or (step.columns == step.columns[:1]).all()


def test_the_published_numbers_of_negatives():
    assert NEGATIVES == {"retrieval": 7, "clustering": 9, "classification": 1} | {"graded": 0}  # which is none of the published kinds
    sources = {kind: PlanSource(rows=5, negatives=24, kind=kind) for kind in KINDS}
    plan = Plan(sources, 2, seed=0)
    assert {step.kind: step.columns.shape[1] for step in epoch_steps(plan, 0)} == {kind: NEGATIVES[kind] for kind in KINDS}
    assert plan.max_negatives == 9


@given(sources=SOURCES, batch_size=st.integers(3, 9), seed=st.integers(0, 2**31), data=st.data())
@settings(max_examples=8, deadline=None)
def test_a_step_is_a_function_of_seed_and_step(sources, batch_size, seed, data):
    """Whatever the order in which sources are named, steps are asked for, or other steps were asked for before."""
    shuffled = dict(data.draw(st.permutations(list(sources.items()))))
    one, other = Plan(sources, batch_size, seed), Plan(shuffled, batch_size, seed)
    steps = [one.step(i) for i in range(2 * one.steps_per_epoch)]
    for i in data.draw(st.permutations(range(len(steps)))):
        assert same(other.step(i), steps[i])


def test_epochs_seeds_and_batches_differ():
    sources = {"a": PlanSource(60, 24, "retrieval"), "b": PlanSource(40, 24, "retrieval")}
    plan, other = Plan(sources, 10, seed=0), Plan(sources, 10, seed=1)
    first, second, elsewhere = epoch_steps(plan, 0), epoch_steps(plan, 1), epoch_steps(other, 0)
    for steps in (second, elsewhere):
        assert [step.source for step in steps] != [step.source for step in first]
        assert [step.rows.tolist() for step in steps if step.source == "a"] != [s.rows.tolist() for s in first if s.source == "a"]
        # Not the same batches in another order either.
        assert {frozenset(step.rows.tolist()) for step in steps} != {frozenset(step.rows.tolist()) for step in first}
    draws = [tuple(step.columns[0]) for step in first + second]
    assert len(set(draws)) > len(draws) // 2
    assert [step.rows.tolist() for step in first if step.source == "a"] != [list(range(i, i + 10)) for i in range(0, 60, 10)]


def test_columns_a_row_differ_and_columns_a_batch_do_not():
    source = {"a": PlanSource(30, 24, "retrieval")}
    per_row, per_batch = (Plan(source, 30, seed=0, negatives_per_sample=per).step(0).columns for per in ("row", "batch"))
    assert len({tuple(row) for row in per_row}) == 30
    assert len({tuple(row) for row in per_batch}) == 1
    # All stored columns get their turn.
    assert {int(column) for row in per_row for column in row} == set(range(24))


def test_sources_come_mixed():
    """Steps of a source are spread over an epoch, not run one source after the other."""
    plan = Plan({"a": PlanSource(500, 1, "retrieval"), "b": PlanSource(500, 1, "clustering")}, 10, seed=0)
    names = [step.source for step in epoch_steps(plan, 0)]
    assert 15 < names[:50].count("a") < 35


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sources": {"a": PlanSource(0, 1, "retrieval")}}, "no source has any row"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"negatives_per_sample": "epoch"}, "'epoch' must be 'batch' or 'row'"),
    ],
)
def test_what_cannot_be_planned_is_refused(wrong, message):
    arguments = {"sources": {"a": PlanSource(3, 1, "retrieval")}, "batch_size": 2, "seed": 0}
    with pytest.raises(ValueError, match=message):
        Plan(**arguments | wrong)
