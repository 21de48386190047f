"""Fills a teacher cache: every stored text of a dataset, encoded once."""

import hashlib
from collections.abc import Callable

import jax
import numpy as np
from etils import epath

from f2llm_jax.data import teacher_cache
from f2llm_jax.data.records import Dataset
from f2llm_jax.data.teacher_cache import CacheFacts, TeacherCacheError
from f2llm_jax.inference.encode import TextEncoder
from f2llm_jax.text import truncate
from f2llm_jax.weights.models import LoadableModel


def cache_teacher(
    origin: LoadableModel,
    dataset: Dataset,
    out: epath.Path,
    *,
    dims: int,
    max_length: int,
    dtype: str,
    mesh: jax.sharding.Mesh | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> CacheFacts:
    """Writes the cache `out`, or what an interrupted run left of it to do; shards are dealt out over the processes.

    Args:
      origin: the teacher.
      dataset: prepared, with the teacher's tokenizer.
      out: folder of the cache.
      dims: first components kept of each raw vector.
      max_length: tokens at which texts are cut, as the training run will.
      dtype: "float16" or "float32" on disk.
      mesh: of the encoder.
      report: called with texts done and texts in all, over this process's share.

    Raises:
      TeacherCacheError: more dims than the teacher has, another tokenizer, or a folder with another cache.
    """
    if not 1 <= dims <= origin.config.hidden_size:
        raise TeacherCacheError(f"--dims {dims} must be between 1 and the teacher's width {origin.config.hidden_size}")
    tokenizer = origin.matching_tokenizer()
    if tokenizer.fingerprint != dataset.tokenizer_fingerprint:
        raise TeacherCacheError(f"{dataset.folder} was prepared with another tokenizer than {origin.name}'s; prepare it with that one")
    params = origin.load(mesh)
    facts = CacheFacts(
        model=origin.name,
        weights=weights_digest(params),
        width=dims,
        dtype=dtype,
        max_length=max_length,
        data=teacher_cache.data_digest(dataset),
    )
    teacher_cache.begin(out, facts)
    encoder = TextEncoder(origin.config, params, tokenizer, max_length, mesh=mesh)
    mine = teacher_cache.shards(dataset)[jax.process_index() :: jax.process_count()]
    done, total = 0, sum(shard.stop - shard.start for shard in mine)
    for shard in mine:
        if not shard.path(out).exists():
            ids = dataset.reader(shard.source, shard.split).read(range(shard.start, shard.stop))
            vectors = encoder.encode_ids([truncate(i, max_length, dataset.eos_id) for i in ids])[:, :dims]
            teacher_cache.write_shard(out, shard, _stored(vectors, dtype))
        done += shard.stop - shard.start
        report(done, total)
    return facts


def weights_digest(params) -> str:
    """A digest that two sets of weights share only if their tensors agree in sum and in sum of squares, bit by bit."""
    sums = jax.jit(lambda tree: jax.tree.map(lambda x: jax.numpy.stack([x.sum(), (x * x).sum()]), tree))(params)
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(sums))).hexdigest()


def _stored(vectors: np.ndarray, dtype: str) -> np.ndarray:
    stored = vectors.astype(dtype)
    if not np.isfinite(stored).all():
        raise TeacherCacheError(f"the teacher's vectors are not finite in {dtype}; pass --dtype float32 or check the teacher")
    return stored
