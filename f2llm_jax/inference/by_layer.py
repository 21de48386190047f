"""A few texts through a model of any size: one layer's weights in memory at a time.

Slower than `encode` for more than a few texts, since every layer is read from storage; but an 8B model needs 1 GiB so.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from f2llm_jax.model.decoder import apply_layer, rms_norm
from f2llm_jax.model.sizes import DecoderConfig
from f2llm_jax.weights.hf_mapping import TABLE, Entry
from f2llm_jax.weights.parameters import Parameters, blocks, parameter_shapes

ENTRIES = {entry.path[-1]: entry for entry in TABLE}


def encode_by_layer(config: DecoderConfig, parameters: Parameters, ids: Sequence[Int[np.ndarray, " T"]]) -> Float[np.ndarray, "S D"]:
    """Raw embeddings, float32, of texts given as token ids, EOS last; one text a row."""
    longest = max(map(len, ids))
    token_ids = np.stack([np.pad(one, (0, longest - len(one))) for one in ids])
    last = np.array([len(one) - 1 for one in ids])
    positions = np.broadcast_to(np.arange(longest, dtype=np.int32), token_ids.shape)
    segment_ids = (positions <= last[:, None]).astype(np.int32)
    x = jnp.asarray(lookup(config, parameters, token_ids.reshape(-1)))
    layer = jax.jit(functools.partial(apply_layer, config))  # one program for every layer
    with jax.default_matmul_precision("highest"):
        for i in range(config.num_hidden_layers):
            weights = {name: parameters.read(entry, i, i + 1)[0] for name, entry in ENTRIES.items() if entry.stacked}
            x = layer(weights, x, positions, segment_ids)
    hidden = np.asarray(x).reshape(*token_ids.shape, -1)[np.arange(len(ids)), last]
    norm = jnp.asarray(parameters.read(ENTRIES["norm"], 0, config.hidden_size))
    return np.asarray(rms_norm(jnp.asarray(hidden), norm, config.rms_norm_eps))


def check_ids(ids: Int[np.ndarray, " N"], config: DecoderConfig) -> None:
    """Raises a ValueError if an id has no row in the embedding table."""
    if len(ids) and not 0 <= ids.min() <= ids.max() < config.vocab_size:
        raise ValueError(f"token ids {ids.min()} to {ids.max()} of an embedding table of {config.vocab_size} rows")


def lookup(config: DecoderConfig, parameters: Parameters, ids: Int[np.ndarray, " P"]) -> Float[np.ndarray, "P D"]:
    """Rows of the embedding table, which passes by in blocks."""
    check_ids(ids, config)
    rows = np.empty((len(ids), config.hidden_size), np.float32)
    table: Entry = ENTRIES["embedding"]
    for start, stop in blocks(parameters, table, parameter_shapes(config)[table]):
        block, here = parameters.read(table, start, stop), (start <= ids) & (ids < stop)
        rows[here] = block[ids[here] - start]
    return rows
