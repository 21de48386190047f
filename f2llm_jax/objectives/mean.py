"""A mean that has not been taken yet, so that masks, chunks and hosts cannot change an average."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Mean(NamedTuple):
    """A weighted sum and its count; divided once, at the very end."""

    sum: Float[Array, ""]
    count: Float[Array, ""]  # type: ignore[assignment]  # a tuple's own `count` is not for us

    @property
    def value(self) -> Float[Array, ""]:
        """sum / count, and 0 where nothing was counted."""
        return self.sum / jnp.maximum(self.count, 1.0)


def mean_of(values: Float[Array, "..."], mask: Float[Array, "..."]) -> Mean:
    """The mean of the values whose mask is 1."""
    return Mean(jnp.sum(values * mask), jnp.sum(mask))
