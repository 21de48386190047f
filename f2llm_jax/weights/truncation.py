"""A model as it is served: with a plain table, and on request with fewer layers and a table of lower rank.

What was trained to be truncated (`layer_matryoshka`, `table_rank`) becomes an ordinary Qwen3 model here, which every reader of
releases knows: the first layers of the stack, and the product of the factors' first columns and rows.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from f2llm_jax.errors import UserError
from f2llm_jax.model import low_rank
from f2llm_jax.model.sizes import DecoderConfig
from f2llm_jax.weights.factors import Multiplied, Prefix, Refactorised
from f2llm_jax.weights.hf_mapping import LEFT
from f2llm_jax.weights.parameters import OpenParameters, Parameters, parameter_shapes


@dataclasses.dataclass(frozen=True)
class Truncation:
    """What to leave of a model."""

    layers: int | None = None  # how many, from the first; None for all
    table_rank: int | None = None  # of the embedding table; None for all it has
    refactorise: bool = False  # for a rank that was not trained: the nearest table of that rank, instead of a prefix of the factors
    factored: bool = False  # keep a table that is stored in two factors as two factors

    def check(self, name: str, config: DecoderConfig, depths: tuple[int, ...], ranks: tuple[int, ...] = ()) -> None:
        """Raises a UserError unless the model `name` was trained for this truncation.

        Args:
          name: for the message.
          config: of the model as it is stored.
          depths: numbers of layers that it was trained to serve with.
          ranks: of the table that it was trained to serve with; the published ones where that is not known.
        """
        if self.layers is not None and self.layers not in depths:
            raise UserError(f"{name} was not trained to serve with {self.layers} layers, only with {', '.join(map(str, depths))}")
        if self.table_rank is None:
            return
        if not config.table_rank:
            raise UserError(f"{name} has a plain embedding table and was trained for no rank but the full one")
        if self.refactorise and 1 <= self.table_rank <= config.table_rank:
            return
        trained = ranks or low_rank.ranks(config.table_rank)
        if self.refactorise or self.table_rank not in trained:
            raise UserError(
                f"{name} was not trained for a table of rank {self.table_rank}, only for {', '.join(map(str, trained))}; "
                f"--refactorise takes the nearest table of any rank up to {config.table_rank}"
            )

    def config(self, config: DecoderConfig) -> DecoderConfig:
        """The shape of what is left."""
        rank = self._rank(config) if self.factored else 0
        return dataclasses.replace(config, num_hidden_layers=self.layers or config.num_hidden_layers, table_rank=rank)

    def state(self, config: DecoderConfig, params: nnx.State) -> nnx.State:
        """What is left of loaded parameters of a model of shape `config`."""
        if config.table_rank:
            params = self._table(config, params)
        return params if self.layers is None else nnx.State(params.raw_mapping | {"layers": self._first(params["layers"])})

    def open(self, config: DecoderConfig, open_params: OpenParameters) -> OpenParameters:
        """What is left of parameters that are read block by block; of layers a reader asks only for those it knows."""
        if not config.table_rank:
            return open_params

        @contextlib.contextmanager
        def opened() -> Iterator[Parameters]:
            with open_params() as stored:
                rank = self._rank(config)
                left = parameter_shapes(config)[LEFT]
                factors = Refactorised(stored, rank, left) if self.refactorise else Prefix(stored, rank)
                yield factors if self.factored else Multiplied(factors, rank)

        return opened

    def _rank(self, config: DecoderConfig) -> int:
        return self.table_rank or config.table_rank

    def _table(self, config: DecoderConfig, params: nnx.State) -> nnx.State:
        rank = self._rank(config)
        if self.refactorise:
            params = low_rank.factorised(low_rank.multiplied(params), rank)
        elif self.factored:
            return low_rank.prefix(params, rank)
        else:
            params = low_rank.narrowed(params, jnp.int32(rank))
        return params if self.factored else low_rank.multiplied(params)

    def _first(self, layers: nnx.State) -> dict[str, Any]:
        return jax.tree.map(lambda stacked: stacked[: self.layers], layers).raw_mapping
