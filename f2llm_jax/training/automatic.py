"""Fields of a configuration that are left open (0, or empty), chosen by the model, the data and the devices.

configs/finetune.py leaves all of these open; a value that is given is taken as it is. The choice is a function of what a resumed run
sees again, so it resumes with the same batches. `config.json` in the workdir has the values that were chosen.
"""

import jax
import ml_collections

from f2llm_jax import sharding
from f2llm_jax.data.records import Dataset, SourceInfo
from f2llm_jax.model.decoder import count_parameters, remat_policy
from f2llm_jax.model.sizes import DecoderConfig

ROW_MULTIPLE = 128  # tokens; what attention kernels of accelerators work in
LARGEST_BATCH = 512  # samples, as published
SMALLEST_BATCH = 8
LEAST_UPDATES = 100  # that a run should have: below, the batch is made smaller
CPU_BYTES = 2 << 30  # for what is kept of tokens, on a device that does not tell its memory
CPU_CHUNK_TOKENS, CHUNK_TOKENS = 1024, 8192  # on a device in a layer at once: what caches hold, and what keeps an accelerator busy
LARGE_STEP = 2  # times the mean, in tokens, that is to be encoded once
ADAM_BYTES = 16  # a parameter: weight, gradient and two moments in float32
PARTS = 10  # validations and checkpoints of a run


def batch(config: ml_collections.ConfigDict, model: DecoderConfig, dataset: Dataset, mesh: jax.sharding.Mesh) -> ml_collections.ConfigDict:
    """A copy of `config` with what a step needs: `dtype`, `remat`, `optimizer.learning_rate` and the fields of `batch`."""
    config = ml_collections.ConfigDict(config.to_dict())
    shape = config.batch
    config.dtype = config.dtype or ("float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16")
    config.optimizer.learning_rate = config.optimizer.learning_rate or learning_rate(count_parameters(model))
    shape.max_length = shape.max_length or min(dataset.longest(), text_limit(config, model, dataset))
    shape.row_tokens = shape.row_tokens or -(-shape.max_length // ROW_MULTIPLE) * ROW_MULTIPLE
    shape.size = shape.size or _batch_size(config.epochs * sum(source.rows["train"] for source in dataset.sources.values()))
    if not shape.microbatch_rows:
        _choose_rows(config, model, dataset, mesh)
    config.remat = config.remat or "full"
    return config.lock()


def text_limit(config: ml_collections.ConfigDict, model: DecoderConfig, dataset: Dataset) -> int:
    """Tokens at which the trained model is to truncate texts: those of `batch.max_length`, or of the data where it is left open."""
    return config.batch.max_length or min(dataset.max_length, model.max_position_embeddings)


def schedule(config: ml_collections.ConfigDict, total: int) -> ml_collections.ConfigDict:
    """A copy of `config` with a validation and a checkpoint every tenth of its `total` updates."""
    config = ml_collections.ConfigDict(config.to_dict())
    for group in (config.eval, config.checkpoint):
        group.every = group.every or max(1, total // PARTS)
    return config.lock()


def learning_rate(parameters: int) -> float:
    """The published peak rates (paper, table 1: 4e-5 at 80M to 5e-6 at 14B) as one power of the size, to two digits."""
    return float(f"{4e-5 * (80e6 / parameters) ** 0.4:.1e}")


def _batch_size(samples: int) -> int:
    """The largest power of two with which a run over so many samples has `LEAST_UPDATES`, within bounds."""
    wanted = max(1, samples // LEAST_UPDATES)
    return min(LARGEST_BATCH, max(SMALLEST_BATCH, 1 << (wanted.bit_length() - 1)))


def _choose_rows(config: ml_collections.ConfigDict, model: DecoderConfig, dataset: Dataset, mesh: jax.sharding.Mesh) -> None:
    """Sets `remat`, `batch.chunk_rows` and `batch.microbatch_rows`: with the least recomputation with which the devices hold a step.

    Raises:
      UserError: there is no such `remat`.
    """
    shape, shards, platform = config.batch, sharding.batch_shards(mesh), mesh.devices.flat[0].platform
    sources = list(dataset.sources.values())
    rows = sum(source.rows["train"] for source in sources)
    mean = sum(source.rows["train"] * _sample_tokens(source, config) for source in sources) / rows
    wanted = LARGE_STEP * shape.size * mean / shards
    if config.remat:
        remat_policy(config.remat)
    else:
        fits = (remat for remat in ("dots", "attention", "full") if tokens_that_fit(model, mesh, remat) >= wanted)
        config.remat = next(fits, "full")
    rows = max(1, int(min(wanted, tokens_that_fit(model, mesh, config.remat)) / shape.row_tokens))  # of a shard, as the next
    chunk_tokens = CPU_CHUNK_TOKENS if platform == "cpu" else CHUNK_TOKENS
    of_chunk = max(1, shape.chunk_rows // shards if shape.chunk_rows else min(rows, chunk_tokens // shape.row_tokens))
    shape.chunk_rows = shards * of_chunk
    shape.microbatch_rows = shards * of_chunk * -(-rows // of_chunk)


def tokens_that_fit(model: DecoderConfig, mesh: jax.sharding.Mesh, remat: str) -> int:
    """Tokens of one device: half of what weights and moments leave holds what is kept of them, the other half is spare.

    The rule gives the rows that `compile_check` found for 0.6B and 1.7B (configs/common.py, `MICROBATCH_ROWS`).
    """
    heads = (2 * model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim
    attention = 2 * model.hidden_size + heads
    dots = attention + 2 * model.intermediate_size
    of_a_layer = {"full": model.hidden_size, "attention": attention, "dots": dots, "none": 3 * dots}  # numbers a token; the last, about
    kept = model.num_hidden_layers * of_a_layer[remat]
    memory = (mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit")
    if not memory:
        return CPU_BYTES // (4 * kept)
    weights = ADAM_BYTES * count_parameters(model) // (mesh.shape["fsdp"] * mesh.shape["tensor"])
    return max(0, memory - weights) // 2 // (2 * kept) * mesh.shape["tensor"]


def _sample_tokens(source: SourceInfo, config: ml_collections.ConfigDict) -> float:
    """Of a query, its positive and the negatives that are drawn, on average."""
    documents = 1 + min(source.negatives, config.batch.negatives.get(source.kind, 0))
    lengths = source.tokens["queries"] / sum(source.rows.values()), source.tokens["documents"] / source.documents
    query, document = (min(length, config.batch.max_length) for length in lengths)
    return query + documents * document
