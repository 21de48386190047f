"""The published optimizer: AdamW on every parameter, linear warm-up, a decaying or constant rate with a floor, global-norm clipping."""

import dataclasses
from typing import Literal, get_args

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from f2llm_jax.errors import UserError

Schedule = Literal["cosine", "linear", "constant_with_warmup"]  # the names of transformers' `get_scheduler`


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Hyper-parameters; the defaults are those of the published code (F2LLM `run.py`, `configs/config.json`)."""

    learning_rate: float  # peak
    warmup_steps: int  # updates of linear warm-up from 0, unless they exceed `warmup_share`
    total_steps: int  # updates after which a decaying rate reaches 0 (and the floor takes over)
    schedule: Schedule = "cosine"  # after the warm-up
    min_learning_rate: float = 1e-7  # floor from update 1 on; update 0 really has rate 0, as in the published trainer
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-8
    weight_decay: float = 0.01  # decoupled, on all parameters, norms and embeddings included
    clip_norm: float = 1.0  # global gradient norm above which gradients are scaled down to it
    warmup_share: float = 1.0  # largest part of all updates that warm-up takes

    def __post_init__(self) -> None:
        if self.schedule not in get_args(Schedule):
            raise UserError(f"schedule={self.schedule!r} must be one of {', '.join(map(repr, get_args(Schedule)))}")
        if self.total_steps < 1:
            raise UserError(f"total_steps={self.total_steps} must be at least 1")
        if self.warmup_steps < 0 or not 0 <= self.warmup_share <= 1:
            raise UserError(f"warmup_steps={self.warmup_steps} must be at least 0 and warmup_share={self.warmup_share} from 0 to 1")
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise UserError(f"min_learning_rate={self.min_learning_rate} must lie between 0 and learning_rate={self.learning_rate}")

    @property
    def warmup(self) -> int:
        """Updates of warm-up, below `total_steps`."""
        return min(self.warmup_steps, int(self.warmup_share * self.total_steps), self.total_steps - 1)


def learning_rate(config: OptimizerConfig, step: Int[Array, ""]) -> Float[Array, ""]:
    """The rate of update `step` (0-based), fp32."""
    warmup = step / max(1, config.warmup)
    progress = jnp.clip((step - config.warmup) / max(1, config.total_steps - config.warmup), 0.0, 1.0)
    after = jnp.ones_like(progress)
    if config.schedule == "linear":
        after = 1.0 - progress
    elif config.schedule == "cosine":
        after = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    rate = config.learning_rate * jnp.where(step < config.warmup, warmup, after)
    return jnp.where(step > 0, jnp.maximum(rate, config.min_learning_rate), rate)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip, then AdamW under the schedule. Moments are fp32 and sharded like the parameters."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            lambda count: learning_rate(config, count),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
        ),
    )
