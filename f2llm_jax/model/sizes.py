"""The eight published sizes (paper, table 1; parameter counts as mteb states them)."""

import dataclasses

from f2llm_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape of a Qwen3 decoder. Field names are the Hugging Face ones; `dims` letters are the README's legend.

    Attributes:
      vocab_size: V, rows of the embedding table (may exceed the tokenizer's ids).
      hidden_size: D, also the width of the embedding.
      intermediate_size: F, width of the gated MLP.
      num_hidden_layers: L.
      num_attention_heads: H. `H * head_dim` need not equal D.
      num_key_value_heads: K, a divisor of H.
      head_dim: E.
      rope_theta: base of the rotary frequencies.
      rms_norm_eps: added to the mean square.
      max_position_embeddings: longest text in tokens that a release declares.
      table_rank: Z, if the embedding table is a product of two factors (see low_rank.py); 0 for a plain table, as Qwen3 has it.
    """

    vocab_size: int = 151_936
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 128
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 40_960
    table_rank: int = 0

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(f"num_key_value_heads={self.num_key_value_heads} must divide num_attention_heads={self.num_attention_heads}")
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} must be even: rotary position embedding turns pairs")
        if not 0 <= self.table_rank <= self.hidden_size:
            raise UserError(f"table_rank={self.table_rank} must be at most the width {self.hidden_size}, or 0 for a plain table")


def _size(hidden: int, ffn: int, layers: int, heads: int) -> DecoderConfig:
    return DecoderConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=8
    )


def _in_small(size: DecoderConfig) -> DecoderConfig:
    """About the shape of `size` at a sixteenth of its widths and an eighth of its depth and heads."""
    return DecoderConfig(
        vocab_size=8192,  # set to the tokenizer's, as for "toy"
        hidden_size=size.hidden_size // 16,
        intermediate_size=size.intermediate_size // 16,
        num_hidden_layers=-(-size.num_hidden_layers // 8),
        num_attention_heads=size.num_attention_heads // 8,
        num_key_value_heads=1,
        head_dim=16,
    )


SIZES = {
    "80m": _size(320, 2048, 8, 16),
    "160m": _size(640, 1536, 9, 16),  # a narrower MLP than 80m's: not a slip, the parameter count confirms it
    "330m": _size(896, 2560, 16, 16),
    "0.6b": _size(1024, 3072, 28, 16),
    "1.7b": _size(2048, 6144, 28, 16),
    "4b": _size(2560, 9728, 36, 32),
    "8b": _size(4096, 12288, 36, 32),
    "14b": _size(5120, 17408, 40, 40),
    # For laptops and tests; the vocabulary is set to the tokenizer's. One layer: what two cores learn most with in minutes.
    "toy": DecoderConfig(
        vocab_size=8192,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    ),
}
SIZES |= {f"toy-{name}": _in_small(size) for name, size in SIZES.items() if name != "toy"}  # the family on a laptop
