"""Teacher vectors on disk: computed once for every stored text, read with the texts.

A cache is a folder: `cache.json` (written last; what the vectors are of), and for each source and split shards
`SOURCE/SPLIT/START.npy` of `SHARD_TEXTS` vectors in the order of the dataset's records. A shard is whole or absent, so an
interrupted run goes on where it stopped and several hosts can share the work.
"""

import dataclasses
import functools
import hashlib
import io
import json

import numpy as np
from etils import epath

from f2llm_jax.data.records import SPLITS, Dataset
from f2llm_jax.errors import UserError
from f2llm_jax.files import is_remote

SHARD_TEXTS = 8192
COMPLETE = "cache.json"  # written last
DTYPES = ("float16", "float32")


class TeacherCacheError(UserError):
    """A cache that is incomplete or of something else; the message names the remedy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheFacts:
    """What the vectors of a cache are.

    Attributes:
      model: name of the teacher as given, for people.
      weights: digest of the teacher's weights.
      width: W, components kept of each vector.
      dtype: as stored.
      max_length: tokens at which texts were cut.
      data: digest of the dataset (settings, tokenizer and sources).
    """

    model: str
    weights: str
    width: int
    dtype: str
    max_length: int
    data: str


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of vectors: texts `start` to `stop` of a source's split."""

    source: str
    split: str
    start: int
    stop: int

    def path(self, folder: epath.Path) -> epath.Path:
        """Where it stands in a cache."""
        return folder / self.source / self.split / f"{self.start}.npy"


def shards(dataset: Dataset) -> list[Shard]:
    """All shards of a dataset's cache, in order."""
    found = []
    for source in dataset.sources.values():
        for split in SPLITS:
            texts = source.documents if split == "corpus" else source.rows[split]
            found += [Shard(source.name, split, a, min(a + SHARD_TEXTS, texts)) for a in range(0, texts, SHARD_TEXTS)]
    return found


def write_shard(folder: epath.Path, shard: Shard, vectors: np.ndarray) -> None:
    """Stores `[stop - start, W]` vectors beside, then renames."""
    path = shard.path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, vectors)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(buffer.getvalue())
    partial.replace(path)


def begin(folder: epath.Path, facts: CacheFacts) -> None:
    """Starts a cache or goes on with one of the same facts.

    Raises:
      TeacherCacheError: `folder` holds a cache of something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begun = folder / "begun.json"
    if begun.exists() and (before := json.loads(begun.read_text())) != dataclasses.asdict(facts):
        raise TeacherCacheError(f"{folder} is a cache of {_differences(before, facts)}; choose another --out or remove it")
    begun.write_text(json.dumps(dataclasses.asdict(facts), indent=2) + "\n")


def finish(folder: epath.Path, dataset: Dataset) -> None:
    """Declares the cache complete.

    Raises:
      TeacherCacheError: a shard is missing.
    """
    if missing := [shard for shard in shards(dataset) if not shard.path(folder).exists()]:
        raise TeacherCacheError(f"{folder} lacks {len(missing)} shards, the first is {missing[0].path(folder)}; run cache_teacher again")
    partial = folder / "cache.json.partial"
    partial.write_text((folder / "begun.json").read_text())
    partial.replace(folder / COMPLETE)


class TeacherCache:
    """A complete cache, opened for reading."""

    def __init__(self, folder: epath.PathLike, dataset: Dataset, max_length: int, student_width: int):
        """Opens and checks.

        Raises:
          TeacherCacheError: incomplete, of other data, of texts cut elsewhere, or narrower than the student.
        """
        self._folder = epath.Path(folder)
        if not (self._folder / COMPLETE).exists():
            raise TeacherCacheError(f"{folder} is no complete teacher cache; run `python -m f2llm_jax.cache_teacher` until it ends")
        self.facts = CacheFacts(**json.loads((self._folder / COMPLETE).read_text()))
        remedy = f"make one with cache_teacher --data {dataset.folder} --max-length {max_length} --dims {student_width} or more"
        if self.facts.data != data_digest(dataset):
            raise TeacherCacheError(f"{folder} was made from other data than {dataset.folder}; {remedy}")
        if self.facts.max_length != max_length:
            raise TeacherCacheError(f"{folder} holds texts cut at {self.facts.max_length} tokens, this run cuts at {max_length}; {remedy}")
        if self.facts.width < student_width:
            raise TeacherCacheError(f"{folder} keeps {self.facts.width} dims, fewer than the student's {student_width}; {remedy}")

    def read(self, source: str, split: str, texts: np.ndarray) -> np.ndarray:
        """Vectors `[n, W]` of the given texts (numbers within the split), float32."""
        vectors = np.empty((len(texts), self.facts.width), np.float32)
        start = texts // SHARD_TEXTS * SHARD_TEXTS
        for first in np.unique(start):
            mine = start == first
            vectors[mine] = self._open(source, split, int(first))[texts[mine] - first]
        return vectors

    @functools.lru_cache(maxsize=256)  # noqa: B019  (a cache lives as long as its run)
    def _open(self, source: str, split: str, start: int) -> np.ndarray:
        path = Shard(source, split, start, 0).path(self._folder)
        return np.load(path, mmap_mode="r") if not is_remote(path) else np.load(io.BytesIO(path.read_bytes()))


def data_digest(dataset: Dataset) -> str:
    """What makes two datasets hold the same texts under the same numbers."""
    sources = [dataclasses.asdict(source) for source in dataset.sources.values()]
    facts = [dataset.stage, dataset.seed, dataset.max_length, dataset.tokenizer_fingerprint, sources]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _differences(before: dict, facts: CacheFacts) -> str:
    now = dataclasses.asdict(facts)
    return ", ".join(f"{key} {before.get(key)!r} (asked for: {now[key]!r})" for key in now if before.get(key) != now[key])
