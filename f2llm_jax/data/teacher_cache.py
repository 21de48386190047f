"""Teacher vectors on disk: computed once for every stored text, read with the texts.

A cache is a folder: `begun.json` and, once it is complete, `cache.json` say what the vectors are; a store (see `f2llm_jax.storage.vectors`)
holds, for each source and split, files of `SHARD_TEXTS` vectors in the order of the dataset's records. A file is whole or absent, so an
interrupted run resumes where it stopped and several hosts can share the work.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from f2llm_jax.data.records import SPLITS, Dataset
from f2llm_jax.errors import UserError
from f2llm_jax.storage.files import is_remote, read_json, write_json
from f2llm_jax.storage.vectors import VectorStore

SHARD_TEXTS = 8192
CHECKED_SHARDS = 16  # read whole when a cache is opened; the others when they are first used
# What helps where the teacher's width is not the student's.
ANY_WIDTH = "config.objective.projection=True maps the student to a teacher of any width, config.objective.distillation='scores' needs none"
BEGUN, COMPLETE = "begun.json", "cache.json"  # the second is written last


class TeacherCacheError(UserError):
    """A cache that is incomplete or of something else; the message names the remedy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedVectors:
    """What the vectors of a cache are."""

    name: str  # of the teacher as given, for people
    model: str  # digest of its weights, shape and tokenizer
    width: int  # W, components kept of each raw vector
    dtype: str  # as stored
    compute: str  # dtype that the teacher computed in
    max_length: int  # tokens at which texts are truncated
    data: str  # `Dataset.digest`
    reads: str = "ids"  # of the student, or "texts" behind prompts of its own
    query_prompt: str | None = None  # None for the model's own
    document_prompt: str | None = None

    def store(self, folder: epath.PathLike) -> VectorStore:
        made_by = {"model": self.model, "max_length": self.max_length, "data": self.data, "compute": self.compute, "vectors": "raw"}
        if self.reads == "texts":
            made_by |= {"query_prompt": self.query_prompt, "document_prompt": self.document_prompt}
        return VectorStore(folder, made_by, self.width, self.dtype)


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(CachedVectors) if field.default is not dataclasses.MISSING}


@dataclasses.dataclass(frozen=True)
class CacheShard:
    """One file of vectors: texts `start` to `stop` of a source's split."""

    source: str
    split: str
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.source}/{self.split}/{self.start}"


def shards(dataset: Dataset) -> list[CacheShard]:
    """All shards of a dataset's cache, in order."""
    found = []
    for source in dataset.sources.values():
        for split in SPLITS:
            texts = source.documents if split == "corpus" else source.rows[split]
            found += [CacheShard(source.name, split, a, min(a + SHARD_TEXTS, texts)) for a in range(0, texts, SHARD_TEXTS)]
    return found


def begin(folder: epath.Path, content: CachedVectors) -> VectorStore:
    """Starts a cache or resumes one of the same content; its vectors.

    Raises:
      TeacherCacheError: `folder` holds a cache of something else, or no cache.
    """
    begun, wanted = folder / BEGUN, dataclasses.asdict(content)
    if begun.exists():
        if (before := _DEFAULTS | read_json(begun, sealed=True)) != wanted:
            raise TeacherCacheError(f"{folder} is a cache of {_differences(before, wanted)}; choose another --out or remove it")
    elif folder.exists() and any(folder.iterdir()):
        raise TeacherCacheError(f"{folder} is not empty and no teacher cache; choose another --out")
    else:
        write_json(begun, wanted, sealed=True)
    return content.store(folder)


def finish(folder: epath.Path, dataset: Dataset) -> None:
    """Declares the cache complete.

    Raises:
      TeacherCacheError: a shard is missing.
    """
    content = CachedVectors(**read_json(folder / BEGUN, sealed=True))
    store = content.store(folder)
    if missing := [shard for shard in shards(dataset) if not store.exists(shard.name)]:
        path = store.path(missing[0].name)
        raise TeacherCacheError(f"{folder} lacks {len(missing)} shards, the first is {path}; run cache_teacher again")
    write_json(folder / COMPLETE, dataclasses.asdict(content), sealed=True)


