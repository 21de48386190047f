"""The TFDS builder of one source: chunks of raw rows in, tokenised ArrayRecord splits out.

A Beam element is a chunk of rows, not a row, so that the tokenizer works on the distinct texts of thousands of rows at
once, on all cores. The same pipeline runs in this process or on Dataflow, Flink or Spark, as the Beam flags say.
"""

import dataclasses
import functools
import hashlib
import re
import tempfile
from collections.abc import Iterator, Sequence

import apache_beam as beam
import numpy as np
import pyarrow as pa
import tensorflow_datasets as tfds
from apache_beam.options.pipeline_options import PipelineOptions
from etils import epath

from f2llm_jax.data import records
from f2llm_jax.data.sources import LANGUAGE, Chunk, RawDataError, Source, read_chunks
from f2llm_jax.text import Tokenizer, load_tokenizer, strip_instruction

VALIDATION_SHARE = 0.01  # published split: 99/1 a source
ENCODE_TEXTS = 8_192  # texts a tokenizer call: bounds the memory of its intermediate results

# The in-process runner by name: plain DirectRunner first tries Prism, which it would have to download.
IN_PROCESS = "--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner"

# A runner brings the exception of a worker back as text inside one of its own.
_RAW_DATA_ERROR = re.compile(r"RawDataError: (.*?)(?: \[while running .*)?$", re.MULTILINE)


@dataclasses.dataclass(eq=False, kw_only=True)
class SourceConfig(tfds.core.BuilderConfig):
    """What determines the records of one source.

    Attributes:
      source: the raw file.
      tokenizer: folder of the tokenizer.
      max_length: tokens a text at most, EOS included.
      stage: 1 (instructions stripped from queries) or 2 (kept).
      seed: of the train/validation split.
    """

    source: Source
    tokenizer: str
    max_length: int
    stage: int
    seed: int


class F2LLM(tfds.core.BeamBasedBuilder):
    """Writes `train`, `validation` and `corpus` of one source; see `records` for what they hold and how they are ordered."""

    name = records.BUILDER
    VERSION = tfds.core.Version(records.VERSION)

    def _info(self) -> tfds.core.DatasetInfo:
        # Records are sorted by their integer key, over all shards: TFDS then assigns shards by key / largest key.
        return tfds.core.DatasetInfo(builder=self, features=records.features(), disable_shuffling=True)

    def _split_generators(self, dl_manager, pipeline):
        del dl_manager
        config = self.builder_config
        splits = self._generate_examples(pipeline, config)
        names = [split for split in records.SPLITS if split != "validation" or config.source.rows > 1]
        return {name: splits[name] for name in names}  # TFDS refuses a split without records

    def _generate_examples(self, pipeline, config):
        return (
            pipeline
            | "Source" >> beam.Create([config.source])
            | "Read" >> beam.FlatMap(read_chunks)
            | "Spread" >> beam.Reshuffle()
            | "Tokenise"
            >> beam.ParDo(
                Tokenise(config.source, config.tokenizer, config.max_length, config.stage, Split.of(config.source, config.seed))
            ).with_outputs(*records.SPLITS)
        )


@dataclasses.dataclass(frozen=True)
class Split:
    """Which rows of a source are held out: a function of (seed, source name, query text, passage text) alone.

    So a row keeps its side when rows are appended, removed or moved, copies of a row share a side, and both stages hold
    out the same rows (the query is hashed with its instruction). The one exception keeps both sides from being empty
    where a small source has no row under, or none over, the threshold: then its row of smallest hash is held out, or its row of
    largest hash is trained on, until more rows arrive. A source of one row has no validation split.

    Attributes:
      salt: seed and source name.
      moved: the exceptions, from row number to split name.
    """

    salt: str
    moved: dict[int, str]

    @classmethod
    def of(cls, source: Source, seed: int) -> "Split":
        """Reads as many rows as it takes to see both sides: nearly always one chunk."""
        plain = cls(f"{seed}\0{source.name}", {})
        values: list[int] = []
        for chunk in read_chunks(source, ["query", "passage"]):
            queries, passages = (chunk.columns[name].to_pylist() for name in ("query", "passage"))
            values += map(plain.value, queries, passages)
            if len({plain.side(value) for value in values}) == 2:
                return plain
        if len(values) < 2:
            return plain
        if plain.side(values[0]) == "train":
            return cls(plain.salt, {int(np.argmin(np.array(values, np.uint64))): "validation"})
        return cls(plain.salt, {int(np.argmax(np.array(values, np.uint64))): "train"})

    def value(self, query: str, passage: str) -> int:
        """64-bit BLAKE2b of what the side depends on."""
        return int.from_bytes(hashlib.blake2b(f"{self.salt}\0{query}\0{passage}".encode(), digest_size=8).digest())

    @staticmethod
    def side(value: int) -> str:
        return "validation" if value < VALIDATION_SHARE * 2**64 else "train"

    def __call__(self, row: int, query: str, passage: str) -> str:
        """The split of row number `row`."""
        return self.moved.get(row) or self.side(self.value(query, passage))


