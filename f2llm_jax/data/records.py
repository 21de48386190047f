"""The on-disk format of a prepared dataset: the only module that knows it, writing and reading.

    OUT/dataset.json                      what the dataset is; written last, so its presence means complete
    OUT/settings.json                     what it was made from and how
    OUT/summary.json, OUT/summary.png     sizes, cleaning and token lengths a source, for people
    OUT/tokenizer/                        the tokenizer it was made with
    OUT/f2llm/<source>/1.0.0/             ArrayRecord splits `train`, `validation` (none for a source of one row), `corpus`
    OUT/tables/<source>/source.json       the source's entry of dataset.json
    OUT/tables/<source>/<split>.query_length.npy    int32 [rows], tokens of each query
    OUT/tables/<source>/<split>.query_ids.npy       int32 [rows], equal for rows of one query
    OUT/tables/<source>/<split>.documents.npy       int32 [rows, 1 + n], positions in `corpus`: the passage, then the negatives;
                                                    -1 for negatives that a row does not have, which come last
    OUT/tables/<source>/<split>.scores.npy          float32 [rows, 1 + n], scores of these documents, NaN for none; of sources with scores
    OUT/tables/<source>/corpus.length.npy           int32 [documents], tokens of each document

`train` and `validation` are in the order of the raw file. `corpus` holds each distinct document of the source once, in the order
of its 63-bit key, hence a document's position is the rank of its key. The tables let every host plan batches of any
step without reading a record.
"""

import dataclasses
import functools
import hashlib
import json
import resource
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from google.protobuf.message import DecodeError
from jaxtyping import Float, Int
from tensorflow_datasets.proto import tf_example_pb2

from f2llm_jax.data.task_kind import TaskKind
from f2llm_jax.errors import UserError
from f2llm_jax.storage import arrays, files
from f2llm_jax.text import Tokenizer, load_tokenizer

FORMAT_VERSION = 2
BUILDER = "f2llm"
VERSION = "1.0.0"
CORPUS = "corpus"
QUERY_SPLITS = ("train", "validation")
SPLITS = (*QUERY_SPLITS, CORPUS)
SCORES = {split: f"{split}.scores" for split in QUERY_SPLITS}  # the name of the table, and of its digest
COMPLETE = "dataset.json"  # written last


class DatasetError(UserError):
    """A folder that is not a complete dataset of this format; the message names the remedy."""


def features() -> tfds.features.FeaturesDict:
    """Features of every split (TFDS gives a builder one set): arrays are stored as bytes, which decode without a copy.

    tokens: int32 [length], EOS last. documents: int64 [1 + n] keys of passage and negatives, -1 for none; in `corpus` [1], its own.
    row: row number in the raw file; in `corpus` -1. language: "" where unknown and in `corpus`.
    """
    return tfds.features.FeaturesDict(
        {
            "tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32, encoding="bytes"),
            "documents": tfds.features.Tensor(shape=(None,), dtype=np.int64, encoding="bytes"),
            "row": tfds.features.Scalar(np.int64),
            "language": tfds.features.Text(),
        }
    )


def encode_record(tokens: np.ndarray, documents: np.ndarray, row: int, language: str) -> bytes:
    """A stored record, as TFDS would write it (its own encoder takes ten times as long): int32 [length], int64 [1 + n]."""
    example = tf_example_pb2.Example()
    fields = example.features.feature
    fields["tokens"].bytes_list.value.append(tokens.tobytes())
    fields["documents"].bytes_list.value.append(documents.tobytes())
    fields["row"].int64_list.value.append(row)
    fields["language"].bytes_list.value.append(language.encode())
    return example.SerializeToString(deterministic=True)


