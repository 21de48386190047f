"""Texts in, raw embeddings out; and exact gradients through any number of chunks.

An embedding is the final-norm hidden state of a text's last token, the EOS, in fp32 and not normalised (design: whoever
compares embeddings normalises them, after truncation).

`value_and_grad` is GradCache (arXiv 2101.06983) in one program: embeddings of all chunks first, then the objective on the
whole batch, then each chunk once more for its share of the gradient. The number of chunks is traced, so memory is that of
one group of chunks and nothing is compiled twice. Groups of `at_once` chunks come first, then the chunks that are left, one at a
time. The last group keeps what its backward pass needs, so a batch of one group is never recomputed.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

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
    return _together(_encode_on_shards(encode_chunk, params, texts, texts.groups, text_count))


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
    found, (gradients, _) = value_and_grads(lambda embeddings, _: objective(embeddings), encode_chunk, params, (), texts, text_count)
    return found, gradients


def value_and_grads(
    objective: Callable[[Float[Array, "S ..."], Any], tuple[Float[Array, ""], Any]],
    encode_chunk: EncodeChunk,
    params: Any,
    heads: Any,
    texts: PackedTexts,
    text_count: int,
) -> tuple[tuple[Float[Array, ""], Any], tuple[Any, Any]]:
    """As `value_and_grad`, of `objective(embeddings, heads)`, with respect to `params` and to the parameters `heads` of the objective."""
    params = sharding.unreduced(params)
    last = texts.groups - 1
    with jax.named_scope("encode"):
        placed = _encode_on_shards(encode_chunk, params, texts, last, text_count)
    with jax.named_scope("last_group"):
        rows, text = _group(texts, last)
        pooled, backward = jax.vjp(lambda p: _if_any(texts, lambda p: encode_chunk(p, *rows), p), params)
        text = jnp.where(texts.groups > 0, text, text_count)
        embeddings = _together(_place(placed, pooled, text))

    with jax.named_scope("objective"):
        (loss, aux), (cotangents, of_heads) = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(embeddings, heads)

    def accumulate(rows: tuple[Array, ...], text: Array, gradients: Any) -> Any:
        _, chunk_backward = jax.vjp(lambda p: encode_chunk(p, *rows), params)
        (share,) = chunk_backward(_pick(cotangents, text))
        return jax.tree.map(jnp.add, gradients, share)

    with jax.named_scope("last_group"):
        (gradients,) = backward(_pick(cotangents, text))
    with jax.named_scope("gradients"):
        return (loss, aux), (sharding.reduce_over_data(_for_each(texts, last, accumulate, gradients)), of_heads)


Carry = TypeVar("Carry")


def _for_each(texts: PackedTexts, groups: Int[Array, ""], visit: Callable[[tuple[Array, ...], Array, Carry], Carry], carry: Carry) -> Carry:
    """`visit(rows, text, carry)` for each of the first `groups` groups of chunks, and for each chunk after the last whole group."""
    carry = jax.lax.fori_loop(0, groups, lambda i, carry: visit(*_group(texts, i), carry), carry)
    if _alike(texts):
        return carry
    with jax.named_scope("tail"):
        first = texts.groups * texts.at_once
        return jax.lax.fori_loop(first, texts.chunks, lambda i, carry: visit(*_chunks(texts, i, 1, 1), carry), carry)


def _alike(texts: PackedTexts) -> bool:
    """Whether every chunk is a group."""
    return texts.at_once == texts.parts == 1


def _group(texts: PackedTexts, group: Int[Array, ""]) -> tuple[tuple[Array, ...], Int[Array, "M X"]]:
    return _chunks(texts, group * texts.at_once, texts.at_once, texts.parts)


def _chunks(texts: PackedTexts, first: Int[Array, ""], count: int, parts: int) -> tuple[tuple[Array, ...], Int[Array, "M X"]]:
    """What `encode_chunk` takes of `count` chunks with rows split into `parts`, and which texts they hold. Rows stay on their devices."""

    def rows(array: Array) -> Array:
        together = jax.lax.dynamic_slice_in_dim(array, first, count).swapaxes(0, 1)
        return together.reshape(-1, array.shape[-1] // parts, out_sharding=sharding.spec(sharding.ROWS_T))

    arrays = [rows(array) for array in (texts.token_ids, texts.positions, texts.segment_ids)]
    return (*arrays, rows(texts.last) % arrays[0].shape[-1]), rows(texts.text)


def _if_any(texts: PackedTexts, encode: Callable[[Any], Array], params: Any) -> Float[Array, "M X ..."]:
    """`encode(params)` if there is a group, else zeros at no cost."""
    if _alike(texts):
        return encode(params)
    pooled = jax.eval_shape(encode, params)

    def zeros(params: Any) -> Array:
        return sharding.shard(jnp.zeros(pooled.shape, pooled.dtype), _on_shards(pooled.ndim))

    if isinstance(texts.groups, int):  # where operations are counted (compilation/cost.py)
        return encode(params) if texts.groups else zeros(params)
    return jax.lax.cond(texts.groups > 0, encode, zeros, params)


def _encode_on_shards(
    encode_chunk: EncodeChunk, params: Any, texts: PackedTexts, groups: Int[Array, ""], text_count: int
) -> Float[Array, "A S ..."]:
    """Of the first `groups` groups and of the tail, each embedding on the one of A batch shards that made it, zeros on the others."""
    rows, _ = _chunks(texts, jnp.int32(0), 1, 1)
    pooled = jax.eval_shape(encode_chunk, params, *rows)
    shape = (sharding.batch_shards(sharding.mesh_in_use()), text_count, *pooled.shape[2:])
    nothing = sharding.shard(jnp.zeros(shape, pooled.dtype), _on_shards(len(shape)))
    return _for_each(texts, groups, lambda rows, text, placed: _place(placed, encode_chunk(params, *rows), text), nothing)


def _place(placed: Float[Array, "A S ..."], pooled: Float[Array, "M X ..."], text: Int[Array, "M X"]) -> Float[Array, "A S ..."]:
    """Writes a chunk's embeddings to their texts' rows, where they are: nothing moves."""

    def here(placed: Array, pooled: Array, text: Array) -> Array:
        return placed.at[0, text].set(pooled, mode="drop")

    if not sharding.in_mesh():
        return here(placed, pooled, text)
    whole, rows = _on_shards(placed.ndim), _on_shards(pooled.ndim)
    return jax.shard_map(here, in_specs=(whole, rows, _on_shards(2)), out_specs=whole)(placed, pooled, text)


def _together(placed: Float[Array, "A S ..."]) -> Float[Array, "S ..."]:
    """All embeddings on every device (the batch's are small): one sum, in which each has one term that is not zero."""
    return jnp.sum(placed, axis=0)


def _on_shards(ndim: int) -> sharding.P:
    return sharding.P(sharding.BATCH, *[None] * (ndim - 1))


def _pick(cotangents: Float[Array, "S ..."], text: Int[Array, "M X"]) -> Float[Array, "M X ..."]:
    """The transpose of `_place`: each text's cotangent, zero where there is no text."""
    return cotangents.at[text].get(mode="fill", fill_value=0, out_sharding=sharding.spec(_on_shards(cotangents.ndim + 1)))
