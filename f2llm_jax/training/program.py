"""What a configuration compiles to: the training step, the evaluation step, and the abstract state they work on.

From shapes alone, so that a step can be compiled ahead of time for other machines (compile_check).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_collections
from etils import epath
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from f2llm_jax import sharding
from f2llm_jax.errors import UserError
from f2llm_jax.model import attention, low_rank
from f2llm_jax.model.chunk_encoder import ChunkEncoder, layer_matryoshka
from f2llm_jax.model.decoder import abstract_decoder
from f2llm_jax.model.sizes import DecoderConfig
from f2llm_jax.objectives import ContrastiveConfig, Embeddings, LossFunction, Mean, Objective, Samples, matryoshka_dims
from f2llm_jax.training.optimizer import OptimizerConfig, make_optimizer
from f2llm_jax.training.step import EvalStep, Step, TableRanks, Teacher, TrainState, make_eval_step, make_train_step, trained

# Gathers of weights and scatters of gradients run on the SparseCores, next to the matrix products; without these options they are
# synchronous on these chips.
_SPARSE_CORE_COLLECTIVES = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_disable_megacore_partitioning": "true",
}
# Names in a line of metrics that an objective of the user's may not use.
OF_THE_STEP = ("loss", "objective", "accuracy", "grad_norm", "learning_rate", "skipped", "table_rank", "step", "epoch", "source", "kind")
_PROJECTION_STREAM = 0x50524F4A  # of random numbers, apart from those of ranks of the embedding table
# On v5p the SparseCores take none of the gathers; fused with products and pipelined in the backward pass, most of them are hidden.
_FUSED_GATHERS = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_enable_ag_backward_pipelining": "true",
    "xla_tpu_megacore_fusion_allow_ags": "false",
    "xla_tpu_overlap_compute_collective_tc": "true",
}
# Chips whose collectives run next to the matrix products, so that the gradient may be scattered with each chunk: adding up the whole one of
# a layer would wait for their memory.
_WHOLE_WEIGHTS = ("TPU v6 lite", "TPU7x")
# By JAX's name of the device.
COMPILER_OPTIONS = {"TPU v5": _FUSED_GATHERS, "TPU v6 lite": _SPARSE_CORE_COLLECTIVES, "TPU7x": _SPARSE_CORE_COLLECTIVES}


def compiler_options(device_kind: str) -> dict[str, str]:
    """What XLA is told when it compiles for this kind of device."""
    return COMPILER_OPTIONS.get(device_kind, {})


@dataclasses.dataclass(frozen=True)
class Program:
    """The steps of a run, not compiled yet.

    Attributes:
      train_step: jitted; its state is donated.
      eval_step: jitted.
      optimizer: of the training step.
      dims: widths that are trained, ascending; empty for the full one alone.
      scored: widths that the evaluation step scores, ascending; the last is the full one.
      depths: numbers of layers that are trained to serve, ascending; empty for all layers alone.
      table_ranks: of the embedding table that are trained to serve, ascending; empty for a plain table.
      kernel: of attention, of student and teacher.
      projected: widths of the teachers that the student is projected to; empty for none.
    """

    train_step: Step
    eval_step: EvalStep
    optimizer: OptimizerConfig
    dims: tuple[int, ...]
    scored: tuple[int, ...]
    depths: tuple[int, ...]
    table_ranks: tuple[int, ...]
    kernel: attention.Kernel
    projected: tuple[int, ...] = ()


def build(
    config: ml_collections.ConfigDict,
    model: DecoderConfig,
    total_steps: int,
    platform: str,
    teacher: DecoderConfig | None = None,
    cached: tuple[int, ...] = (),
    own: LossFunction | None = None,
) -> Program:
    """The program of a configuration for a decoder of shape `model`, distilled from a `teacher` of that shape or from teachers whose
    vectors are `cached`, of these widths.

    `platform` is that of the devices ("cpu", "gpu", "tpu"); what their kind changes is read from the mesh that is set. A loss
    function of the user's `own` takes the place of `config.objective`; its arrays are whole and float32 on every device, so that it may
    be written as if there were one.

    Raises:
      ValueError: the attention kernel of the configuration cannot serve there.
    """
    mesh, dtype = sharding.mesh_in_use(), jnp.dtype(config.dtype)
    device_kind = mesh.abstract_device.device_kind if mesh else ""
    whole: Literal["gradient", "weights"] = "weights" if device_kind in _WHOLE_WEIGHTS else "gradient"
    kernel = attention.choose_kernel(config.attention, platform, dtype, config.batch.row_tokens // config.batch.row_parts, model.head_dim)
    depths = layer_matryoshka(model.num_hidden_layers) if config.objective.layer_matryoshka else ()
    widths = tuple(config.objective.matryoshka_dims) or matryoshka_dims(model.hidden_size, config.objective.matryoshka_minimum)
    dims = widths if config.objective.matryoshka else ()
    scored = tuple(sorted({*widths, model.hidden_size}))
    objective = _objective(config.objective, dims, (teacher.hidden_size,) if teacher else cached)
    optimizer = OptimizerConfig(total_steps=total_steps, **config.optimizer)
    encoder = functools.partial(ChunkEncoder, dtype=dtype, kernel=kernel, whole=whole)
    frozen = None if teacher is None else Teacher(encoder(teacher, depths=followed_depths(depths, teacher)))
    if objective.contrastive.guide and not (teacher or cached):
        raise UserError(
            f"config.objective.guide={objective.contrastive.guide!r} needs a model that guides: set config.teacher or config.teacher_cache "
            "(and config.objective.distillation_weight=0 to use it as guide alone)"
        )
    if cached and depths and objective.distillation_weight and not (objective.projection or objective.distillation == "scores"):
        raise UserError(
            "config.teacher_cache holds embeddings of the whole teacher alone, but with config.objective.layer_matryoshka each depth "
            "follows the raw ones of the teacher's; set config.teacher instead, or config.objective.projection=True or "
            "config.objective.distillation='scores', or config.objective.distillation_weight=0 to use it as guide alone"
        )
    projected = objective.teacher_widths if objective.projection and objective.distillation_weight else ()
    if config.objective.projection and (own or not projected):
        raise UserError(
            "config.objective.projection needs a teacher to project to: set config.teacher or config.teacher_cache and a "
            "config.objective.distillation_weight above 0, and no objective of your own, or set it to False"
        )
    ranks = TableRanks(config.table_rank, config.seed) if config.table_rank and config.table_rank_sampled else None
    served = low_rank.ranks(config.table_rank) if ranks else (config.table_rank,) if config.table_rank else ()
    own = own and _gathered(own)
    train_step = make_train_step(encoder(model, remat=config.remat, depths=depths), own or objective, optimizer, frozen, ranks)
    eval_step = make_eval_step(encoder(model), objective, scored, own)
    compile_for = functools.partial(jax.jit, compiler_options=compiler_options(device_kind))
    return Program(
        compile_for(train_step, donate_argnums=0), compile_for(eval_step), optimizer, dims, scored, depths, served, kernel, projected
    )


def followed_depths(depths: tuple[int, ...], teacher: DecoderConfig) -> tuple[int, ...]:
    """The teacher's depths for a student's: the deepest follows the deepest, the next the next (ML-Embed `utils.py`).

    Raises:
      UserError: the teacher has fewer.
    """
    own = layer_matryoshka(teacher.num_hidden_layers)
    if len(own) < len(depths):
        raise UserError(
            f"the student trains {len(depths)} depths ({', '.join(map(str, depths))}) and the teacher has {len(own)} to follow "
            f"({', '.join(map(str, own))}); take a teacher at least as deep, or set config.objective.layer_matryoshka=False"
        )
    return own[-len(depths) :] if depths else ()


def keep_compiled(folder: epath.Path, platform: str) -> None:
    """Compiled programs outlive the process in `folder`, so that a run that was stopped resumes within seconds.

    JAX_COMPILATION_CACHE_DIR names another folder. Not on CPUs, whose programs are for one model of CPU alone.
    """
    if platform != "cpu" and not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(folder))


def init_projections(width: int, projected: tuple[int, ...], seed: int, mesh: jax.sharding.Mesh) -> tuple[Float[Array, "D W"], ...]:
    """Random maps from `width` to each teacher's; of a vector of length 1 they make one of about length 1."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), _PROJECTION_STREAM), len(projected))
    place = NamedSharding(mesh, sharding.PARAMETER_SPECS["DW"])

    def init(key: Array, teacher: int) -> Float[Array, "D W"]:
        return jax.jit(lambda key: jax.random.normal(key, (width, teacher)) / teacher**0.5, out_shardings=place)(key)

    return tuple(init(key, teacher) for key, teacher in zip(keys, projected, strict=True))


