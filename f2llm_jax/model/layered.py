"""A group of chunks through a decoder a layer at a time, and back.

All chunks of the group pass a layer, one after the other, before the first of them enters the next (layered gradient accumulation,
arXiv 2106.02679). Each layer's input of every chunk is kept for the backward pass; what a layer computes inside lives as long as one
chunk is in it, but for what `ChunkEncoder.remat` keeps. The gradient of a layer is complete when its last chunk has come back.

How many chunks there are is traced. Buffers have room for Y chunks, the most that a group has, and nothing is read of them that was not
written.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from f2llm_jax import sharding
from f2llm_jax.batch import PackedTexts
from f2llm_jax.model.chunk_encoder import ChunkEncoder, Rotary

Carry = TypeVar("Carry")
Count = Int[Array, ""] | int  # an int where operations are counted (compilation/cost.py)


class Group(NamedTuple):
    """Chunks that pass a layer one after the other."""

    first: Count  # the number of its first chunk
    chunks: Count
    short: Count  # of these, as many as hold rows of short texts; they come first


class Kept(NamedTuple):
    """What `forward` keeps of a group for `backward`, with room for Y chunks of P positions."""

    read: Float[Array, "Y M X D"] | Float[Array, "Y J+1 M X D"]  # hidden states that become embeddings
    rotary: Rotary  # [Y, P, E]
    inputs: Float[Array, "L Y P D"] | None  # of each layer; None where nothing is kept
    residuals: list[Array]  # [L, Y, ...]: what else `remat` keeps of a layer; of long rows nothing


def group(texts: PackedTexts, number: Count) -> Group:
    """A group of `texts` by its number."""
    first = number * texts.group_chunks
    chunks = _clip(texts.chunks - first, texts.group_chunks)
    return Group(first, chunks, chunks if texts.parts == 1 else _clip(texts.short_chunks - first, chunks))


def each_chunk(chunks: Group, visit: Callable[[Count, Carry], Carry], carry: Carry) -> Carry:
    """`visit(place in the group, carry)` for every chunk."""
    with jax.named_scope("chunks"):
        return jax.lax.fori_loop(0, chunks.chunks, visit, carry)


def forward(encoder: ChunkEncoder, params: nnx.State, texts: PackedTexts, chunks: Group, keep: bool, room: Kept | None = None) -> Kept:
    """The group's hidden states at the texts' last tokens, to be normed; with `keep` also what `backward` needs, written to `room` if
    there is what an earlier group does not need any more."""
    L = encoder.config.num_hidden_layers
    weights = _split(params)[0]
    x, rotary = _enter(encoder, params, texts, chunks)

    def pass_chunk(weights: nnx.State, x: Array, c: Count, parts: int) -> tuple[Array, list[Array]]:
        arguments = weights, x, at(rotary, c), _rows(texts.segment_ids, chunks.first + c, parts)
        if not keep:
            return encoder.layer(*arguments), []
        out, back = jax.vjp(encoder.layer, *arguments)
        return out, [x, *_residuals(back)] if parts == texts.parts else [x]

    kept: list[Any]
    if room:
        kept = [room.inputs, *room.residuals]
    else:
        _, of_a_chunk = jax.eval_shape(lambda weights, x: pass_chunk(at(weights, 0), at(x, 0), 0, texts.parts), weights, x)
        kept = [_room(L, _most_chunks(texts), like=one) for one in of_a_chunk]

    def pass_layer(carry: Any, numbered: Any) -> tuple[Any, None]:
        number, slot, weights = numbered
        weights = encoder.gathered(weights) if encoder.whole == "weights" else weights

        def visit(parts: int, c: Count, carry: Any) -> Any:
            x, kept, read = carry
            out, values = pass_chunk(weights, at(x, c), c, parts)
            kept = [_put(room, value, number, c) for room, value in zip(kept, values, strict=False)] + kept[len(values) :]
            if encoder.depths:
                read = _put(read, encoder.read(out, at(texts.last, chunks.first + c)), c, slot)
            return _put(x, out, c), kept, read

        return _by_length(texts, chunks, visit, carry), None

    (x, kept, read), _ = jax.lax.scan(pass_layer, (x, kept, _room_to_read(encoder, texts, x)), (jnp.arange(L), _slots(encoder), weights))
    if not encoder.depths:
        read = each_chunk(chunks, lambda c, read: _put(read, encoder.read(at(x, c), at(texts.last, chunks.first + c)), c), read)
    return Kept(read, rotary, kept[0] if keep else None, kept[1:])


def embeddings(encoder: ChunkEncoder, params: nnx.State, kept: Kept, c: Count) -> Float[Array, "M X ..."]:
    """Of a chunk by its place in the group."""
    return encoder.normed(params, _read(encoder, kept, c))


def backward(
    encoder: ChunkEncoder,
    params: nnx.State,
    texts: PackedTexts,
    chunks: Group,
    kept: Kept,
    cotangents: Callable[[Count], Float[Array, "M X ..."]],
) -> nnx.State:
    """The group's share of the gradient of `sharding.unreduced` parameters, given the cotangents of each chunk's `embeddings`."""
    weights, outer = _split(params)
    d_read, of_outer = _unnormed(encoder, params, chunks, kept, cotangents)

    def unread(c: Count, d: Array) -> Float[Array, "P D"]:
        last, like = at(texts.last, chunks.first + c), at(kept.inputs, 0, c)
        return jax.vjp(lambda x: encoder.read(x, last), like)[1](d)[0]

    dx = jnp.zeros_like(at(kept.inputs, 0))
    if not encoder.depths:
        dx = each_chunk(chunks, lambda c, dx: _put(dx, unread(c, at(d_read, c)), c), dx)

    def pass_layer(dx: Array, numbered: Any) -> tuple[Array, nnx.State]:
        number, slot, stored = numbered
        weights = encoder.gathered(stored) if encoder.whole == "weights" else stored

        def visit(parts: int, c: Count, carry: Any) -> Any:
            dx, gradient = carry
            d = at(dx, c)
            if encoder.depths:
                d += unread(c, at(d_read, c, slot))
            segment_ids = _rows(texts.segment_ids, chunks.first + c, parts)
            # Traced once more for its structure: what gave the residuals that were kept is dropped by the compiler.
            _, back = jax.vjp(encoder.layer, encoder.gathered(weights), at(kept.inputs, number, c), at(kept.rotary, c), segment_ids)
            if parts == texts.parts:
                back = _with_residuals(back, [at(one, number, c) for one in kept.residuals])
            share, d, *_ = back(d)
            if encoder.whole == "weights":
                share = sharding.scatter_gradients(share, stored, encoder.dtype)
            return _put(dx, d, c), _sum(gradient, share)

        like = stored if encoder.whole == "weights" else jax.eval_shape(encoder.gathered, stored)
        dx, gradient = _by_length(texts, chunks, visit, (dx, sharding.zero_gradients(like)))
        return dx, sharding.scatter_gradients(gradient, stored, encoder.dtype)

    numbered = jnp.arange(encoder.config.num_hidden_layers), _slots(encoder), weights
    dx, of_layers = jax.lax.scan(pass_layer, dx, numbered, reverse=True)

    def leave(c: Count, gradient: nnx.State) -> nnx.State:
        embed = lambda outer: encoder.embed(nnx.merge_state(weights, outer), at(texts.token_ids, chunks.first + c))  # noqa: E731
        return _sum(gradient, jax.vjp(embed, outer)[1](at(dx, c))[0])

    of_outer = each_chunk(chunks, leave, of_outer)
    return nnx.merge_state(of_layers, of_outer)


def _enter(encoder: ChunkEncoder, params: nnx.State, texts: PackedTexts, chunks: Group) -> tuple[Float[Array, "Y P D"], Rotary]:
    """The first layer's inputs, and the tables of rotation."""

    def of_chunk(number: Count) -> Any:
        return encoder.embed(params, at(texts.token_ids, number)), encoder.rotary(at(texts.positions, number))

    room = jax.tree.map(lambda one: _room(_most_chunks(texts), like=one), jax.eval_shape(of_chunk, 0))
    return each_chunk(chunks, lambda c, room: jax.tree.map(lambda r, one: _put(r, one, c), room, of_chunk(chunks.first + c)), room)


