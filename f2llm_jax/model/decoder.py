"""Qwen3 as a Flax NNX module: `(token_ids, positions, segment_ids) -> hidden`.

Parameters are fp32 and carry the letters of their dims, from which their sharding follows (`sharding.PARAMETER_SPECS`).
Layers are stacked on a leading axis L and scanned, so a program's size does not grow with depth. Normalisation follows
transformers' `Qwen3RMSNorm` to the cast: statistics in fp32, back to the compute dtype, then the scale.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from f2llm_jax import sharding
from f2llm_jax.errors import UserError
from f2llm_jax.model.attention import Kernel, attention, saving_names
from f2llm_jax.model.sizes import DecoderConfig

INITIALIZER_RANGE = 0.02  # Qwen3 config.json, `initializer_range`

# Names of what a layer may keep for its backward pass: the projected heads, the stream between attention and MLP, the MLP's two products.
HEADS, STREAM, GATES = "heads", "stream", "gates"
# From most to least memory. "none" keeps all but casts and gathers, which those of weights are among; "dots" keeps what weights were
# multiplied to; "attention" computes the MLP's products again, which larger models do faster than they fetch them; "full" keeps only the
# layer's input. What a fused attention kernel has for its own backward pass is kept by the first three.
REMAT_POLICIES: dict[str, Callable[..., bool]] = {
    "none": lambda primitive, *_, **__: primitive.name not in ("convert_element_type", "reshard"),
    "dots": saving_names(HEADS, STREAM, GATES),
    "attention": saving_names(HEADS, STREAM),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def remat_policy(name: str) -> Callable[..., bool]:
    """The policy of this name.

    Raises:
      UserError: there is none.
    """
    if name not in REMAT_POLICIES:
        raise UserError(f"there is no config.remat={name!r}; take {', '.join(REMAT_POLICIES)}")
    return REMAT_POLICIES[name]


LayerTap = Callable[[str, Array], None]  # called while the layer is traced: what it keeps, the caller must return


class Parameter(nnx.Param):
    """An fp32 parameter that knows its dims ("DHE", a key of `sharding.PARAMETER_SPECS`)."""


def _normal(rngs: nnx.Rngs, dims: str, *shape: int) -> Parameter:
    return Parameter(INITIALIZER_RANGE * jax.random.normal(rngs.params(), shape, jnp.float32), dims=dims)


def _ones(dims: str, *shape: int) -> Parameter:
    return Parameter(jnp.ones(shape, jnp.float32), dims=dims)


def at_use(parameter: Parameter, dtype: jnp.dtype) -> Array:
    """The weight in the compute dtype, cast first and then gathered over `fsdp`, so bf16 halves the traffic; itself if it is that."""
    return sharding.shard(parameter[...].astype(dtype), sharding.GATHERED_SPECS[parameter.dims])


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "... D"]:
    """`scale * x / rms(x)`, statistics in fp32, result in the dtype of x."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    # An einsum and not a product: its gradient may stay unsummed over devices, as that of every other weight.
    out = jax.typeof(x).sharding.spec if sharding.in_mesh() else None
    return jnp.einsum("d,...d->...d", scale.astype(x.dtype), normed.astype(x.dtype), out_sharding=out)


