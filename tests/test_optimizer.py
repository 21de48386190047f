"""The optimizer against torch's AdamW under transformers' schedule, in float64, with the published floor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from f2llm_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer

CONFIG = OptimizerConfig(
    learning_rate=0.02, warmup_steps=4, total_steps=10, min_learning_rate=2e-3, weight_decay=0.3, beta2=0.9, clip_norm=1.5
)
STEPS = 14  # beyond the end of the cosine
SHAPES = {"matrix": (3, 4), "norm": (4,)}


def published_rates(config, steps):
    """Transformers' schedule of that name; from update 1 on the trainer lifts the rate to the floor."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    schedule = transformers.get_scheduler(config.schedule, optimizer, config.warmup_steps, config.total_steps)
    rates = []
    for step in range(steps):
        (rate,) = schedule.get_last_lr()
        # A finished cosine comes up again in transformers' formula unless it is cut at its end, as training is.
        rate = 0.0 if step > config.total_steps and config.schedule == "cosine" else rate
        rates.append(max(rate, config.min_learning_rate) if step else rate)
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_the_schedule_is_the_published_one(warmup):
    config = OptimizerConfig(learning_rate=0.02, warmup_steps=warmup, total_steps=10, min_learning_rate=2e-3)
    got = [float(learning_rate(config, jnp.int32(step))) for step in range(STEPS)]
    np.testing.assert_allclose(got, published_rates(config, STEPS), rtol=2e-6, atol=1e-9)
    assert got[0] == (0.0 if warmup else np.float32(0.02))
    assert max(got) == np.float32(0.02) and min(got[1:]) == np.float32(2e-3) == got[-1]


@pytest.mark.parametrize("warmup", [0, 4])
def test_a_linear_decay_is_that_of_transformers(warmup):
    config = OptimizerConfig(learning_rate=0.02, warmup_steps=warmup, total_steps=10, min_learning_rate=1e-3, schedule="linear")
    got = [float(learning_rate(config, jnp.int32(step))) for step in range(STEPS)]
    np.testing.assert_allclose(got, published_rates(config, STEPS), rtol=2e-6, atol=1e-9)
    assert got[-1] == np.float32(1e-3) < got[9]


@pytest.mark.parametrize("warmup", [0, 4])
def test_a_constant_rate_after_the_warm_up_is_that_of_transformers(warmup):
    config = OptimizerConfig(
        learning_rate=0.02, warmup_steps=warmup, total_steps=10, min_learning_rate=7e-3, schedule="constant_with_warmup"
    )
    got = [float(learning_rate(config, jnp.int32(step))) for step in range(STEPS)]
    np.testing.assert_allclose(got, published_rates(config, STEPS), rtol=2e-6, atol=1e-9)
    assert set(got[warmup:]) == {float(np.float32(0.02))} and (not warmup or got[1] == np.float32(7e-3))


def test_updates_are_those_of_torch():
    """Decay on every tensor, norms too; gradients clipped when their global norm is above the limit and only then."""
    rng = np.random.default_rng(0)
    start = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    gradients = [{name: rng.normal(size=shape) * 0.7 ** (i % 5 * 2) for name, shape in SHAPES.items()} for i in range(STEPS)]
    norms = [np.sqrt(sum((g**2).sum() for g in gradient.values())) for gradient in gradients]
    assert min(norms) < CONFIG.clip_norm < max(norms)

    theirs = {name: torch.tensor(value, requires_grad=True) for name, value in start.items()}
    peer = torch.optim.AdamW(
        theirs.values(), betas=(CONFIG.beta1, CONFIG.beta2), eps=CONFIG.epsilon, weight_decay=CONFIG.weight_decay
    )  # fmt: skip
    optimizer = make_optimizer(CONFIG)
    ours = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
    state = optimizer.init(ours)
    for step, (gradient, rate) in enumerate(zip(gradients, published_rates(CONFIG, STEPS), strict=True)):
        for name, tensor in theirs.items():
            tensor.grad = torch.tensor(gradient[name])
        torch.nn.utils.clip_grad_norm_(theirs.values(), CONFIG.clip_norm)
        peer.param_groups[0]["lr"] = rate
        peer.step()
        updates, state = optimizer.update(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradient), state, ours)
        ours = jax.tree.map(jnp.add, ours, updates)
        for name, tensor in theirs.items():
            np.testing.assert_allclose(ours[name], tensor.detach(), atol=3e-6, err_msg=f"{name}, update {step}")
            if step == 0:
                np.testing.assert_array_equal(ours[name], start[name].astype(np.float32))
    assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim} == {jnp.dtype("float32")}


def test_the_defaults_are_published():
    defaults = OptimizerConfig(learning_rate=1e-5, warmup_steps=500, total_steps=1000)
    assert (defaults.min_learning_rate, defaults.beta1, defaults.beta2, defaults.epsilon) == (1e-7, 0.9, 0.98, 1e-8)
    assert (defaults.weight_decay, defaults.clip_norm) == (0.01, 1.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"schedule": "step"}, "schedule='step' must be one of 'cosine', 'linear', 'constant_with_warmup'"),
        ({"warmup_share": 1.5}, "warmup_share=1.5 from 0 to 1"),
        ({"total_steps": 0}, "total_steps=0 must be at least 1"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be at least 0"),
        ({"min_learning_rate": 0.1}, "min_learning_rate=0.1 must lie between 0 and learning_rate=0.02"),
    ],
)
def test_what_cannot_be_a_schedule_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**{"learning_rate": 0.02, "warmup_steps": 1, "total_steps": 10} | wrong)


@pytest.mark.parametrize(("total", "updates"), [(1, 0), (38, 3), (4_999, 499), (5_000, 500), (100_000, 500)])
def test_warm_up_is_at_most_a_share_of_the_run(total, updates):
    """The published 500 updates where a run is long enough for them."""
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=500, warmup_share=0.1, total_steps=total, min_learning_rate=0.0)
    assert config.warmup == updates
    assert float(learning_rate(config, jnp.int32(updates))) == pytest.approx(1.0)
    assert OptimizerConfig(learning_rate=1.0, warmup_steps=30, total_steps=38).warmup == 30  # absolute where the share allows it