@dataclasses.dataclass(frozen=True)
class SourceInfo:
    """One source of a dataset, as dataset.json has it."""

    name: str
    kind: TaskKind
    unit: str  # what the cap was applied to: this source alone, or several
    languages: dict[str, int]  # rows of each, without those where it is unknown
    rows: dict[str, int]  # of each of `QUERY_SPLITS`
    documents: int  # distinct ones
    negatives: int  # n, a row; some rows may have fewer
    tokens: dict[str, int]  # of all "queries" and of all distinct "documents"
    counters: dict[str, int]  # what cleaning did, see `cleaning`; keys of rows that were skipped begin with "rows: "
    digests: dict[str, str]  # of the records of each of `SPLITS`, in order: token ids, pointers, languages; of scores, where it has any

    query_ids: bool = False  # whether its tables tell which rows are of one query

    @property
    def scored(self) -> bool:
        """Whether its tables hold scores."""
        return SCORES["train"] in self.digests

    @property
    def skipped(self) -> int:
        """Rows that were left out because something was wrong with them."""
        return sum(count for reason, count in self.counters.items() if reason.startswith("rows: "))


@dataclasses.dataclass(frozen=True)
class SplitTables:
    """Lengths and pointers of one split."""

    query_length: Int[np.ndarray, " rows"]
    documents: Int[np.ndarray, "rows 1+n"]  # positions in `corpus`
    document_length: Int[np.ndarray, " documents"]
    query_ids: Int[np.ndarray, " rows"] | None = None  # None in data of an older version
    scores: Float[np.ndarray, "rows 1+n"] | None = None  # float32, NaN for none; None where the source has no scores


