"""How strongly each channel of a model is driven by real texts, measured a layer at a time.

One layer's weights are in memory at a time, split over the mesh as in training; so is every calibration token's hidden state,
4 D bytes each. A model of any size passes, on as many devices as there are.

Each measure is taken where weights read: of the two normed streams of every layer (scale included), of the final norm applied
to that layer's output, and of the MLP's gated activations.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from f2llm_jax import sharding
from f2llm_jax.batch import PackedTexts
from f2llm_jax.cli.progress import ProgressCallback
from f2llm_jax.data.packing import RowShape, lay_out
from f2llm_jax.data.records import Dataset
from f2llm_jax.errors import UserError
from f2llm_jax.inference.by_layer import ENTRIES, lookup
from f2llm_jax.model.decoder import abstract_layer, apply_layer, rms_norm
from f2llm_jax.model.sizes import DecoderConfig
from f2llm_jax.text import truncate
from f2llm_jax.weights.models import ModelSource
from f2llm_jax.weights.parameters import Parameters

LEAST_ROWS = 16  # fewer texts say more of themselves than of the model
CHUNK_TOKENS = 8192  # that pass a layer at once; memory of one layer's activations
ROW_TEXTS = 64

# A measure of a channel over tokens: the mean of the first function, then the second.
MEASURES: dict[str, tuple[Callable, Callable]] = {
    "l2": (jnp.square, np.sqrt),  # root mean square, which orders channels as their L2 norm over all tokens does
    "mean-abs": (jnp.abs, lambda mean: mean),
}


@dataclasses.dataclass(frozen=True)
class Activations:
    """What was measured, float64.

    Attributes:
      tokens: that it is a mean over.
      stream: by measure `[L, 2, D]`, of what attention and MLP of each layer read.
      final: by measure `[L, D]`, of the embedding if the model ended after this layer.
      ffn: by measure `[L, F]`, of what the MLP's last matrix reads.
      influence: `[L]`, one less the mean cosine of a layer's input and output (block influence of ShortGPT, arXiv 2403.03853).
    """

    tokens: int
    stream: dict[str, np.ndarray]
    final: dict[str, np.ndarray]
    ffn: dict[str, np.ndarray]
    influence: np.ndarray


def draw_texts(dataset: Dataset, rows: int, seed: int, max_length: int) -> list[Int[np.ndarray, "T"]]:
    """Token ids of query and positive of `rows` training rows, every row of the dataset as likely as any other.

    Raises:
      UserError: fewer rows than `LEAST_ROWS`, or more than there are.
    """
    sizes = {name: source.rows["train"] for name, source in dataset.sources.items()}
    total = sum(sizes.values())
    if not LEAST_ROWS <= rows <= total:
        raise UserError(f"--calibration-rows {rows} must be between {LEAST_ROWS} and the {total} training rows of {dataset.folder}")
    drawn = np.sort(np.random.default_rng(seed).choice(total, rows, replace=False))
    texts, first = [], 0
    for name, size in sizes.items():
        mine = drawn[(first <= drawn) & (drawn < first + size)] - first
        first += size
        texts += dataset.reader(name, "train").read(mine)
        texts += dataset.reader(name, "corpus").read(np.asarray(dataset.tables(name, "train").documents[mine, 0]))
    return [truncate(ids, max_length, dataset.eos_id) for ids in texts]


def measure(
    source: ModelSource, texts: Sequence[Int[np.ndarray, "T"]], mesh: jax.sharding.Mesh | None, report: ProgressCallback
) -> Activations:
    """Runs `texts` through the model in float32; `report` hears of every layer."""
    config = source.config
    in_mesh = jax.set_mesh(mesh) if mesh else contextlib.nullcontext()
    with in_mesh, jax.default_matmul_precision("highest"), source.open_params() as parameters:
        packed = _pack(texts, sharding.batch_shards(mesh))
        rows = [_rows(packed, chunk, mesh) for chunk in range(int(packed.chunks))]
        ids = packed.token_ids.reshape(len(rows), -1)
        table = lookup(config, parameters, ids.reshape(-1)).reshape(*ids.shape, -1)
        states = [_place(chunk, mesh, sharding.POSITIONS_D) for chunk in table]
        del table
        apply, norm = _layer(config), _place(parameters.read(ENTRIES["norm"], 0, config.hidden_size), mesh, sharding.P(None))
        sums = []
        for i in range(config.num_hidden_layers):
            weights = _weights(config, parameters, i, mesh)
            passed = [apply(weights, norm, x, *chunk) for x, chunk in zip(states, rows, strict=True)]
            states = [x for x, _ in passed]
            sums.append(jax.tree.map(lambda *parts: sum(np.asarray(part, np.float64) for part in parts), *[part for _, part in passed]))
            report(i + 1, config.num_hidden_layers)
    return _means(sums, sum(map(len, texts)))


def _pack(texts: Sequence[np.ndarray], shards: int) -> PackedTexts:
    lengths = np.array([len(ids) for ids in texts])
    tokens = int(lengths.max())
    shape = RowShape(-(-max(1, CHUNK_TOKENS // tokens) // shards) * shards, tokens, ROW_TEXTS)
    return lay_out(shape.pack(lengths), shape, lambda which: [texts[i] for i in which])


def _rows(packed: PackedTexts, chunk: int, mesh: jax.sharding.Mesh | None) -> tuple[jax.Array, jax.Array]:
    positions, segment_ids = (_place(array[chunk], mesh, sharding.ROWS_T) for array in (packed.positions, packed.segment_ids))
    return positions, segment_ids


def _place(array: np.ndarray, mesh: jax.sharding.Mesh | None, spec: sharding.P) -> jax.Array:
    return jnp.asarray(array) if mesh is None else sharding.to_global(array, mesh, spec)


def _weights(config: DecoderConfig, parameters: Parameters, i: int, mesh: jax.sharding.Mesh | None) -> dict[str, jax.Array]:
    """One layer's weights, split as training splits them."""
    _, state = abstract_layer(config)
    return {
        str(path[0]): _place(parameters.read(ENTRIES[str(path[0])], i, i + 1)[0], mesh, sharding.PARAMETER_SPECS[leaf.dims])
        for path, leaf in nnx.to_flat_state(state)
    }


