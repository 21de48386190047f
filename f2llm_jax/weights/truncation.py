"""A model as it is served: with a plain table, and if so wished with fewer layers and a table of lower rank.

What was trained to be cut (`layer_matryoshka`, `table_rank`) becomes an ordinary Qwen3 model here, which every reader of
releases knows: the first layers of the stack, and the product of the factors' first columns and rows.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from f2llm_jax.errors import UserError
from f2llm_jax.model import low_rank
from f2llm_jax.model.sizes import DecoderConfig
from f2llm_jax.weights.hf_mapping import EMBEDDING, LEFT, RIGHT, Entry
from f2llm_jax.weights.parameters import OpenParameters, Parameters


@dataclasses.dataclass(frozen=True)
class Truncation:
    """What to leave of a model.

    Attributes:
      layers: how many, from the first; None for all.
      table_rank: of the embedding table; None for all it has.
    """

    layers: int | None = None
    table_rank: int | None = None

    def check(self, name: str, config: DecoderConfig, depths: tuple[int, ...]) -> None:
        """Raises a UserError unless the model `name` was trained for this cut.

        Args:
          name: for the message.
          config: of the model as it is stored.
          depths: numbers of layers that it was trained to serve with.
        """
        if self.layers is not None and self.layers not in depths:
            raise UserError(f"{name} was not trained to serve with {self.layers} layers, only with {', '.join(map(str, depths))}")
        if self.table_rank is None:
            return
        if not config.table_rank:
            raise UserError(f"{name} has a plain embedding table and was trained for no rank but the full one")
        if self.table_rank not in low_rank.ranks(config.table_rank):
            trained = ", ".join(map(str, low_rank.ranks(config.table_rank)))
            raise UserError(f"{name} was not trained for a table of rank {self.table_rank}, only for {trained}")

    def config(self, config: DecoderConfig) -> DecoderConfig:
        """The shape of what is left, with a plain table."""
        return dataclasses.replace(config, num_hidden_layers=self.layers or config.num_hidden_layers, table_rank=0)

    def state(self, config: DecoderConfig, params: nnx.State) -> nnx.State:
        """What is left of loaded parameters of a model of shape `config`."""
        if config.table_rank:
            params = low_rank.multiplied(low_rank.narrowed(params, jnp.int32(self.table_rank or config.table_rank)))
        return params if self.layers is None else nnx.State(params.raw_mapping | {"layers": self._first(params["layers"])})

    def open(self, config: DecoderConfig, open_params: OpenParameters) -> OpenParameters:
        """What is left of parameters that are read block by block; of layers a reader asks only for those it knows."""
        if not config.table_rank:
            return open_params

        @contextlib.contextmanager
        def opened() -> Iterator[Parameters]:
            with open_params() as parameters:
                yield _Multiplied(parameters, self.table_rank or config.table_rank)

        return opened

    def _first(self, layers: nnx.State) -> dict:
        return jax.tree.map(lambda stacked: stacked[: self.layers], layers).raw_mapping


class _Multiplied:
    """Parameters whose embedding table is multiplied out as it is read."""

    def __init__(self, stored: Parameters, rank: int):
        self._stored, self._rank = stored, rank
        self._right = stored.read(RIGHT, 0, rank)

    def unit(self, entry: Entry) -> int:
        return self._stored.unit(LEFT if entry == EMBEDDING else entry)

    def read(self, entry: Entry, start: int, stop: int) -> np.ndarray:
        if entry != EMBEDDING:
            return self._stored.read(entry, start, stop)
        return self._stored.read(LEFT, start, stop)[:, : self._rank] @ self._right
