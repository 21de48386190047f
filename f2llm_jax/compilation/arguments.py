"""What the training step is called with, as shapes and shardings alone."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from f2llm_jax import sharding
from f2llm_jax.batch import Batch, PackedTexts, Samples
from f2llm_jax.data.pipeline import BatchConfig
from f2llm_jax.data.plan import NEGATIVES
from f2llm_jax.model.decoder import abstract_decoder
from f2llm_jax.model.sizes import DecoderConfig
from f2llm_jax.training import program
from f2llm_jax.training.step import TrainState

StepArguments = tuple[TrainState, Any, Batch]  # of the step: shapes and shardings of state, teacher's parameters and batch


def abstract_arguments(
    config: ml_collections.ConfigDict, model: DecoderConfig, steps: program.Program, teacher: DecoderConfig | None, mesh: jax.sharding.Mesh
) -> StepArguments:
    """What the step of `config` is called with on `mesh`.

    Raises:
      UserError: its rows cannot be split over the mesh.
    """
    state = program.abstract_state(model, steps.optimizer, mesh, steps.projected)
    frozen = None
    if teacher:
        _, params = abstract_decoder(teacher, mesh)
        frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(config.dtype), sharding=x.sharding), params)
    return state, frozen, abstract_batch(BatchConfig(**config.batch.to_dict()), mesh)


def abstract_batch(config: BatchConfig, mesh: jax.sharding.Mesh) -> Batch:
    """The shapes of a step's batch, as `Pipeline` gives it to the devices of `mesh`.

    Raises:
      UserError: its rows cannot be split over the mesh.
    """
    shards = sharding.batch_shards(mesh)
    shape = config.rows(shards)
    B, N = -(-config.size // shards) * shards, max({**NEGATIVES, **(config.negatives or {})}.values())
    C = -(-B * (2 + N) // shape.chunk_rows)

    def array(dtype: DTypeLike, *dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype)

    tokens, texts = (array(jnp.int32, C, shape.chunk_rows, width) for width in (shape.row_tokens, shape.row_texts))
    masks = array(jnp.float32, B), array(jnp.float32, B, N), array(jnp.float32)
    ids = array(jnp.int32, B), array(jnp.int32, B, N)
    packed = PackedTexts(tokens, tokens, tokens, texts, texts, array(jnp.int32), array(jnp.int32), shape.group_chunks, shape.parts)
    batch = Batch(packed, Samples(*masks, *ids))
    place = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
    return jax.tree.map(place, batch, sharding.batch_specs(batch))
