"""Matryoshka widths, their weights, and cosines at all widths for the price of one."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from f2llm_jax.errors import UserError

TINY = 1e-24  # floor of a squared norm; torch's normalize floors the norm at 1e-12


def matryoshka_dims(width: int, minimum: int = 8) -> tuple[int, ...]:
    """The published widths, ascending: every power of two from `minimum` up to below `width`, then `width`."""
    powers = (2**k for k in range(width.bit_length()))
    return (*(d for d in powers if minimum <= d < width), width)


def matryoshka_weights(dims: Sequence[int]) -> tuple[float, ...]:
    """`1 / (n * sqrt(largest / d))` for the n-th largest d, in the order of `dims`; not normalised (F2LLM `utils.py`)."""
    largest_first = sorted(dims, reverse=True)
    return tuple(1.0 / ((largest_first.index(d) + 1) * math.sqrt(largest_first[0] / d)) for d in dims)


def check_dims(dims: Sequence[int], width: int) -> None:
    """Raises a ValueError unless `dims` ascend without repeats between 1 and `width`."""
    if not dims or list(dims) != sorted(set(dims)) or not 0 < dims[0] <= dims[-1] <= width:
        raise UserError(f"matryoshka dims {tuple(dims)} must ascend without repeats between 1 and the width {width}")


def prefix_cosines(
    contract: str,
    a: Float[Array, "... D"],
    b: Float[Array, "... D"],
    outer: Callable[[Array, Array], Array],
    dims: Sequence[int],
    dtype: str = "float32",
) -> Float[Array, "J ..."]:
    """Cosines of `a[..., :d]` and `b[..., :d]` for each of the J ascending dims, in `dtype`.

    In another dtype than float32 every intermediate result is rounded to it, as torch does.
    Otherwise running sums over the bands between the dims: each component is multiplied and squared once, whatever J.

    Args:
      contract: einsum of the dot product over the last axes, e.g. "bd,cd->bc".
      a, b: raw vectors.
      outer: combines `[...]` norms of a and of b into the shape of the dot product.
      dims: ascending, the last at most D.
    """
    check_dims(dims, a.shape[-1])
    if dtype != "float32":
        return jnp.stack([_rounded_cosine(contract, a[..., :dim], b[..., :dim], jnp.dtype(dtype)) for dim in dims])
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    dot = squares_a = squares_b = jnp.float32(0)
    cosines = []
    for low, high in zip((0, *dims[:-1]), dims, strict=True):
        band_a, band_b = a[..., low:high], b[..., low:high]
        dot = dot + jnp.einsum(contract, band_a, band_b, precision=jax.lax.Precision.HIGHEST)
        squares_a = squares_a + jnp.sum(band_a * band_a, axis=-1)
        squares_b = squares_b + jnp.sum(band_b * band_b, axis=-1)
        cosines.append(dot * outer(inverse_norm(squares_a), inverse_norm(squares_b)))
    return jnp.stack(cosines)


def _rounded_cosine(contract: str, a: Float[Array, "... D"], b: Float[Array, "... D"], dtype: jnp.dtype) -> Float[Array, "..."]:
    def unit(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x = x.astype(dtype).astype(jnp.float32)
        norm = jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), TINY)).astype(dtype).astype(jnp.float32)
        return (x / norm).astype(dtype)

    return jnp.einsum(contract, unit(a), unit(b), preferred_element_type=jnp.float32).astype(dtype)


def inverse_norm(squares: Float[Array, "..."]) -> Float[Array, "..."]:
    return jax.lax.rsqrt(jnp.maximum(squares, TINY))