def _layer(config: DecoderConfig) -> Callable[..., tuple[jax.Array, dict[str, Array]]]:
    """`(weights, final norm, x [P D], positions, segment_ids) -> (x, sums over tokens)`, one program for every layer and chunk."""

    @functools.partial(jax.jit, donate_argnums=2)
    def apply(weights, norm, x, positions, segment_ids):
        real = (segment_ids > 0).reshape(-1, 1, out_sharding=sharding.spec(sharding.P(sharding.BATCH, None)))
        seen: dict[str, Array] = {}
        y = apply_layer(config, weights, x, positions, segment_ids, tap=seen.__setitem__)
        seen["final"] = rms_norm(y, norm, config.rms_norm_eps)
        sums = {
            f"{name} {measure}": jnp.sum(jnp.where(real, lift(value), 0), axis=0)
            for name, value in seen.items()
            for measure, (lift, _) in MEASURES.items()
        }
        return y, sums | {"cosine": jnp.sum(jnp.where(real, _cosine(x, y), 0))}

    return apply


def _cosine(x: Float[Array, "P D"], y: Float[Array, "P D"]) -> Float[Array, "P 1"]:
    product, *squares = ((a * b).sum(-1, keepdims=True) for a, b in ((x, y), (x, x), (y, y)))
    return product * jax.lax.rsqrt(squares[0] * squares[1])


def _means(sums: Sequence[dict[str, np.ndarray]], tokens: int) -> Activations:
    def of(name: str) -> dict[str, np.ndarray]:
        return {
            measure: lower(np.stack([layer[f"{name} {measure}"] for layer in sums]) / tokens) for measure, (_, lower) in MEASURES.items()
        }

    attention, mlp = of("attention"), of("mlp")
    return Activations(
        tokens=tokens,
        stream={measure: np.stack([attention[measure], mlp[measure]], axis=1) for measure in MEASURES},
        final=of("final"),
        ffn=of("down"),
        influence=1 - np.array([layer["cosine"] for layer in sums]) / tokens,
    )
