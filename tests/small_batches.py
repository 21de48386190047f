"""Packed texts of random ids for the decoder of `tiny`, in as many chunks as wanted, and what encodes them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import tiny
from flax import nnx

from f2llm_jax.data.packing import RowShape, lay_out
from f2llm_jax.model.chunk_encoder import ChunkEncoder

B, N = 6, 2
TEXTS = B * (2 + N)
SHAPE = RowShape(chunk_rows=2, row_tokens=16, row_texts=16)
SHAPES = {
    "one by one": SHAPE,
    "groups of three": RowShape(chunk_rows=1, row_tokens=16, row_texts=16, group_chunks=3),
    "groups of two, rows in halves": RowShape(chunk_rows=1, row_tokens=16, row_texts=16, group_chunks=2, parts=2),
    "one group, rows in halves": RowShape(chunk_rows=1, row_tokens=16, row_texts=16, group_chunks=10, parts=2),
}
CHUNKS = 5
# Chunks of two rows in use -> (long texts, their length, length of the others).
LENGTHS = {1: (4, 3, 1), 2: (5, 8, 1), 5: (5, 16, 4)}


def packed(chunks, shape=SHAPE):
    """A batch that fills `chunks` of the `CHUNKS` of two rows there is room for; text 3 is absent."""
    rng = np.random.default_rng(chunks)
    long, longest, shortest = LENGTHS[chunks]
    lengths = rng.permutation([longest] * long + [shortest] * (TEXTS - 1 - long))
    lengths = np.insert(lengths, 3, 0)
    packing = shape.pack(lengths)
    assert shape.parts > 1 or -(-packing.rows // 2) == chunks
    ids = [rng.integers(0, tiny.CONFIG.vocab_size, length).astype(np.int32) for length in lengths]
    return lay_out(packing, shape, lambda wanted: [ids[i] for i in wanted], chunks=-(-2 * CHUNKS // shape.chunk_rows))


def encode_chunk(dtype=jnp.float32, remat="full", layers=(), whole="gradient"):
    return ChunkEncoder(tiny.CONFIG, dtype, remat, layers, whole=whole)


def shallow(params, depth):
    """The decoder that consists of the first layers, and its parameters."""
    config = dataclasses.replace(tiny.CONFIG, num_hidden_layers=depth)
    return config, nnx.map_state(lambda path, leaf: leaf.replace(leaf.get_value()[:depth]) if path[0] == "layers" else leaf, params)
