"""Fills a teacher cache: every stored text of a dataset, encoded once."""

import contextlib

import jax
import jax.numpy as jnp
from etils import epath

from f2llm_jax.cli.progress import ProgressCallback, silent
from f2llm_jax.data import teacher_cache
from f2llm_jax.data.records import Dataset
from f2llm_jax.data.teacher_cache import CachedVectors, TeacherCacheError
from f2llm_jax.inference.devices import all_here, is_first
from f2llm_jax.inference.encode import TextEncoder
from f2llm_jax.storage.locks import lock
from f2llm_jax.text import truncate
from f2llm_jax.weights.digest import model_digest
from f2llm_jax.weights.models import LoadableModel


def cache_teacher(
    origin: LoadableModel,
    dataset: Dataset,
    out: epath.Path,
    *,
    dims: int,
    max_length: int,
    dtype: str,
    compute: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
    chunk_tokens: int | None = None,
    report: ProgressCallback = silent,
) -> CachedVectors:
    """Writes the cache `out`, or what an interrupted run left of it to do; shards are dealt out over the processes.

    Args:
      origin: the teacher.
      dataset: prepared, with the teacher's tokenizer.
      out: folder of the cache.
      dims: first components kept of each raw vector.
      max_length: tokens at which texts are cut, as the training run will.
      dtype: "float16" or "float32" on disk.
      compute: dtype that the teacher computes in.
      mesh, chunk_tokens: of the encoder.
      report: called with texts done and texts in all, over this process's share.

    Raises:
      TeacherCacheError: more dims than the teacher has, another tokenizer, or a folder with another cache.
      VectorStoreError: a vector is not finite in `dtype`.
      LockedError: another process fills the cache.
    """
    if not 1 <= dims <= origin.config.hidden_size:
        raise TeacherCacheError(f"--dims {dims} must be between 1 and the teacher's width {origin.config.hidden_size}")
    tokenizer = origin.matching_tokenizer()
    if tokenizer.fingerprint != dataset.tokenizer_fingerprint:
        raise TeacherCacheError(f"{dataset.folder} was prepared with another tokenizer than {origin.name}'s; prepare it with that one")
    content = CachedVectors(
        name=origin.name,
        model=model_digest(origin),
        width=dims,
        dtype=dtype,
        compute=compute,
        max_length=max_length,
        data=dataset.digest,
    )
    with lock(out) if is_first() else contextlib.nullcontext():
        store = teacher_cache.begin(out, content)
        encoder = TextEncoder(
            origin.config, origin.load(mesh), tokenizer, max_length, dtype=jnp.dtype(compute), mesh=mesh, chunk_tokens=chunk_tokens
        )
        mine = teacher_cache.shards(dataset)[jax.process_index() :: jax.process_count()]
        done, total = 0, sum(shard.stop - shard.start for shard in mine)
        for shard in mine:
            if not store.exists(shard.name):
                ids = dataset.reader(shard.source, shard.split).read(range(shard.start, shard.stop))
                store.write(shard.name, encoder.encode_ids([truncate(i, max_length, dataset.eos_id) for i in ids])[:, :dims])
            done += shard.stop - shard.start
            report(done, total)
        all_here("teacher vectors written")
        if is_first():
            teacher_cache.finish(out, dataset)
    return content
