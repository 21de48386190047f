"""Fills a teacher cache: every stored text of a dataset, encoded once."""

import contextlib
from typing import Literal, Protocol

import jax
import numpy as np
from etils import epath
from jaxtyping import Float

from f2llm_jax.cli.progress import ProgressCallback, silent
from f2llm_jax.data import teacher_cache
from f2llm_jax.data.records import CORPUS, Dataset
from f2llm_jax.data.teacher_cache import CachedVectors, CacheShard, TeacherCacheError
from f2llm_jax.inference.devices import all_here, is_first
from f2llm_jax.storage.locks import lock
from f2llm_jax.storage.vectors import VectorStore
from f2llm_jax.teachers.texts import Prompts, Role
from f2llm_jax.text import TokenIds, truncate

SAME = 0.99  # least cosine of two vectors of one text by one model, whatever the batch and the precision


class VectorSource(Protocol):
    """What turns stored texts into vectors."""

    name: str  # as given, for people
    digest: str  # of everything that its vectors depend on besides texts and prompts
    compute: str  # dtype that it computes in; "" where that is not known
    prompts: Prompts

    @property
    def reads(self) -> Literal["ids", "texts"]:
        """The student's token ids, or the texts behind prompts of its own."""

    @property
    def width(self) -> int:
        """W, components of a vector."""

    def encode(self, ids: list[TokenIds], role: Role) -> Float[np.ndarray, "S W"]:
        """Raw vectors of stored texts, in order."""


def fill_cache(
    teacher: VectorSource,
    dataset: Dataset,
    out: epath.Path,
    *,
    dims: int | None,
    max_length: int,
    dtype: str,
    report: ProgressCallback = silent,
) -> CachedVectors:
    """Writes the cache `out`, or what an interrupted run left of it to do; shards are dealt out over the processes.

    Args:
      teacher: of the vectors.
      dataset: prepared.
      out: folder of the cache.
      dims: first components kept of each raw vector; None for all.
      max_length: tokens at which texts are truncated, as the training run will.
      dtype: "float16" or "float32" on disk.
      report: called with texts done and texts in all, over this process's share.

    Raises:
      TeacherCacheError: more dims than the teacher has, a folder with another cache, or a teacher that has changed since it began.
      VectorStoreError: a vector is not finite in `dtype`.
      LockedError: another process fills the cache.
    """
    if dims is not None and not 1 <= dims <= teacher.width:
        raise TeacherCacheError(f"--dims {dims} must be between 1 and the teacher's width {teacher.width}")
    content = CachedVectors(
        name=teacher.name,
        model=teacher.digest,
        width=dims or teacher.width,
        dtype=dtype,
        compute=teacher.compute,
        max_length=max_length,
        data=dataset.digest,
        reads=teacher.reads,
        query_prompt=teacher.prompts.query,
        document_prompt=teacher.prompts.document,
    )
    with lock(out) if is_first() else contextlib.nullcontext():
        store = teacher_cache.begin(out, content)
        every = teacher_cache.shards(dataset)
        if teacher.reads == "texts":
            _check_unchanged(teacher, dataset, store, every, max_length)
        mine = every[jax.process_index() :: jax.process_count()]
        done, total = 0, sum(shard.stop - shard.start for shard in mine)
        for shard in mine:
            if not store.exists(shard.name):
                ids = read_ids(dataset, shard, max_length)
                store.write(shard.name, teacher.encode(ids, role_of(shard))[:, : content.width])
            done += shard.stop - shard.start
            report(done, total)
        all_here("teacher vectors written")
        if is_first():
            teacher_cache.finish(out, dataset)
    return content


def check_complete(teacher: VectorSource, dataset: Dataset, max_length: int) -> None:
    """Asks a teacher whose vectors cost nothing for all of them, and writes none. Raises what it raises for a text."""
    for shard in teacher_cache.shards(dataset):
        teacher.encode(read_ids(dataset, shard, max_length), role_of(shard))


def read_ids(dataset: Dataset, shard: CacheShard, max_length: int) -> list[TokenIds]:
    """The token ids of a shard's texts, as a run with this `max_length` reads them."""
    stored = dataset.reader(shard.source, shard.split).read(range(shard.start, shard.stop))
    return [truncate(ids, max_length, dataset.eos_id) for ids in stored]


def role_of(shard: CacheShard) -> Role:
    """Rows are queries, whatever their kind; everything that they are compared with is a document."""
    return "document" if shard.split == CORPUS else "query"


def _check_unchanged(teacher: VectorSource, dataset: Dataset, store: VectorStore, shards: list[CacheShard], max_length: int) -> None:
    """Asks again for a vector that an interrupted run has stored: an endpoint's model may be another one under the same name."""
    if not (written := next((shard for shard in shards if store.exists(shard.name)), None)):
        return
    before = np.asarray(store.read(written.name, written.stop - written.start)[0], np.float32)
    now = teacher.encode(read_ids(dataset, written, max_length)[:1], role_of(written))[0, : store.width].astype(np.float32)
    cosine = float(before @ now / max(float(np.linalg.norm(before) * np.linalg.norm(now)), 1e-12))
    if not cosine >= SAME:
        raise TeacherCacheError(
            f"{teacher.name} is another model than the one that {store.folder.parent} was begun with: the vectors of one text have a "
            f"cosine of {cosine:.3f}; choose another --out, or go back to that model"
        )
