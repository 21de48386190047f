"""The order of an epoch's batches: the published rule against itself, what options do to counts, speed and memory at full size."""

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_rules import published_order

from f2llm_jax.data.order import EpochOrder, Sampling
from f2llm_jax.data.plan import Plan, PlanSource
from f2llm_jax.preparation.catalogue import CAP, load_catalogue

few = settings(max_examples=40, deadline=None)
BATCHES = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(1, 40), min_size=1, max_size=6)


def epoch_order(batches, seed=0, units=None, **sampling):
    return EpochOrder(batches, units or {name: name for name in batches}, seed, Sampling(**sampling))


def names_of(order, batches, epoch):
    names = list(batches)
    return [names[source] for source in order.order(epoch)[0]]


def composite(cap):
    """Batches of every file of the release; the rows of a source, known as a sum, are spread evenly over its files."""
    found = {}
    for source in load_catalogue("f2llm_v2").sources:
        for unit in source.units:
            rows = source.rows * len(unit.files) / len(source.files)
            for name, files in unit.batch_groups().items():
                found[name] = max(1, round(0.99 * min(rows, cap) * len(files) / len(unit.files) / 512))
    return found


@given(batches=BATCHES, seed=st.integers(0, 2**31), order=st.sampled_from(["uniform", "published"]), epoch=st.integers(0, 3))
@few
def test_an_epoch_holds_every_batch_once(batches, seed, order, epoch):
    sources, numbers = epoch_order(batches, seed, order=order).order(epoch)
    for i, count in enumerate(batches.values()):
        mine = numbers[sources == i].tolist()
        assert sorted(mine) == list(range(count))
        assert order == "uniform" or mine == list(range(count))


def test_the_first_draws_have_the_published_probabilities():
    """Of the sequences of the first three draws from three sources, each as often as the published rule gives it."""
    batches = {"a": 1, "b": 2, "c": 4}
    ours = epoch_order(batches, order="published")
    epochs = 6000
    counted = [{}, {}]
    for epoch in range(epochs):
        for found, first in zip(counted, (names_of(ours, batches, epoch), published_order(batches, epoch)), strict=True):
            key = "".join(first[:3])
            found[key] = found.get(key, 0) + 1
    assert counted[0].keys() == counted[1].keys()
    for key, count in counted[1].items():
        assert abs(counted[0].get(key, 0) - count) < 5 * np.sqrt(2 * count) + 5, key


