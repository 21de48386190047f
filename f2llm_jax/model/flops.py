"""Floating-point operations that a model needs, by definition and not by program.

A multiply-add is two. Counted are the layers' matrix products on real tokens and causal attention, of which half the square is
needed; not counted are the embedding table (a lookup), norms, padding, and whatever a program computes twice. That is MaxText's
definition (docs/reference/performance_metrics.md) on real tokens alone.
"""

import dataclasses

from f2llm_jax.model.sizes import DecoderConfig

# Dense bfloat16 peak of a chip in FLOP/s, by JAX's name of the device (vendors' data sheets).
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,  # of a device, which is half a chip
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


@dataclasses.dataclass(frozen=True)
class Work:
    """Texts to encode.

    Attributes:
      tokens: real ones, of all texts together.
      squares: sum of the squared lengths of the texts.
    """

    tokens: int
    squares: int


def layer_parameters(config: DecoderConfig) -> int:
    """Weights of one layer that tokens are multiplied with."""
    heads = config.head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)  # queries, output; keys, values
    return config.hidden_size * (heads + 3 * config.intermediate_size)


def forward_flops(config: DecoderConfig, work: Work) -> float:
    """To encode texts once: all that a teacher does, and a third of what training a student takes."""
    matmuls = 2 * layer_parameters(config) * work.tokens
    scores_and_mixing = 2 * config.num_attention_heads * config.head_dim * work.squares  # two products of the square, half of each
    return float(config.num_hidden_layers * (matmuls + scores_and_mixing))


def training_flops(config: DecoderConfig, work: Work) -> float:
    """For a forward and a backward pass: the backward one has a product with respect to each of its two factors."""
    return 3 * forward_flops(config, work)