def rotary_tables(positions: Int[Array, "R T"], head_dim: int, theta: float) -> tuple[Float[Array, "P E"], Float[Array, "P E"]]:
    """cos and sin in fp32, laid out as Hugging Face's half-split rotation expects them."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions.reshape(-1, 1, out_sharding=sharding.spec(sharding.POSITIONS_D)).astype(jnp.float32) * frequency
    angle = jnp.concatenate([angle, angle], axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "H P E"], cos: Float[Array, "P E"], sin: Float[Array, "P E"]) -> Float[Array, "H P E"]:
    """Rotary position embedding in the dtype of x: `x * cos + (-x2, x1) * sin` for the halves (x1, x2) of the last axis.

    The halves are exchanged by a product with a signed permutation matrix, which is exact; a TPU would split its vector registers.
    """
    half = jnp.eye(x.shape[-1] // 2, dtype=x.dtype)
    none = jnp.zeros_like(half)
    exchange = jnp.block([[none, half], [-half, none]])
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    exchanged = jnp.einsum("hpe,ef->hpf", x, exchange, precision=precision)
    return x * cos.astype(x.dtype) + exchanged * sin.astype(x.dtype)


class Layer(nnx.Module):
    """One pre-norm transformer layer: attention with per-head query and key norms, then a SwiGLU MLP. No biases."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        D, F, E = config.hidden_size, config.intermediate_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.attention_norm = _ones("D", D)
        self.query = _normal(rngs, "DHE", D, H, E)
        self.key = _normal(rngs, "DKE", D, K, E)
        self.value = _normal(rngs, "DKE", D, K, E)
        self.query_norm = _ones("E", E)
        self.key_norm = _ones("E", E)
        self.output = _normal(rngs, "DHE", D, H, E)
        self.mlp_norm = _ones("D", D)
        self.gate = _normal(rngs, "DF", D, F)
        self.up = _normal(rngs, "DF", D, F)
        self.down = _normal(rngs, "DF", D, F)

    def __call__(
        self,
        x: Float[Array, "P D"],
        rotary: tuple[Float[Array, "P E"], Float[Array, "P E"]],
        segment_ids: Int[Array, "R T"],
        eps: float,
        kernel: Kernel = "xla",
        tap: LayerTap = lambda name, value: None,
    ) -> Float[Array, "P D"]:
        """P = R * T positions: plain matrix products, which every backend runs at full speed, gradients included.

        `tap` is called on what weights are about to multiply: "attention" and "mlp", the two normed streams `[P, D]`, and
        "down", the gated activations `[P, F]`.
        """
        normed = rms_norm(x, at_use(self.attention_norm, x.dtype), eps)
        tap("attention", normed)
        x = checkpoint_name(x + self._attend(normed, rotary, segment_ids, eps, kernel), STREAM)
        normed = rms_norm(x, at_use(self.mlp_norm, x.dtype), eps)
        tap("mlp", normed)
        return x + self._mlp(normed, tap)

    def _attend(self, x: Array, rotary: tuple[Array, Array], segment_ids: Array, eps: float, kernel: Kernel) -> Float[Array, "P D"]:
        with jax.named_scope("attention"):
            q = rotate(rms_norm(self._heads(x, self.query), at_use(self.query_norm, x.dtype), eps), *rotary)
            k = rotate(rms_norm(self._heads(x, self.key), at_use(self.key_norm, x.dtype), eps), *rotary)
            v = self._heads(x, self.value)
            q, k, v = (_rows(heads, segment_ids.shape) for heads in (q, k, v))
            mixed = attention(q, k, v, segment_ids, kernel)
            out = _project("rhte,dhe->rtd", mixed, self.output, sharding.ROWS_TD)
            return out.reshape(x.shape, out_sharding=sharding.spec(sharding.POSITIONS_D))

    def _heads(self, x: Float[Array, "P D"], weight: Parameter) -> Float[Array, "H P E"]:
        return checkpoint_name(_project("pd,dhe->hpe", x, weight, sharding.HEADS_PE), HEADS)

    def _mlp(self, x: Float[Array, "P D"], tap: LayerTap) -> Float[Array, "P D"]:
        with jax.named_scope("mlp"):
            gate, up = (checkpoint_name(_project("pd,df->pf", x, w, sharding.POSITIONS_F), GATES) for w in (self.gate, self.up))
            gated = jax.nn.silu(gate) * up
            tap("down", gated)
            return _project("pf,df->pd", gated, self.down, sharding.POSITIONS_D)


def _rows(heads: Float[Array, "H P E"], shape: tuple[int, ...]) -> Float[Array, "H R T E"]:
    return heads.reshape(heads.shape[0], *shape, heads.shape[-1], out_sharding=sharding.spec(sharding.HEADS_RTE))


def _project(dims: str, x: Array, weight: Parameter, out: sharding.P) -> Array:
    return jnp.einsum(dims, x, at_use(weight, x.dtype), out_sharding=sharding.spec(out))


