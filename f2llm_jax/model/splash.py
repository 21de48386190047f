"""The TPU's fused attention kernel, which JAX ships among its experimental ones. It is known from JAX 0.10 to 0.12."""

import importlib.util

import jax
from jax import Array

from f2llm_jax.jax_version import warn_if_newer

LANES = 128  # the TPU's vector width, of which the kernel takes whole multiples
# Queries, and keys, of a block: the first that divides a row. A step of the kernel's grid has a fixed price, so coarse blocks win until
# the work above the diagonal costs more.
BLOCKS = (512, 256, 128)
# The fused backward kernel writes a partial sum of the queries' gradient for each block of keys. Up to this many keys it takes a whole
# row as one block: nothing is left to add up, for a quarter more products.
BACKWARD_KEYS = 1024
RESIDUAL = "attention"  # the name of what the kernel keeps for its own backward pass
_PACKAGE = "jax.experimental.pallas.ops.tpu.splash_attention"


def available() -> bool:
    """Whether this JAX has the kernel."""
    try:
        return importlib.util.find_spec(_PACKAGE) is not None
    except ModuleNotFoundError:
        return False


def splash(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
    """One device's rows and heads, `[H or K, R, T, E]` to `[R, H, T, E]`. The kernel does not scale, so the queries are scaled here."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    warn_if_newer(__name__, "if it fails, pass --config.attention=xla")
    H, _, T, E = q.shape
    block = next(block for block in BLOCKS if T % block == 0)
    keys = T if T <= BACKWARD_KEYS else block
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=keys, block_kv_dkv_compute=block, use_fused_bwd_kernel=True
    )
    causal = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((T, T))] * H)
    kernel = splash_attention_kernel.make_splash_mha(
        causal, head_shards=1, q_seq_shards=1, block_sizes=sizes, residual_checkpoint_name=RESIDUAL
    )
    segments = splash_attention_kernel.SegmentIds(segment_ids, segment_ids)
    return jax.vmap(kernel, in_axes=(1, 1, 1, 0))(q * E**-0.5, k, v, segments)