class TeacherCache:
    """A complete cache, opened for reading."""

    def __init__(self, folder: epath.PathLike, dataset: Dataset, max_length: int, student_width: int | None):
        """Opens the cache, and reads some of its shards whole.

        Args:
          folder: of the cache.
          dataset: that the run trains on.
          max_length: tokens at which it truncates texts.
          student_width: components that are compared one by one with the student's; None where any width will do.

        Raises:
          TeacherCacheError: incomplete, of other data, of texts truncated elsewhere, or not of the student's width.
          FileError, VectorStoreError: a shard is damaged.
        """
        self.folder = epath.Path(folder)
        if not (self.folder / COMPLETE).exists():
            raise TeacherCacheError(f"{folder} is no complete teacher cache; run `python -m f2llm_jax.cache_teacher` until it ends")
        try:
            self.content = CachedVectors(**read_json(self.folder / COMPLETE, sealed=True))
        except TypeError as error:
            raise TeacherCacheError(f"{folder} was written by another version of f2llm_jax; run cache_teacher anew") from error
        remedy = f"make one with cache_teacher --data {dataset.folder} --max-length {max_length}"
        if self.content.data != dataset.digest:
            raise TeacherCacheError(f"{folder} was made from other data than {dataset.folder}; {remedy}")
        if self.content.max_length != max_length:
            raise TeacherCacheError(
                f"{folder} holds texts truncated at {self.content.max_length} tokens, this run truncates at {max_length}; {remedy}"
            )
        self._check_width(student_width)
        self._store = self.content.store(self.folder)
        self._shards = {(shard.source, shard.split, shard.start): shard for shard in shards(dataset)}
        ordered = list(self._shards.values())
        for shard in ordered[:: max(1, len(ordered) // CHECKED_SHARDS)]:
            self._open(shard)

    def _check_width(self, student: int | None) -> None:
        """First components are a vector by themselves in a model of this project (its matryoshka widths); in another they need not be."""
        width = self.content.width
        if student is None or width == student or (width > student and self.content.reads == "ids"):
            return
        if width < student:
            raise TeacherCacheError(f"{self.folder} keeps {width} dims, fewer than the student's {student}; {ANY_WIDTH}")
        raise TeacherCacheError(
            f"{self.folder} keeps {width} dims of {self.content.name}, more than the student's {student}; {ANY_WIDTH}; or, if the first "
            f"{student} components are a good vector by themselves, make the cache with --dims {student}"
        )

    @property
    def width(self) -> int:
        """W."""
        return self.content.width

    @property
    def widths(self) -> tuple[int, ...]:
        """W of each teacher: of this one."""
        return (self.content.width,)

    @property
    def digest(self) -> str:
        """Of everything that the vectors depend on besides data and truncation, which are a run's own."""
        return self.content.model if self.content.reads == "ids" else self._store.digest

    def verify(self) -> None:
        """Reads every shard whole.

        Raises:
          FileError, VectorStoreError: one is missing or damaged.
        """
        for shard in self._shards.values():
            self._open(shard)

    def read(self, source: str, split: str, texts: Int[np.ndarray, " N"]) -> Float[np.ndarray, "N W"]:
        """Vectors of the given texts (numbers within the split), float32."""
        vectors = np.empty((len(texts), self.content.width), np.float32)
        start = texts // SHARD_TEXTS * SHARD_TEXTS
        for first in np.unique(start):
            mine = start == first
            vectors[mine] = self._open(self._shards[source, split, int(first)])[texts[mine] - first]
        return vectors

    def _open(self, shard: CacheShard) -> np.ndarray:
        return self._store.read(shard.name, shard.stop - shard.start)


class TeacherCaches:
    """Those of several teachers, opened as one: their vectors of a text come one after another."""

    def __init__(self, caches: Sequence[TeacherCache]):
        """`caches`: of the same data, truncated alike."""
        self._caches = caches
        self.widths = tuple(cache.width for cache in caches)
        self.width = sum(self.widths)
        self.digest = "+".join(cache.digest for cache in caches)

    def verify(self) -> None:
        """As `TeacherCache.verify`."""
        for cache in self._caches:
            cache.verify()

    def read(self, source: str, split: str, texts: Int[np.ndarray, " N"]) -> Float[np.ndarray, "N W"]:
        """As `TeacherCache.read`."""
        return np.concatenate([cache.read(source, split, texts) for cache in self._caches], axis=1)


def cache_folders(setting: str) -> list[str]:
    """The folders of `config.teacher_cache`: one, or several with commas between them. A local cache may have one in its name."""
    if setting and not is_remote(setting) and (epath.Path(setting) / COMPLETE).exists():
        return [setting]
    return [name.strip() for name in setting.split(",") if name.strip()]


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    return ", ".join(f"{key} {before.get(key)!r} (asked for: {now[key]!r})" for key in now if before.get(key) != now[key])
