"""The TPU's fused attention kernel, which JAX ships among its experimental ones. It is known from JAX 0.10 to 0.12."""

import importlib.util

import jax
from jax import Array

from f2llm_jax.jax_version import warn_if_newer

LANES = 128  # the TPU's vector width, of which the kernel takes whole multiples
# Of queries and of keys. Coarser ones compute more above the diagonal; finer ones move more memory, because the fused backward
# kernel writes a share of the queries' gradient for each block of keys.
BLOCK = 256
RESIDUAL = "attention"  # the name of what the kernel keeps for its own backward pass
_PACKAGE = "jax.experimental.pallas.ops.tpu.splash_attention"


def available() -> bool:
    """Whether this JAX has the kernel."""
    try:
        return importlib.util.find_spec(_PACKAGE) is not None
    except ModuleNotFoundError:
        return False


def splash(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
    """One device's rows and heads, `[R, T, H or K, E]`. The kernel does not scale, so the queries come scaled."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    warn_if_newer(__name__, "if it fails, pass --config.attention=xla")
    T, H, E = q.shape[1:]
    block = BLOCK if T % BLOCK == 0 else LANES
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, use_fused_bwd_kernel=True
    )
    causal = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((T, T))] * H)
    kernel = splash_attention_kernel.make_splash_mha(
        causal, head_shards=1, q_seq_shards=1, block_sizes=sizes, residual_checkpoint_name=RESIDUAL
    )
    segments = splash_attention_kernel.SegmentIds(segment_ids, segment_ids)
    q, k, v = (x.swapaxes(1, 2) for x in (q * E**-0.5, k, v))
    return jax.vmap(kernel)(q, k, v, segments).swapaxes(1, 2)
