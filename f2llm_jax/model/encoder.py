"""Texts in, raw embeddings out; and exact gradients through any number of chunks.

A step's chunks make groups, each of which passes the decoder a layer at a time (layered.py). A step of one group, which is what
`batch.microbatch_rows` should have room for, encodes each text once. A larger one is GradCache (arXiv 2101.06983) in one program:
embeddings of all groups first, of which the last keeps what its backward pass needs; then the objective on the whole batch; then each
of the other groups once more for its share of the gradient. The number of chunks is traced, so nothing is compiled twice.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from f2llm_jax import sharding
from f2llm_jax.batch import PackedTexts
from f2llm_jax.model import layered
from f2llm_jax.model.chunk_encoder import ChunkEncoder
from f2llm_jax.model.layered import Count, Kept

Carry = TypeVar("Carry")


def encode(encoder: ChunkEncoder, params: nnx.State, texts: PackedTexts, text_count: int) -> Float[Array, "S ..."]:
    """Embeddings of all texts, without keeping anything for a backward pass. A text that is nowhere packed gets zeros."""
    nowhere = _nowhere(encoder, texts, text_count)
    return _together(_each_group(texts, _groups(texts), lambda g, placed: _encode_group(encoder, params, texts, g, placed)[0], nowhere))


def value_and_grad(
    objective: Callable[[Float[Array, "S ..."]], tuple[Float[Array, ""], Any]],
    encoder: ChunkEncoder,
    params: nnx.State,
    texts: PackedTexts,
    text_count: int,
) -> tuple[tuple[Float[Array, ""], Any], nnx.State]:
    """`((loss, aux), gradients)` of `objective(embeddings)` with respect to `params`.

    Over the mesh's `data` axis gradients are summed once, after the last chunk; over `fsdp` as `ChunkEncoder.whole` says.
    """
    found, (gradients, _) = value_and_grads(lambda embeddings, _: objective(embeddings), encoder, params, (), texts, text_count)
    return found, gradients


def value_and_grads(
    objective: Callable[[Float[Array, "S ..."], Any], tuple[Float[Array, ""], Any]],
    encoder: ChunkEncoder,
    params: nnx.State,
    heads: Any,
    texts: PackedTexts,
    text_count: int,
) -> tuple[tuple[Float[Array, ""], Any], tuple[nnx.State, Any]]:
    """As `value_and_grad`, of `objective(embeddings, heads)`, with respect to `params` and to the parameters `heads` of the objective."""
    params = sharding.unreduced(params)
    nowhere, last = _nowhere(encoder, texts, text_count), _groups(texts) - 1
    with jax.named_scope("encode"):
        placed = _each_group(texts, last, lambda g, placed: _encode_group(encoder, params, texts, g, placed)[0], nowhere)
    with jax.named_scope("last_group"):
        placed, kept = _encode_group(encoder, params, texts, last, placed, keep=True)
        embeddings = _together(placed)

    with jax.named_scope("objective"):
        (loss, aux), (cotangents, of_heads) = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(embeddings, heads)

    def share(number: Count, kept: Kept) -> nnx.State:
        of_chunk = lambda c: _pick(cotangents, layered.at(texts.text, c))  # noqa: E731
        return layered.backward(encoder, params, texts, layered.group(texts, number), kept, of_chunk)

    def again(number: Count, carry: tuple[nnx.State, Kept]) -> tuple[nnx.State, Kept]:
        gradients, kept = carry
        kept = layered.forward(encoder, params, texts, layered.group(texts, number), keep=True, room=kept)
        return jax.tree.map(jnp.add, gradients, share(number, kept)), kept

    with jax.named_scope("last_group"):
        gradients = share(last, kept)
    with jax.named_scope("gradients"):
        gradients, _ = _each_group(texts, last, again, (gradients, kept))
        return (loss, aux), (sharding.reduce_over_data(gradients), of_heads)


def _groups(texts: PackedTexts) -> Count:
    return 1 if _is_one_group(texts) else (texts.chunks + texts.group_chunks - 1) // texts.group_chunks


def _is_one_group(texts: PackedTexts) -> bool:
    """Whether no step has more chunks than a group has room for."""
    return len(texts.token_ids) <= texts.group_chunks


def _each_group(texts: PackedTexts, count: Count, visit: Callable[[Count, Carry], Carry], carry: Carry) -> Carry:
    """`visit(number, carry)` for each of the first `count` groups."""
    if isinstance(count, int):
        for number in range(count):
            carry = visit(number, carry)
        return carry
    return jax.lax.fori_loop(0, count, visit, carry)


def _encode_group(
    encoder: ChunkEncoder, params: nnx.State, texts: PackedTexts, number: Count, placed: Float[Array, "A S ..."], keep: bool = False
) -> tuple[Float[Array, "A S ..."], Kept]:
    chunks = layered.group(texts, number)
    kept = layered.forward(encoder, params, texts, chunks, keep)

    def place(c: Count, placed: Array) -> Array:
        return _place(placed, layered.embeddings(encoder, params, kept, c), layered.at(texts.text, chunks.first + c))

    return layered.each_chunk(chunks, place, placed), kept


def _nowhere(encoder: ChunkEncoder, texts: PackedTexts, text_count: int) -> Float[Array, "A S ..."]:
    """Zeros for each text on each of A batch shards."""
    depths = [len(encoder.depths)] if encoder.depths else []
    shape = (sharding.batch_shards(sharding.mesh_in_use()), text_count, *depths, encoder.config.hidden_size)
    return sharding.shard(jnp.zeros(shape, jnp.float32), _on_shards(len(shape)))


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