def late_small(order, small, share=50):
    last = order[-len(order) // share :]
    return np.mean([name in small for name in last]), len(set(order[-300:]))


def test_the_end_of_a_full_epoch_is_the_published_one():
    """Small sources at the end, as the published rule leaves them; a uniform order does not."""
    batches = composite(CAP)
    small = {name for name, count in batches.items() if count <= 20}
    overall = sum(batches[name] for name in small) / sum(batches.values())
    orders = {name: epoch_order(batches, order=name) for name in ("uniform", "published")}
    found = {name: np.mean([late_small(names_of(order, batches, e), small) for e in range(12)], axis=0) for name, order in orders.items()}
    loop = np.mean([late_small(published_order(batches, epoch), small) for epoch in range(6)], axis=0)
    assert loop[0] > 4 * overall
    assert found["published"][0] == pytest.approx(loop[0], rel=0.15)
    assert found["published"][1] == pytest.approx(loop[1], rel=0.15)
    assert found["uniform"][0] == pytest.approx(overall, rel=0.2) and found["uniform"][1] > 1.5 * loop[1]


@pytest.mark.parametrize("order", ["uniform", "published"])
def test_an_order_at_full_size_is_cheap(order):
    found = epoch_order(composite(float("inf")), order=order)
    assert found.steps_per_epoch > 100_000
    seconds = []
    for epoch in range(5):
        begun = time.thread_time()
        found.order(epoch)
        seconds.append(time.thread_time() - begun)
    tracemalloc.start()
    found.order(9)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert min(seconds) < 0.05 and peak < 2**29


@given(batches=BATCHES, seed=st.integers(0, 2**31), order=st.sampled_from(["uniform", "published"]), data=st.data())
@few
def test_counts_are_as_asked(batches, seed, order, data):
    weights = {name: data.draw(st.sampled_from([0.25, 0.5, 1, 2, 3])) for name in batches}
    repeats = {name: data.draw(st.integers(1, 3)) for name in batches}
    temperature = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    write = lambda values: ",".join(f"{name}={value}" for name, value in values.items())  # noqa: E731
    found = epoch_order(batches, seed, order=order, weights=write(weights), repeats=write(repeats), temperature=temperature)
    counts = dict(zip(batches, found.counts(0).tolist(), strict=True))
    most = {name: repeats[name] * batches[name] for name in batches}
    shares = {name: weights[name] * most[name] ** temperature for name in batches}
    full = min(most[name] / shares[name] for name in batches)
    for name in batches:
        assert abs(counts[name] - full * shares[name]) <= 1 and 1 <= counts[name] <= most[name]
    assert any(counts[name] == most[name] for name in batches)
    sources, numbers = found.order(0)
    for i, name in enumerate(batches):
        assert sorted(numbers[sources == i].tolist()) == list(range(counts[name]))


def test_rows_come_once_an_epoch_unless_repeats_say_otherwise():
    sources = {"a": PlanSource(95, 3, "retrieval", "u"), "b": PlanSource(41, 3, "retrieval", "u"), "c": PlanSource(60, 3, "retrieval")}
    plan = Plan(sources, 10, 0, sampling=Sampling(repeats="c=3", weights="u=0.5"))
    for epoch in range(2):
        steps = [plan.step(epoch * plan.steps_per_epoch + i) for i in range(plan.steps_per_epoch)]
        rows = {name: [row for step in steps if step.source == name for row in step.rows.tolist()] for name in sources}
        assert sorted(rows["c"]) == sorted(3 * list(range(60)))
        for name, share in (("a", 5), ("b", 2)):  # half of 10 and of 5 batches
            assert len(set(rows[name])) == len(rows[name]) and len([s for s in steps if s.source == name]) in (share, share + 1)
        passes = [frozenset(step.rows.tolist()) for step in steps if step.source == "c"]
        assert len(set(passes)) == len(passes)  # each pass shuffled anew


@pytest.mark.parametrize("order", ["uniform", "published"])
def test_a_source_starts_late_and_epochs_before_it_are_shorter(order):
    batches = {"early": 60, "half": 20, "second": 10}
    found = epoch_order(batches, order=order, starts="half=0.5,second=1")
    assert [found.counts(epoch).tolist() for epoch in range(2)] == [[60, 20, 0], [60, 20, 10]]
    assert found.steps(1) == 80 and found.steps(3) == 80 + 2 * 90 and found.steps_per_epoch == 90
    assert [found.locate(step) for step in (0, 79, 80, 169, 170)] == [(0, 0), (0, 79), (1, 0), (1, 89), (2, 0)]
    names = names_of(found, batches, 0)
    assert 20 < names.index("half") < 45
    assert "half" in names_of(found, batches, 1)[:30]
    plan = Plan(
        {name: PlanSource(10 * count, 1, "retrieval") for name, count in batches.items()}, 10, 0, sampling=Sampling(starts="second=1")
    )
    assert {plan.step(step).source for step in range(80)} == {"early", "half"}
    assert {plan.step(step).epoch for step in range(80, 170)} == {1}


@pytest.mark.parametrize("order", ["uniform", "published"])
def test_a_run_resumed_within_an_epoch_continues_it(order):
    """A plan that begins in the middle gives the steps of one that began at the start; so does any host."""
    sources = {"a": PlanSource(45, 9, "retrieval"), "b": PlanSource(23, 9, "clustering"), "c": PlanSource(60, 1, "classification")}
    plan = lambda: Plan(sources, 5, 3, sampling=Sampling(order=order, weights="a=2", starts="b=0.4"))  # noqa: E731
    whole = plan()
    steps = [whole.step(step) for step in range(2 * whole.steps_per_epoch)]
    for step in range(whole.steps_per_epoch // 2, len(steps), 7):
        again = plan().step(step)
        assert (again.epoch, again.source) == (steps[step].epoch, steps[step].source)
        np.testing.assert_array_equal(again.rows, steps[step].rows)
        np.testing.assert_array_equal(again.columns, steps[step].columns)


def test_the_published_tail_and_single_negative():
    sources = {"a": PlanSource(25, 9, "retrieval"), "b": PlanSource(3, 9, "retrieval")}
    plan = Plan(sources, 10, 0, {"retrieval": 1}, single_negative="first", tail="repeated")
    steps = [plan.step(i) for i in range(plan.steps_per_epoch)]
    assert all(len(step.rows) == 10 and not step.columns.any() and step.columns.shape == (10, 1) for step in steps)
    (small,) = (step.rows.tolist() for step in steps if step.source == "b")
    assert sorted(set(small)) == [0, 1, 2] and small[:3] == small[3:6] == small[6:9]
    plan = Plan({"a": sources["a"]}, 10, 0, tail="repeated", sampling=Sampling(order="published"))
    first, _, last = (plan.step(i).rows.tolist() for i in range(3))
    assert last[5:] == first[:5]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"order": "random"}, "data.order='random' must be 'uniform' or 'published'"),
        ({"temperature": 2.0}, "data.temperature=2.0 must be between 0 and 1"),
        ({"weights": "squd=2"}, "data.weights names 'squd', which is no source of the dataset and no unit; did you mean squad"),
        ({"weights": "squad"}, "data.weights='squad': 'squad' is not of the form source=number"),
        ({"repeats": "squad=1.5"}, "data.repeats must be whole numbers from 1"),
        ({"weights": "squad=-1"}, "must not be negative"),
        ({"weights": "squad=0,paq=0"}, "leave no source for the first epoch"),
        ({"starts": "squad=1,paq=0.5,other=1"}, "'other', which is no source"),
    ],
)
def test_what_cannot_be_sampled_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        epoch_order({"squad": 3, "paq": 2}, **wrong)
