"""A decoder as the pieces that a chunk of packed rows passes, and the function that they make together.

An embedding is the final-norm hidden state of a text's last token, the EOS, in fp32 and not normalised (design: whoever
compares embeddings normalises them, after truncation).
"""

import dataclasses
import functools
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from f2llm_jax import sharding
from f2llm_jax.model.attention import Kernel
from f2llm_jax.model.decoder import Decoder, Parameter, abstract_decoder, abstract_layer, at_use, remat_policy, rotary_tables
from f2llm_jax.model.sizes import DecoderConfig

Rotary = tuple[Float[Array, "P E"], Float[Array, "P E"]]


def last_token(hidden: Float[Array, "R T D"], last: Int[Array, "R X"]) -> Float[Array, "R X D"]:
    """The hidden states at the given positions. Row by row, so that no device needs the rows of another."""
    return jax.vmap(lambda row, at: row[at])(hidden, last)


def layer_matryoshka(layers: int) -> tuple[int, ...]:
    """The published depths, ascending: 1, 2, 4, 8, 16, 24, 32, 40, 48 below `layers`, then `layers` (ML-Embed `model.py`)."""
    return (*(depth for depth in (1, 2, 4, 8, 16, 24, 32, 40, 48) if depth < layers), layers)


@dataclasses.dataclass(frozen=True)
class ChunkEncoder:
    """Called with parameters and one chunk, it gives the chunk's embeddings; its methods are the steps of that.

    M rows of T tokens are P = M * T positions. With J `depths` there is an embedding for each: what the decoder would give if it ended
    after that many layers, through the final norm that they share (ML-Embed's layer matryoshka, arXiv 2605.15081).

    Raises:
      UserError: there is no such `remat`.
    """

    config: DecoderConfig
    dtype: Any  # compute dtype
    remat: str = "none"  # a key of `REMAT_POLICIES`: what a layer recomputes where it is differentiated
    depths: tuple[int, ...] = ()  # numbers of layers, ascending, the last all of them; empty for all alone
    kernel: Kernel = "xla"
    # What of a layer a device holds whole while chunks pass it: "gradient", scattered over `fsdp` once, and the weights gathered for each
    # chunk; or "weights", gathered once, and each chunk's share of the gradient scattered.
    whole: Literal["gradient", "weights"] = "gradient"

    def __post_init__(self) -> None:
        remat_policy(self.remat)

    def __call__(
        self,
        params: nnx.State,
        token_ids: Int[Array, "M T"],
        positions: Int[Array, "M T"],
        segment_ids: Int[Array, "M T"],
        last: Int[Array, "M X"],
    ) -> Float[Array, "M X D"] | Float[Array, "M X J D"]:
        """Embeddings of a chunk, in fp32."""
        run = functools.partial(self._decoder(params), token_ids, positions, segment_ids, dtype=self.dtype, kernel=self.kernel)
        if not self.depths:
            return last_token(cast(Array, run()), last).astype(jnp.float32)
        _, tapped = run(tap=lambda x: last_token(x, last))
        return self.normed(params, tapped[jnp.array(self.depths) - 1])

    def embed(self, params: nnx.State, token_ids: Int[Array, "M T"]) -> Float[Array, "P D"]:
        """The tokens' rows of the table: the first layer's input."""
        return self._decoder(params).embed(token_ids, self.dtype)

    def rotary(self, positions: Int[Array, "M T"]) -> Rotary:
        """Tables for the rotation of queries and keys, the same in every layer."""
        cos, sin = rotary_tables(positions, self.config.head_dim, self.config.rope_theta)
        return cos.astype(self.dtype), sin.astype(self.dtype)

    def gathered(self, weights: nnx.State) -> nnx.State:
        """A layer's weights as it multiplies with them: in the compute dtype, gathered over `fsdp`."""
        return jax.tree.map(lambda w: w.replace(at_use(w, self.dtype)), weights, is_leaf=lambda w: isinstance(w, Parameter))

    def layer(self, weights: nnx.State, x: Float[Array, "P D"], rotary: Rotary, segment_ids: Int[Array, "R T"]) -> Float[Array, "P D"]:
        """One layer, given its weights, gathered or not. Rows may be parts of the chunk's rows."""

        def run(weights: nnx.State, x: Array, rotary: Rotary, segment_ids: Array) -> Array:
            layer = nnx.merge(abstract_layer(self.config)[0], weights)
            return layer(x, rotary, segment_ids, self.config.rms_norm_eps, self.kernel)

        return jax.checkpoint(run, policy=remat_policy(self.remat), prevent_cse=False)(weights, x, rotary, segment_ids)

    def read(self, x: Float[Array, "P D"], last: Int[Array, "M X"]) -> Float[Array, "M X D"]:
        """A layer's output at the texts' last tokens."""
        return last_token(x.reshape(len(last), -1, x.shape[-1], out_sharding=sharding.spec(sharding.ROWS_TD)), last)

    def normed(
        self, params: nnx.State, read: Float[Array, "M X D"] | Float[Array, "J M X D"]
    ) -> Float[Array, "M X D"] | Float[Array, "M X J D"]:
        """What was read as embeddings."""
        embeddings = self._decoder(params).final_norm(read).astype(jnp.float32)
        return embeddings if embeddings.ndim == 3 else jnp.moveaxis(embeddings, 0, 2)

    def _decoder(self, params: nnx.State) -> Decoder:
        return nnx.merge(_structure(self.config), params)


@functools.cache
def _structure(config: DecoderConfig) -> nnx.GraphDef:
    return abstract_decoder(config)[0]