def _unnormed(
    encoder: ChunkEncoder, params: nnx.State, chunks: Group, kept: Kept, cotangents: Callable[[Count], Array]
) -> tuple[Array, nnx.State]:
    """Cotangents of what was read, zero where nothing was, and the gradient of the parameters outside the layers so far."""
    weights, outer = _split(params)

    def visit(c: Count, carry: Any) -> Any:
        d_read, gradient = carry
        normed = lambda outer, read: encoder.normed(nnx.merge_state(weights, outer), read)  # noqa: E731
        share, d = jax.vjp(normed, outer, _read(encoder, kept, c))[1](cotangents(chunks.first + c))
        return _put(d_read, d, c), _sum(gradient, share)

    return each_chunk(chunks, visit, (jnp.zeros_like(kept.read), sharding.zero_gradients(outer)))


def _by_length(texts: PackedTexts, chunks: Group, visit: Callable[[int, Count, Carry], Carry], carry: Carry) -> Carry:
    """`visit(parts of a row, place in the group, carry)` for every chunk."""
    with jax.named_scope("short"):
        carry = jax.lax.fori_loop(0, chunks.short, functools.partial(visit, texts.parts), carry)
    if texts.parts == 1:
        return carry
    with jax.named_scope("long"):
        return jax.lax.fori_loop(chunks.short, chunks.chunks, functools.partial(visit, 1), carry)


