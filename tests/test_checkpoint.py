"""Which checkpoints are made and which of them stay, with real saves."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import tiny

from f2llm_jax.configs import common
from f2llm_jax.errors import UserError
from f2llm_jax.training import checkpoint, saving
from f2llm_jax.training.checkpoint import CheckpointConfig
from f2llm_jax.training.step import TrainState
from f2llm_jax.weights.checkpoint_reader import steps_of

STATE = TrainState(jnp.int32(0), {"norm": jnp.arange(3.0)}, {"count": jnp.int32(0)})


def saved_and_kept(folder, config, total, stop=None, scores=None):
    """Saves as `training.run` does, opened anew at `stop`; the steps that were saved, and those that are there in the end."""
    saved = []
    for first, last in ((0, total),) if stop is None else ((0, stop), (stop, total)):
        with checkpoint.open_checkpoints(folder / "checkpoints", config) as checkpoints:
            for step in range(first, last + 1):
                if config.due(step, total) and step not in saved:
                    found = {"validation/accuracy": scores[step]} if scores and step in scores else {}
                    checkpoint.save(checkpoints, step, STATE, {}, checkpoint.score(config.best, found))
                    saved.append(step)
    return saved, steps_of(folder)


@pytest.mark.parametrize(
    ("config", "total", "saved", "kept"),
    [
        (CheckpointConfig(every=4, keep=2), 10, [0, 4, 8, 10], [8, 10]),
        (CheckpointConfig(every=4, keep=1, keep_every=6), 14, [0, 4, 6, 8, 12, 14], [6, 12, 14]),
        # The last three at multiples of 2 although every fifth is saved, and none of these before its time.
        (CheckpointConfig(every=5, keep=1, merge_every=2, merge_last=3), 13, [0, 5, 8, 10, 12, 13], [8, 10, 12, 13]),
        (CheckpointConfig(every=2, keep=1, keep_every=8, merge_every=4, merge_last=2), 16, list(range(0, 17, 2)), [8, 12, 16]),
    ],
)
def test_what_is_saved_and_what_stays(tmp_path, config, total, saved, kept):
    assert saved_and_kept(tmp_path / "one", config, total) == (saved, kept)
    assert saved_and_kept(tmp_path / "two", config, total, stop=saved[-3]) == (saved, kept)  # the same for a run that was killed


def test_the_best_stays_beside_the_others(tmp_path):
    config = CheckpointConfig(every=2, keep=1, merge_every=3, merge_last=1, best="validation/accuracy")
    scores = {0: 0.1, 2: 0.9, 4: 0.5, 6: 0.4}
    assert saved_and_kept(tmp_path, config, 7, scores=scores) == ([0, 2, 4, 6, 7], [2, 6, 7])


def test_the_published_trainers_last_five_for_merging():
    """It saves every 5,000 steps, and every 500 in the last 2,500."""
    config = CheckpointConfig(**common.base("0.6b", False, 2).checkpoint)
    due = [step for step in range(12_346) if config.due(step, 12_345)]
    assert due == [*range(0, 10_001, 1000), 10_500, 11_000, 11_500, 12_000, 12_345]
    assert [step for step in due if step % 500 == 0][-5:] == [10_000, 10_500, 11_000, 11_500, 12_000]


def test_a_rule_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"config.checkpoint: every=0, .*must be at least 1"):
        CheckpointConfig(every=0, keep=1)


def test_a_save_by_minutes_is_replaced_by_the_next(tmp_path):
    """Saves at 4 and 8 by the rule, at 1, 2, 5, 6 and 7 by the clock: of these the newest stays until the next save."""
    config, there = CheckpointConfig(every=4, keep=2, minutes=1), []
    with checkpoint.open_checkpoints(tmp_path / "checkpoints", config) as checkpoints:
        for step in (0, 1, 2, 4, 5, 6, 7, 8, 9):
            checkpoint.save(checkpoints, step, STATE, {})
            checkpoints.wait() if hasattr(checkpoints, "wait") else None
            there.append(sorted(found.step for found in checkpoints.checkpoints))
    assert steps_of(tmp_path) == [4, 8, 9]


def test_the_clock_is_due_by_minutes_and_starts_anew_with_every_save(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    clock, never = saving.Clock(2), saving.Clock(0)
    assert not clock.due(1)
    now[0] += 121
    assert clock.due(2) and not never.due(2)
    clock.saved()
    assert not clock.due(3)


def test_the_state_comes_back(tmp_path):
    config = CheckpointConfig(every=1, keep=1)
    with checkpoint.open_checkpoints(tmp_path / "checkpoints", config) as checkpoints:
        checkpoint.save(checkpoints, 3, STATE, {"tokenizer_fingerprint": "x"})
    place = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), STATE)
    with checkpoint.open_checkpoints(tmp_path / "checkpoints", config) as checkpoints:
        back = checkpoint.restore(checkpoints, 3, abstract)
    assert int(back.step) == 3 and back.params["norm"].tolist() == [0, 1, 2] and back.params["norm"].sharding == place


@pytest.mark.parametrize(("field", "default", "other"), [("table_rank", 0, 8), ("rope_theta", 1_000_000.0, 10_000.0)])
def test_a_field_of_the_model_that_is_not_recorded_counts_as_its_default(tmp_path, field, default, other):
    model = dataclasses.replace(tiny.CONFIG, **{field: default})
    recorded = {"decoder": {name: value for name, value in dataclasses.asdict(model).items() if name != field}}
    with checkpoint.open_checkpoints(tmp_path / "checkpoints", CheckpointConfig(every=1, keep=1)) as checkpoints:
        checkpoint.check_same_model(checkpoints, recorded, model)
        with pytest.raises(UserError, match=f"{field} {default} and not {other}"):
            checkpoint.check_same_model(checkpoints, recorded, dataclasses.replace(model, **{field: other}))