@functools.cache
def abstract_layer(config: DecoderConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """`nnx.split` of one layer that holds shapes and no memory."""
    return nnx.split(jax.eval_shape(lambda: Layer(config, nnx.Rngs(0))))


def apply_layer(
    config: DecoderConfig,
    weights: Mapping[str, Array],
    x: Float[Array, "P D"],
    positions: Int[Array, "R T"],
    segment_ids: Int[Array, "R T"],
    tap: LayerTap = lambda name, value: None,
) -> Float[Array, "P D"]:
    """One layer from its weights by name, for models whose layers pass through memory one at a time; `tap` as of `Layer`."""
    graphdef, state = abstract_layer(config)
    layer = nnx.merge(graphdef, nnx.map_state(lambda path, leaf: leaf.replace(weights[path[0]]), state))
    return layer(x, rotary_tables(positions, config.head_dim, config.rope_theta), segment_ids, config.rms_norm_eps, tap=tap)


class Decoder(nnx.Module):
    """A Qwen3 decoder without a language-model head."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        if config.table_rank:
            self.embedding_left = _normal(rngs, "VZ", config.vocab_size, config.table_rank)
            self.embedding_right = _normal(rngs, "ZD", config.table_rank, config.hidden_size)
        else:
            self.embedding = _normal(rngs, "VD", config.vocab_size, config.hidden_size)
        keys = jax.random.split(rngs.params(), config.num_hidden_layers)
        self.layers = jax.vmap(lambda key: Layer(config, nnx.Rngs(params=key)))(keys)
        self.norm = _ones("D", config.hidden_size)

    def embed(self, token_ids: Int[Array, "R T"], dtype: jnp.dtype) -> Float[Array, "P D"]:
        """The tokens' rows of the table. Of a table in factors only these rows are ever multiplied out.

        The table stays where it is: each device takes its columns for the tokens of all, and rows change places.
        """
        ids = sharding.shard(token_ids.reshape(-1, out_sharding=sharding.spec(sharding.POSITIONS)), sharding.TABLE_IDS)
        table = self.embedding_left if self.config.table_rank else self.embedding
        # An id beyond the table is NaN, which the step skips and reports; the default would take the last row.
        rows = table[...].at[ids].get(mode="fill", fill_value=jnp.nan, out_sharding=sharding.spec(sharding.TABLE_ROWS)).astype(dtype)
        rows = sharding.shard(sharding.shard(rows, sharding.TABLE_ROWS_GATHERED), sharding.POSITIONS_D)
        return _project("pz,zd->pd", rows, self.embedding_right, sharding.POSITIONS_D) if self.config.table_rank else rows

    def final_norm(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """The norm between the last layer, or an earlier one that serves as the last, and the embedding."""
        return rms_norm(x, at_use(self.norm, x.dtype), self.config.rms_norm_eps)

    def __call__(
        self,
        token_ids: Int[Array, "R T"],
        positions: Int[Array, "R T"],
        segment_ids: Int[Array, "R T"],
        *,
        dtype: jnp.dtype = jnp.float32,
        kernel: Kernel = "xla",
        tap: Callable[[Float[Array, "R T D"]], Array] | None = None,
    ) -> Float[Array, "R T D"] | tuple[Float[Array, "R T D"], Array]:
        """Final-norm hidden states of packed rows.

        Args:
          token_ids: ids below `vocab_size`; what padding holds does not matter.
          positions: restart at 0 with each text.
          segment_ids: 1, 2, ... for the texts of a row, 0 for padding. Texts do not see each other.
          dtype: compute dtype of activations and of weights at use.
          kernel: of attention (see `attention.choose_kernel`).
          tap: if given, called on each layer's output (before the final norm); its results, stacked on a leading axis L,
            are returned with the hidden states.
        """
        config = self.config
        x = self.embed(token_ids, dtype)
        rotary = rotary_tables(positions, config.head_dim, config.rope_theta)

        def rows(x):
            return x.reshape(*token_ids.shape, -1, out_sharding=sharding.spec(sharding.ROWS_TD))

        def step(x, layer):
            x = layer(x, rotary, segment_ids, config.rms_norm_eps, kernel)
            return x, tap(rows(x)) if tap else None

        x, taps = jax.lax.scan(step, x, self.layers)
        hidden = rows(self.final_norm(x))
        return (hidden, taps) if tap else hidden


def abstract_decoder(config: DecoderConfig, mesh: jax.sharding.Mesh | None = None) -> tuple[nnx.GraphDef, nnx.State]:
    """`nnx.split` of a decoder that holds shapes and shardings but no memory; the target of every restore and import.

    Raises:
      MeshError: the mesh does not divide a parameter.
    """
    graphdef, params = nnx.split(jax.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))
    if mesh is None:
        return graphdef, params

    def place(path: tuple[str, ...], parameter: Any) -> Any:
        spec = sharding.PARAMETER_SPECS[parameter.dims]
        spec = sharding.stacked(spec) if path[0] == "layers" else spec
        value, placed = parameter.get_value(), NamedSharding(mesh, spec)
        try:
            placed.shard_shape(value.shape)
        except ValueError as error:
            sizes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
            raise sharding.MeshError(
                f"a decoder {config.hidden_size} wide: {'/'.join(path)} of shape {value.shape} cannot be split over a mesh of {sizes} "
                f"as {spec}; choose fsdp and tensor that divide it and give the other devices to data"
            ) from error
        return parameter.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=placed))

    return graphdef, nnx.map_state(place, params)


def init_decoder(config: DecoderConfig, seed: int, mesh: jax.sharding.Mesh | None = None) -> nnx.State:
    """Random parameters (normal, 0.02), created sharded; the same values on any mesh."""
    _, abstract = abstract_decoder(config, mesh)
    shardings = None if mesh is None else jax.tree.map(lambda leaf: leaf.sharding, abstract)
    with jax.threefry_partitionable(True):
        make = jax.jit(lambda key: nnx.state(Decoder(config, nnx.Rngs(params=key))), out_shardings=shardings)
        return make(jax.random.key(seed))


@functools.cache
def count_parameters(config: DecoderConfig) -> int:
    """The number of parameters, from abstract shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_decoder(config)[1]))