def _rows(array: Int[Array, "C M T"], number: Count, parts: int) -> Int[Array, "R T"]:
    """A chunk's rows, each as `parts` rows."""
    return at(array, number).reshape(-1, array.shape[-1] // parts, out_sharding=sharding.spec(sharding.ROWS_T))


def _slots(encoder: ChunkEncoder) -> Int[np.ndarray, "L"]:
    """Where each layer's output is read to: to the slot of its depth, or to one more, which nobody reads."""
    slots = np.full(encoder.config.num_hidden_layers, len(encoder.depths), np.int32)
    slots[np.array(encoder.depths, np.int32) - 1] = np.arange(len(encoder.depths))
    return slots


def _room_to_read(encoder: ChunkEncoder, texts: PackedTexts, x: Float[Array, "Y P D"]) -> Array:
    of_chunk = jax.eval_shape(lambda x, last: encoder.read(at(x, 0), at(last, 0)), x, texts.last)
    return _room(_most_chunks(texts), *([len(encoder.depths) + 1] if encoder.depths else []), like=of_chunk)


def _read(encoder: ChunkEncoder, kept: Kept, c: Count) -> Float[Array, "M X D"] | Float[Array, "J M X D"]:
    read = at(kept.read, c)
    return read[: len(encoder.depths)] if encoder.depths else read


# The residuals of a `jax.vjp` besides its arguments (docs.jax.dev, "First-class VJPs"). Constants of a kernel are among them, which need
# not be kept.


def _residuals(back: Any) -> list[Array]:
    return [one for one in back.opaque_residuals if isinstance(one, jax.Array)]


def _with_residuals(back: Any, kept: list[Array]) -> Any:
    places = [i for i, one in enumerate(back.opaque_residuals) if isinstance(one, jax.Array)]
    for i, value in zip(places, kept, strict=True):
        assert jax.typeof(back.opaque_residuals[i]) == jax.typeof(value)
        back.opaque_residuals[i] = value
    return back


# Parameters of the layers, and those outside.


def _split(params: nnx.State) -> tuple[nnx.State, nnx.State]:
    layers, outer = nnx.split_state(params, lambda path, _: path[0] == "layers", ...)
    return layers, outer


def _sum(gradient: nnx.State, share: nnx.State) -> nnx.State:
    """In the dtype of `gradient`."""
    return jax.tree.map(lambda total, one: total + one.astype(total.dtype), gradient, share)


# Buffers.


def _clip(count: Count, most: Count) -> Count:
    """At least 0."""
    if isinstance(count, int) and isinstance(most, int):
        return min(max(count, 0), most)
    return jnp.clip(count, 0, most)


def _most_chunks(texts: PackedTexts) -> int:
    """Y, of a group."""
    return min(texts.group_chunks, len(texts.token_ids))


def _room(*dims: int, like: Any) -> Array:
    """Memory for arrays like `like`, stacked on leading axes."""
    place = sharding.P(*[None] * len(dims), *like.sharding.spec.partitions) if sharding.in_mesh() else None
    return jax.lax.empty((*dims, *like.shape), like.dtype, out_sharding=place)


def at(tree: Any, *place: Count) -> Any:
    """What stands at `place` on the leading axes of each array."""
    for index in place:
        tree = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)  # noqa: B023 - mapped at once
    return tree


def _put(room: Array, value: Array, *place: Count) -> Array:
    """`room` with `value` at `place` on its leading axes."""
    axes = sharding.P(*[None] * len(place), *jax.typeof(value).sharding.spec.partitions) if sharding.in_mesh() else None
    value = value.reshape(*[1] * len(place), *value.shape, out_sharding=axes)
    return jax.lax.dynamic_update_slice(room, value, (*place, *[0] * (room.ndim - len(place))))
