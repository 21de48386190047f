"""Causal grouped-query attention over packed rows: several kernels behind one signature.

* "xla": plain matrix products, on every device and for every shape, `XLA_BLOCK` queries at a time against the keys before them.
* "splash": the TPU kernel that comes with JAX. It holds a block of scores at a time and skips blocks above the diagonal.
* "cudnn": the fused kernel of NVIDIA's library, through `jax.nn.dot_product_attention`.

`choose` says which one a device takes.
"""

from collections.abc import Callable
from typing import Literal, cast, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from f2llm_jax import sharding
from f2llm_jax.errors import UserError
from f2llm_jax.model import splash

Kernel = Literal["xla", "splash", "cudnn"]
XLA_BLOCK = 128  # queries; on a CPU finer ones lose more in small products than they save above the diagonal


def saving_names(*names: str) -> Callable[..., bool]:
    """A rematerialisation policy that keeps values of these names and what a fused kernel has for its own backward pass.

    The TPU kernel names that itself; cuDNN's is what a primitive of JAX returns.
    """
    named = jax.checkpoint_policies.save_only_these_names(splash.RESIDUAL, *names)
    cudnn = lambda primitive, *_, **__: primitive.name == "dot_product_attention_fwd_wrapper"  # noqa: E731
    return jax.checkpoint_policies.save_from_both_policies(named, cudnn)


def choose_kernel(wanted: str, platform: str, dtype: jnp.dtype, row_tokens: int, head_dim: int) -> Kernel:
    """The kernel for devices of a `platform` ("cpu", "gpu", "tpu"): the one `wanted`, or with "auto" the best that serves.

    On TPUs that is "splash" for bfloat16 where row and head are multiples of 128, else "xla". On GPUs it is "xla": "cudnn" is to
    be asked for by name.

    Raises:
      ValueError: no such kernel, or it cannot serve this platform, dtype or shape.
    """
    lanes = row_tokens % splash.LANES == 0 and head_dim % splash.LANES == 0
    if wanted == "auto":
        return "splash" if platform == "tpu" and dtype == jnp.bfloat16 and lanes and splash.available() else "xla"
    if wanted not in get_args(Kernel):
        raise UserError(f"there is no attention kernel {wanted!r}; take auto, {', '.join(get_args(Kernel))}")
    if wanted == "splash" and not (platform == "tpu" and lanes):
        raise UserError(
            f"attention=splash needs a TPU and multiples of {splash.LANES} as row_tokens and head_dim; "
            f"here are {platform!r}, {row_tokens} and {head_dim}: take attention=auto or xla"
        )
    if wanted == "splash" and not splash.available():
        raise UserError(f"attention=splash: JAX {jax.__version__} does not have the kernel; take attention=auto or xla")
    if wanted == "cudnn" and not (platform == "gpu" and dtype != jnp.float32):
        raise UserError(f"attention=cudnn needs an NVIDIA GPU and 16 bits, here are {platform!r} and {dtype}: take attention=auto or xla")
    return cast(Kernel, wanted)


def attention(
    q: Float[Array, "H R T E"],
    k: Float[Array, "K R T E"],
    v: Float[Array, "K R T E"],
    segment_ids: Int[Array, "R T"],
    kernel: Kernel = "xla",
) -> Float[Array, "R H T E"]:
    """Softmax attention in which a position sees itself and earlier positions of its own segment.

    Query head h reads key/value head `h // (H / K)`. Scores are scaled by `E ** -0.5` and the softmax is fp32 whatever
    the dtype of the inputs. Segment 0 is padding: it attends within itself and nobody reads it.
    Heads come first and leave second because that is how the TPU kernel reads and writes, so nothing is copied around it.
    """
    if kernel == "xla":
        return _xla(q, k, v, segment_ids)
    local = splash.splash if kernel == "splash" else _cudnn
    if not sharding.in_mesh():
        return local(q, k, v, segment_ids)
    # Rows and heads do not meet in attention, so each device runs the kernel on its own.
    specs = (sharding.HEADS_RTE, sharding.HEADS_RTE, sharding.HEADS_RTE, sharding.ROWS_T)
    return jax.shard_map(local, in_specs=specs, out_specs=sharding.ROWS_HTE, check_vma=False)(q, k, v, segment_ids)


def _xla(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
    H, R, T, E = q.shape
    K = k.shape[0]
    # Explicit specs: with H split over `tensor`, splitting H into (K, H/K) keeps the split on K.
    grouped = q.reshape(K, H // K, R, T, E, out_sharding=sharding.spec(sharding.P("tensor", None, sharding.BATCH, None, None)))
    visible = _visible(segment_ids)
    mixed = []
    for start in range(0, T, XLA_BLOCK):
        end = min(start + XLA_BLOCK, T)
        queries = grouped[..., start:end, :]
        scores = jnp.einsum("kgrte,krse->rkgts", queries, k[:, :, :end], preferred_element_type=jnp.float32) * E**-0.5
        scores = jnp.where(visible[:, None, None, start:end, :end], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        mixed.append(jnp.einsum("rkgts,krse->rkgte", weights, v[:, :, :end]))
    return jnp.concatenate(mixed, axis=3).reshape(R, H, T, E, out_sharding=sharding.spec(sharding.ROWS_HTE))


def _visible(segment_ids: Int[Array, "R T"]) -> Bool[Array, "R T T"]:
    position = jnp.arange(segment_ids.shape[1])
    return (position[:, None] >= position[None, :]) & (segment_ids[:, :, None] == segment_ids[:, None, :])


def _cudnn(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
    """One device's rows and heads. The mask says all; that it is causal lets the kernel pass over what lies above the diagonal.

    JAX 0.10.2 passes the mask as a bias, `[R, 1, T, T]` in the queries' dtype, and computes a gradient of it that nobody reads.
    """
    q, k, v = (jnp.transpose(x, (1, 2, 0, 3)) for x in (q, k, v))
    mask = _visible(segment_ids)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn").swapaxes(1, 2)