class Tokenise(beam.DoFn):
    """From a chunk to its `(key, record)` pairs, tagged by split; a document once a chunk (the writer drops repeats)."""

    def __init__(self, source: Source, tokenizer: str, max_length: int, stage: int, split: Split):
        self.source, self.tokenizer, self.max_length, self.stage, self.split = source, tokenizer, max_length, stage, split

    def process(self, chunk: Chunk):  # Beam warns of a return type that names no tags
        queries = chunk.columns["query"].to_pylist()
        passages = chunk.columns["passage"].to_pylist()
        languages = chunk.columns[LANGUAGE].to_pylist()
        distinct = pa.concat_arrays([chunk.columns[name] for name in self.source.document_columns]).dictionary_encode()
        texts = distinct.dictionary.to_pylist()
        hashes = np.array([document_hash(text) for text in texts], np.int64)
        documents = hashes[distinct.indices.to_numpy()].reshape(-1, len(queries)).T
        for key, tokens in zip(hashes.tolist(), self._encode(texts), strict=True):
            yield beam.pvalue.TaggedOutput(records.CORPUS, (key, records.document_record(tokens, key)))
        shown = [strip_instruction(query) for query in queries] if self.stage == 1 else queries
        for i, tokens in enumerate(self._encode(shown)):
            row = chunk.first_row + i
            record = records.query_record(tokens, documents[i], row, languages[i])
            yield beam.pvalue.TaggedOutput(self.split(row, queries[i], passages[i]), (row, record))

    def _encode(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        tokenizer = _tokenizer(self.tokenizer)
        for start in range(0, len(texts), ENCODE_TEXTS):
            yield from tokenizer.encode(texts[start : start + ENCODE_TEXTS], self.max_length)


def document_hash(text: str) -> int:
    """The key of a document in its source's corpus: the upper 63 bits of the 8-byte BLAKE2b of its UTF-8 text.

    Among 100 million documents of one source two share a key with a chance of 1 in 2,000; they would be stored as one.
    """
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def build_source(folder: epath.PathLike, config: SourceConfig, beam_flags: Sequence[str]) -> None:
    """Writes the splits of one source under `folder`, replacing what an interrupted run left of it.

    Args:
      folder: the dataset's folder.
      config: the source and its settings.
      beam_flags: Beam pipeline options; without a `--runner` the pipeline runs in this process.

    Raises:
      RawDataError: a row cannot be used.
    """
    flags = [*beam_flags] if any(flag.startswith("--runner") for flag in beam_flags) else [*beam_flags, IN_PROCESS]
    place = records.source_folder(folder, config.name)
    if place.exists():
        place.rmtree()
    builder = F2LLM(data_dir=folder, config=config, file_format="array_record")
    # A document comes once from every chunk that has it: equal keys are equal records, and the writer keeps one.
    download = tfds.download.DownloadConfig(beam_options=PipelineOptions(flags), ignore_duplicates=True, try_download_gcs=False)
    tfds.disable_progress_bar()  # its bars count splits, three a source
    try:
        with tempfile.TemporaryDirectory() as downloads:  # TFDS wants one; nothing is downloaded
            builder.download_and_prepare(download_config=download, download_dir=downloads)
    except Exception as error:
        found = _RAW_DATA_ERROR.search(str(error))
        if not found:
            raise
        raise RawDataError(found[1]) from error


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: str) -> Tokenizer:
    """One tokenizer a process: a vocabulary of 150,000 takes longer to load than a small source to encode."""
    return load_tokenizer(folder)
