"""The embedding table as a product of two factors, of which a prefix serves alone.

Half of a small decoder is its table. ML-Embed (arXiv 2605.15081, `model.py`, "matryoshka embedding learning") starts from the
table's singular value decomposition, left factor `U S` `[V, Z]` and right factor `[Z, D]`, and trains with a rank drawn anew for
each step, so that the first 64, 128, ... columns are a table too.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from f2llm_jax import sharding
from f2llm_jax.model.decoder import Parameter

SMALLEST_RANK = 64  # ML-Embed `model.py`
DIMS = {"embedding": "VD", "embedding_left": "VZ", "embedding_right": "ZD"}


def ranks(rank: int) -> tuple[int, ...]:
    """The ranks that training draws from, ascending: 64, 128, 256, ... below `rank`, and `rank` itself."""
    doubled = (SMALLEST_RANK << i for i in range(rank.bit_length()))
    return (*(smaller for smaller in doubled if smaller < rank), rank)


def sample_rank(key: Key[Array, ""], rank: int) -> Int[Array, ""]:
    """One of `ranks(rank)`, int32, each with a probability in proportion to itself (ML-Embed `model.py`)."""
    choices = jnp.array(ranks(rank), jnp.int32)
    return jax.random.choice(key, choices, p=choices / choices.sum())


def narrowed(params: nnx.State, rank: Int[Array, ""]) -> nnx.State:
    """The parameters with nothing in the left factor's columns from `rank` on, as if the table had this rank.

    Applied to gradients it makes them those of the narrowed table: the right factor's rows from `rank` on get none by themselves.
    """
    left = _value(params, "embedding_left")
    within = sharding.shard(jnp.arange(left.shape[1]) < rank, sharding.P(sharding.PARAMETER_SPECS["VZ"][1]))
    return _with(params, embedding_left=jnp.where(within, left, 0))


def prefix(params: nnx.State, rank: int) -> nnx.State:
    """The parameters with the first `rank` columns and rows of the two factors alone."""
    left, right = _value(params, "embedding_left"), _value(params, "embedding_right")
    left, right = jax.jit(lambda left, right: (_split(_gathered(left)[:, :rank]), _split(_gathered(right)[:rank])))(left, right)
    return _with(params, embedding_left=left, embedding_right=right)


def factorised(params: nnx.State, rank: int) -> nnx.State:
    """The parameters with the table in the two factors of rank Z whose product is nearest to it.

    With W the leading eigenvectors of `table^T table` they are `table W` and `W^T`. At full rank the product is the table up to
    rounding, however exact W is, since it is orthonormal. Only `[D, D]` leaves the devices.
    """
    table = _value(params, "embedding")
    gram = jax.jit(lambda table: _product("vd,ve->de", _gathered(table), table))(table)
    _, vectors = np.linalg.eigh(np.asarray(_gathered(gram), np.float64))
    leading = np.ascontiguousarray(vectors[:, : -rank - 1 : -1], np.float32)  # eigenvalues come ascending
    left = jax.jit(lambda table, w: _product("vd,dz->vz", _gathered(table), _split(w)))(table, leading)
    return _with(params, embedding=None, embedding_left=left, embedding_right=jax.jit(_split)(leading.T))


def multiplied(params: nnx.State) -> nnx.State:
    """The parameters with the plain table that the two factors stand for."""
    left, right = _value(params, "embedding_left"), _value(params, "embedding_right")
    table = jax.jit(lambda left, right: _product("vz,zd->vd", _gathered(left), right))(left, right)
    return _with(params, embedding=table, embedding_left=None, embedding_right=None)


def _product(dims: str, gathered: Float[Array, "A C"], split: Float[Array, "C B"]) -> Float[Array, "A B"]:
    """fp32; like the second operand, the result is split by columns."""
    return jnp.einsum(dims, gathered, split, precision="highest", out_sharding=sharding.spec(sharding.PARAMETER_SPECS["VD"]))


def _gathered(x: Float[Array, "A B"]) -> Float[Array, "A B"]:
    return sharding.shard(x, sharding.P(None, None))


def _split(x: Float[Array, "A B"]) -> Float[Array, "A B"]:
    return sharding.shard(x, sharding.PARAMETER_SPECS["VD"])


def _value(params: Any, name: str) -> Array:
    return params[name].get_value()


def _with(params: nnx.State, **tables: Float[Array, "A B"] | None) -> nnx.State:
    """The parameters with other tables; None removes one."""
    kept = {name: value for name, value in params.raw_mapping.items() if name not in tables}
    made = {name: Parameter(value, dims=DIMS[name]) for name, value in tables.items() if value is not None}
    return nnx.State(kept | made)