class Reader:
    """Token ids of one split by position, opened at the first read; several threads may share one."""

    def __init__(self, folder: epath.Path, split: str):
        self._folder, self._split = folder, split

    @functools.cached_property
    def _records(self):
        return _open(tfds.builder_from_directory(self._folder), self._split)

    def read(self, indices: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Token ids, read-only int32 `[length]` each, in the order asked; positions may repeat and come in any order."""
        indices = np.asarray(indices, np.int64)
        if not indices.size:
            return []
        return [np.frombuffer(_bytes(fields, "tokens"), np.int32) for fields in self._read(indices.tolist())]

    def languages(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """The language of each row, "" where unknown."""
        return [_bytes(fields, "language").decode() for fields in self._read([int(i) for i in indices])]

    def _read(self, indices: list[int]) -> list[Mapping]:
        """The fields of records.

        Raises:
          DatasetError: a file is damaged or missing.
        """
        try:
            return [_fields(record) for record in self._records.__getitems__(indices)]
        except (OSError, RuntimeError, ValueError, KeyError, DecodeError) as error:
            told = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DatasetError(
                f"{self._folder}: split {self._split!r} cannot be read ({told}); prepare it again with --overwrite"
            ) from error


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A complete prepared dataset."""

    folder: epath.Path
    stage: int  # 1 or 2
    max_length: int  # tokens of a text at most, EOS included
    seed: int  # of the train/validation split
    tokenizer_fingerprint: str  # `Tokenizer.fingerprint` of the tokenizer it was made with
    eos_id: int  # the last token of every text
    pad_id: int  # the tokenizer's pad token; records themselves are not padded
    vocab_size: int  # every token id is below it
    sources: dict[str, SourceInfo]  # by name, in order of name

    @property
    def digest(self) -> str:
        """32 hex digits that stand for every record of every source, in order: equal only for the same texts under the same numbers."""
        content = [self.eos_id, [[source.name, source.kind, source.negatives, source.digests] for source in self.sources.values()]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def longer_than(self, length: int) -> int:
        """The number of queries to train on and distinct documents of more than `length` tokens."""
        return 0 if length >= self.max_length else sum(int((lengths > length).sum()) for lengths in self._lengths())

    def longest(self) -> int:
        """Tokens of the longest text to train on."""
        return max(int(lengths.max()) for lengths in self._lengths())

    def _lengths(self) -> Iterator[np.ndarray]:
        for tables in (self.tables(source, "train") for source in self.sources):
            yield from (np.asarray(tables.query_length), np.asarray(tables.document_length))

    def tables(self, source: str, split: str) -> SplitTables:
        """The tables of "train" or "validation"; memory-mapped where the folder is local."""
        folder = tables_folder(self.folder, source)
        info = self.sources[source]
        names = [f"{split}.query_length", f"{split}.documents", f"{CORPUS}.length", f"{split}.query_ids", SCORES[split]]
        there = names[: 3 + info.query_ids + info.scored]  # no data has scores without ids of queries
        return SplitTables(*(arrays.read_array(folder / f"{name}.npy", salt=f"{source}/{name}") for name in there))

    def reader(self, source: str, split: str) -> Reader:
        """A reader of queries ("train", "validation") or of documents ("corpus")."""
        return Reader(source_folder(self.folder, source) / VERSION, split)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the texts were tokenised with.

        Raises:
          DatasetError: the files have changed since.
        """
        tokenizer = load_tokenizer(tokenizer_folder(self.folder))
        if tokenizer.fingerprint != self.tokenizer_fingerprint:
            raise DatasetError(f"{tokenizer_folder(self.folder)} is not the tokenizer that the data was prepared with; prepare it again")
        return tokenizer


def load_dataset(folder: epath.PathLike) -> Dataset:
    """Opens a prepared dataset; reads dataset.json and nothing else.

    Raises:
      DatasetError: preparation did not complete, or wrote another version of the format.
    """
    folder = epath.Path(folder)
    file = folder / COMPLETE
    if not file.exists():
        raise DatasetError(
            f"{folder} has no dataset.json: prepare did not complete there; run `python -m f2llm_jax.prepare --out {folder} ...` (again)"
        )
    version = files.read_json(file, kind=dict).get("format_version")
    if version != FORMAT_VERSION:
        raise DatasetError(f"{file} has format_version {version}, this code reads {FORMAT_VERSION}; prepare again with --overwrite")
    fields = files.read_json(file, sealed=True)
    del fields["format_version"]
    sources = {entry["name"]: SourceInfo(**entry) for entry in fields.pop("sources")}
    return Dataset(folder=folder, sources=sources, **fields)


def write_dataset(
    folder: epath.PathLike, tokenizer: Tokenizer, *, stage: int, max_length: int, seed: int, sources: Sequence[SourceInfo]
) -> None:
    """Writes dataset.json, which declares the dataset complete."""
    fields = {
        "format_version": FORMAT_VERSION,
        "stage": stage,
        "max_length": max_length,
        "seed": seed,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "eos_id": tokenizer.end_id,
        "pad_id": tokenizer.pad_id,
        "vocab_size": tokenizer.vocab_size,
        "sources": [dataclasses.asdict(source) for source in sources],
    }
    files.write_json(epath.Path(folder) / COMPLETE, fields, sealed=True)


def finished_source(folder: epath.PathLike, name: str) -> SourceInfo | None:
    """What `write_tables` returned for a source that is complete in an unfinished dataset; None for any other."""
    file = tables_folder(epath.Path(folder), name) / "source.json"
    return SourceInfo(**files.read_json(file, sealed=True)) if file.exists() else None


def write_settings(folder: epath.PathLike, settings: dict[str, Any]) -> None:
    files.write_json(epath.Path(folder) / "settings.json", settings, sealed=True)


def read_settings(folder: epath.PathLike) -> dict[str, Any] | None:
    """The settings a folder was begun with; None where there are none."""
    file = epath.Path(folder) / "settings.json"
    return files.read_json(file, sealed=True) if file.exists() else None


def allow_open_files() -> None:
    """Raises the limit on open files as far as it goes: a reader keeps its shards open, and a dataset has hundreds of readers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 2**16 if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def tokenizer_folder(folder: epath.PathLike) -> epath.Path:
    return epath.Path(folder) / "tokenizer"


def source_folder(folder: epath.PathLike, name: str) -> epath.Path:
    """Where the records of a source lie."""
    return epath.Path(folder) / BUILDER / name


def tables_folder(folder: epath.Path, name: str) -> epath.Path:
    return folder / "tables" / name


def _open(builder: tfds.core.DatasetBuilder, split: str):
    return builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)


def _fields(record: bytes) -> Mapping:
    """The features of a stored tf.Example. Reading the two we need is four times as fast as TFDS decoding all of them."""
    return tf_example_pb2.Example.FromString(record).features.feature


def _bytes(fields: Mapping, name: str) -> bytes:
    return fields[name].bytes_list.value[0]