def fresh_state(params: nnx.State, optimizer: OptimizerConfig, projections: tuple[Float[Array, "D W"], ...] = ()) -> TrainState:
    """The state before the first update."""
    return TrainState(jnp.int32(0), params, jax.jit(make_optimizer(optimizer).init)(trained(params, projections)), projections)


def abstract_state(
    model: DecoderConfig, optimizer: OptimizerConfig, mesh: jax.sharding.Mesh, projected: tuple[int, ...] = ()
) -> TrainState:
    """Shapes, dtypes and shardings of the state, from nothing but the configuration."""
    _, params = abstract_decoder(model, mesh)
    place_projection = NamedSharding(mesh, sharding.PARAMETER_SPECS["DW"])
    projections = tuple(jax.ShapeDtypeStruct((model.hidden_size, width), jnp.float32, sharding=place_projection) for width in projected)
    abstract = jax.eval_shape(lambda p, q: fresh_state(p, optimizer, q), params, projections)

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = leaf.sharding.spec if leaf.sharding else sharding.P()  # counters carry none: they are everywhere
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, abstract)


def _objective(config: ml_collections.ConfigDict, dims: tuple[int, ...], teachers: tuple[int, ...]) -> Objective:
    """Fields of `config.objective` go to the fields of the same name; `teachers` are widths."""

    def named(group: type) -> dict[str, Any]:
        return {field.name: config[field.name] for field in dataclasses.fields(group) if field.name in config}

    weights = tuple(config.matryoshka_weights) if dims else ()
    contrastive = ContrastiveConfig(dims=dims, weights=weights, **named(ContrastiveConfig))
    shared = named(Objective) | {"teacher_weights": tuple(config.teacher_weights)}
    objective = Objective(contrastive=contrastive, teacher_widths=teachers, **shared)
    return objective if teachers else dataclasses.replace(objective, distillation_weight=0.0)


