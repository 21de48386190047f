"""A model's parameters on their way through memory, a block at a time.

Whoever rewrites a model (a release, an import, an average) takes each parameter in blocks along its first axis, which is the
outermost one of the bytes on both sides: layers of a stacked parameter, rows of the embedding table. So what is held is
bounded by a block and not by the model, and no device is touched.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from f2llm_jax.model.decoder import Parameter as DecoderParameter
from f2llm_jax.model.decoder import abstract_decoder
from f2llm_jax.model.sizes import DecoderConfig
from f2llm_jax.weights.hf_mapping import LEFT, RIGHT, TABLE, Entry

BLOCK_BYTES = 2**28  # in float32; one layer's largest matrix of the 14B model is 340 MiB and is then a block of its own

Shape = tuple[int, ...]


class Parameters(Protocol):
    """The parameters of an opened model."""

    def unit(self, entry: Entry) -> int:
        """Least number of first-axis indices that are stored together: reading fewer reads the rest in vain."""
        ...

    def read(self, entry: Entry, start: int, stop: int) -> Float[np.ndarray, "..."]:
        """Our parameter's `[start:stop]` along its first axis, float32, in our layout."""
        ...


OpenParameters = Callable[[], AbstractContextManager[Parameters]]


def parameter_shapes(config: DecoderConfig) -> dict[Entry, Shape]:
    """The shape of each of our parameters, in the order of the weight table."""
    return {entry: leaf.get_value().shape for entry, leaf in _leaves(config)}


def parameter_dims(config: DecoderConfig) -> dict[Entry, str]:
    """The letters of each of our parameters' axes (see `sharding.PARAMETER_SPECS`), without the leading L of stacked ones."""
    return {entry: leaf.dims for entry, leaf in _leaves(config)}


def _leaves(config: DecoderConfig) -> Iterator[tuple[Entry, DecoderParameter]]:
    _, abstract = abstract_decoder(config)
    for entry in (LEFT, RIGHT, *TABLE[1:]) if config.table_rank else TABLE:
        leaf: Any = abstract
        for key in entry.path:
            leaf = leaf[key]
        yield entry, leaf


def hf_tensors(config: DecoderConfig) -> Iterator[tuple[str, Shape]]:
    """Name and shape of every tensor of a `Qwen3Model` of this shape, `11 L + 2` in all, in the order of the weight table.

    The shape is one of a plain table: see `cut.plain`.
    """
    for entry, shape in parameter_shapes(config).items():
        if entry.stacked:
            yield from ((entry.name.format(i=i), entry.hf_shape(shape[1:])) for i in range(shape[0]))
        else:
            yield entry.name, entry.hf_shape(shape)


def blocks(parameters: Parameters, entry: Entry, shape: Shape, written: int = 1) -> Iterator[tuple[int, int]]:
    """Starts and ends along the first axis that cover the parameter, in order: about `BLOCK_BYTES` each, in whole units of reading.

    Where the next place stores `written` indices together, they are whole multiples of the larger of the two units.
    """
    unit = max(parameters.unit(entry), written)
    row = 4 * math.prod(shape[1:])
    step = max(1, BLOCK_BYTES // (row * unit)) * unit
    return ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))
