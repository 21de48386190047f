"""Texts in, raw embeddings out; and exact gradients through any number of chunks.

An embedding is the final-norm hidden state of a text's last token, the EOS, in fp32 and not normalised (design: whoever
compares embeddings normalises them, after truncation).

`value_and_grad` is GradCache (arXiv 2101.06983) in one program: embeddings of all chunks first, then the objective on the
whole batch, then each chunk once more for its share of the gradient. The number of chunks is traced, so memory is that of
one chunk and nothing is compiled twice; the last chunk keeps what its backward pass needs, so a batch that fits one chunk is
never recomputed.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from f2llm_jax import sharding
from f2llm_jax.batch import PackedTexts
from f2llm_jax.model.attention import Kernel

# (params, token_ids [M T], positions [M T], segment_ids [M T], last [M X]) -> embeddings [M X ...]
EncodeChunk = Callable[..., Float[Array, "M X ..."]]


def last_token(hidden: Float[Array, "R T D"], last: Int[Array, "R X"]) -> Float[Array, "R X D"]:
    """The hidden states at the given positions. Row by row, so that no device needs the rows of another."""
    return jax.vmap(lambda row, at: row[at])(hidden, last)


def chunk_encoder(
    graphdef: nnx.GraphDef, dtype: jnp.dtype, remat: str, layers: tuple[int, ...] = (), kernel: Kernel = "xla"
) -> EncodeChunk:
    """The pure function that encodes one chunk of rows with a decoder's parameters, to fp32 `[M, X, D]`.

    With `layers` it is `[M, X, J, D]`: what the decoder would give if it ended after each of these J layers (1-based), through
    the final norm that they share (ML-Embed's layer matryoshka, arXiv 2605.15081).
    """

    def encode_chunk(params, token_ids, positions, segment_ids, last):
        decoder = nnx.merge(graphdef, params)
        run = functools.partial(decoder, token_ids, positions, segment_ids, dtype=dtype, remat=remat, kernel=kernel)
        if not layers:
            return last_token(run(), last).astype(jnp.float32)
        _, tapped = run(tap=lambda x: last_token(x, last))
        return jnp.stack([decoder.final_norm(tapped[layer - 1]) for layer in layers], axis=2).astype(jnp.float32)

    return encode_chunk


def layer_matryoshka(layers: int) -> tuple[int, ...]:
    """The published depths, ascending: 1, 2, 4, 8, 16, 24, 32, 40, 48 below `layers`, then `layers` (ML-Embed `model.py`)."""
    return (*(depth for depth in (1, 2, 4, 8, 16, 24, 32, 40, 48) if depth < layers), layers)


def encode(encode_chunk: EncodeChunk, params: Any, texts: PackedTexts, text_count: int) -> Float[Array, "S ..."]:
    """Embeddings of all texts, without keeping anything for a backward pass. A text that is nowhere packed gets zeros."""
    return _together(_encode_apart(encode_chunk, params, texts, texts.chunks, text_count))


def value_and_grad(
    objective: Callable[[Float[Array, "S ..."]], tuple[Float[Array, ""], Any]],
    encode_chunk: EncodeChunk,
    params: Any,
    texts: PackedTexts,
    text_count: int,
) -> tuple[tuple[Float[Array, ""], Any], Any]:
    """`((loss, aux), gradients)` of `objective(embeddings)` with respect to `params`.

    Over the mesh's `data` axis gradients are summed once, after the last chunk; over `fsdp` with each chunk, as their shards need.
    """
    params = sharding.unreduced(params)
    final = texts.chunks - 1
    with jax.named_scope("encode"):
        placed = _encode_apart(encode_chunk, params, texts, final, text_count)
    with jax.named_scope("last_chunk"):
        pooled, backward = jax.vjp(lambda p: encode_chunk(p, *_rows(texts, final)), params)
        embeddings = _together(_place(placed, pooled, texts.text[final]))

    with jax.named_scope("objective"):
        (loss, aux), cotangents = jax.value_and_grad(objective, has_aux=True)(embeddings)

    def accumulate(chunk, gradients):
        _, chunk_backward = jax.vjp(lambda p: encode_chunk(p, *_rows(texts, chunk)), params)
        (share,) = chunk_backward(_pick(cotangents, texts.text[chunk]))
        return jax.tree.map(jnp.add, gradients, share)

    with jax.named_scope("last_chunk"):
        (gradients,) = backward(_pick(cotangents, texts.text[final]))
    with jax.named_scope("gradients"):
        return (loss, aux), sharding.reduce_over_data(jax.lax.fori_loop(0, final, accumulate, gradients))


def _rows(texts: PackedTexts, chunk: Int[Array, ""]) -> tuple[Array, ...]:
    return texts.token_ids[chunk], texts.positions[chunk], texts.segment_ids[chunk], texts.last[chunk]


def _encode_apart(
    encode_chunk: EncodeChunk, params: Any, texts: PackedTexts, chunks: Int[Array, ""], text_count: int
) -> Float[Array, "A S ..."]:
    """Of the first `chunks` chunks, each embedding with the one of A batch ways that made it, zeros with the others."""
    pooled = jax.eval_shape(encode_chunk, params, *_rows(texts, jnp.int32(0)))
    shape = (sharding.batch_shards(sharding.mesh_in_use()), text_count, *pooled.shape[2:])
    nothing = sharding.shard(jnp.zeros(shape, pooled.dtype), _by_way(len(shape)))

    def step(chunk, placed):
        return _place(placed, encode_chunk(params, *_rows(texts, chunk)), texts.text[chunk])

    return jax.lax.fori_loop(0, chunks, step, nothing)


def _place(placed: Float[Array, "A S ..."], pooled: Float[Array, "M X ..."], text: Int[Array, "M X"]) -> Float[Array, "A S ..."]:
    """Writes a chunk's embeddings to their texts' rows, where they are: nothing moves."""

    def here(placed, pooled, text):
        return placed.at[0, text].set(pooled, mode="drop")

    if not sharding.in_mesh():
        return here(placed, pooled, text)
    whole, rows = _by_way(placed.ndim), _by_way(pooled.ndim)
    return jax.shard_map(here, in_specs=(whole, rows, _by_way(2)), out_specs=whole)(placed, pooled, text)


def _together(placed: Float[Array, "A S ..."]) -> Float[Array, "S ..."]:
    """All embeddings on every device (the batch's are small): one sum, in which each has one term that is not zero."""
    return jnp.sum(placed, axis=0)


def _by_way(ndim: int) -> sharding.P:
    return sharding.P(sharding.BATCH, *[None] * (ndim - 1))


def _pick(cotangents: Float[Array, "S ..."], text: Int[Array, "M X"]) -> Float[Array, "M X ..."]:
    """The transpose of `_place`: each slot's cotangent, zero for an unused slot."""
    return cotangents.at[text].get(mode="fill", fill_value=0, out_sharding=sharding.spec(_by_way(cotangents.ndim + 1)))