def _checked(result: Any) -> tuple[Float[Array, ""], dict[str, Mean]]:
    """What an objective of the user's has returned; raises a UserError, while the step is traced, where that is not `(loss, metrics)`."""
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
        raise UserError("the objective must return (loss, metrics), the metrics a dict, which may be empty")
    loss, metrics = result
    if isinstance(loss, Mean) or jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise UserError(f"the objective's loss must be one number, such as `mean_of(values, mask).value`, not {loss!r}")
    for name, mean in metrics.items():
        if name in OF_THE_STEP:
            raise UserError(f"the objective's metric {name!r} has the name of one that every step writes; give it another")
        if not isinstance(mean, Mean):
            raise UserError(f"the objective's metric {name!r} must be a `mean_of(values, mask)`, so that hosts and masks are counted right")
    return jnp.float32(loss), dict(metrics)


def _gathered(own: LossFunction) -> LossFunction:
    """`own` of arrays that are whole on every device. What is padding is ones, which can be divided by their length; the masks tell."""

    def whole(tree: Any) -> Any:
        return jax.tree.map(lambda x: sharding.shard(x, sharding.P(*[None] * x.ndim)), tree)

    def filled(embeddings: Embeddings, samples: Samples) -> Embeddings:
        masks = samples.sample_mask, samples.sample_mask, samples.negative_mask
        return Embeddings(*(jnp.where(mask[..., None] > 0, x.astype(jnp.float32), 1.0) for x, mask in zip(embeddings, masks, strict=True)))

    def gathered(embeddings: Embeddings, samples: Samples, teacher: Embeddings | None) -> tuple[Float[Array, ""], dict[str, Mean]]:
        embeddings, samples, teacher = whole(embeddings), whole(samples), whole(teacher)
        return _checked(own(filled(embeddings, samples), samples, teacher and filled(teacher, samples)))

    return gathered
