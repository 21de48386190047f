"""The TFDS builder of one source: runs its Beam pipeline and declares the splits that workers wrote.

The pipeline is the same in this process, in several, and on Dataflow, Flink or Spark, as the Beam flags say.
"""

import dataclasses
import re
import tempfile
from collections.abc import Sequence

import apache_beam as beam
import tensorflow_datasets as tfds
from apache_beam.options.pipeline_options import PipelineOptions
from etils import epath
from tensorflow_datasets.core.dataset_builder import FileReaderBuilder

from f2llm_jax.data import records
from f2llm_jax.errors import UserError
from f2llm_jax.preparation import tables
from f2llm_jax.preparation.selection import Recipe, SplitRules
from f2llm_jax.preparation.shards import WriteDocuments, WriteRows, shard_name
from f2llm_jax.preparation.sources import Source

# The in-process runner by name: plain DirectRunner first tries Prism, which it would have to download.
IN_PROCESS = "--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner"

# A runner brings the exception of a worker back as text inside one of its own, or with the name of its step behind.
_USER_ERROR = re.compile(r"UserError: (.*?)(?: \[while running .*)?$", re.MULTILINE)


@dataclasses.dataclass(eq=False, kw_only=True)
class SourceConfig(tfds.core.BuilderConfig):
    """What determines the records of one source.

    Attributes:
      source: its raw files.
      recipe: what is made of them.
      tokenizer: folder of the tokenizer.
      work: folder for what passes between workers.
      beam_flags: Beam pipeline options; without a `--runner` the pipeline runs in this process.
    """

    source: Source
    recipe: Recipe
    tokenizer: str
    work: str
    beam_flags: tuple[str, ...]


class F2LLM(FileReaderBuilder):
    """Writes `train`, `validation` and `corpus` of one source; see `records` for what they hold and how they are ordered.

    Not a `BeamBasedBuilder`: that one sends every record through Beam (see `shards`), and TFDS has deprecated it.
    """

    name = records.BUILDER
    VERSION = tfds.core.Version(records.VERSION)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=records.features(), disable_shuffling=True)

    def _download_and_prepare(self, dl_manager, download_config) -> None:
        config: SourceConfig = self.builder_config
        rules = SplitRules.of(config.source, config.recipe)
        self.data_path.mkdir(parents=True, exist_ok=True)
        flags = config.beam_flags
        if not any(flag.startswith("--runner") for flag in flags):
            flags = (*flags, IN_PROCESS)
        shards = str(self.data_path)
        with beam.Pipeline(options=PipelineOptions(list(flags))) as pipeline:
            parts = pipeline | "Parts" >> beam.Create(list(enumerate(config.source.parts)))
            if len(config.source.parts) > 1:
                parts |= "Spread" >> beam.Reshuffle()  # over the workers
            _ = (
                parts
                | "Rows" >> beam.ParDo(WriteRows(config.source, rules, config.tokenizer, shards, config.work))
                | "Buckets" >> beam.GroupByKey()
                | "Documents" >> beam.ParDo(WriteDocuments(shards, config.work))
            )
        counts = tables.shard_counts(epath.Path(config.work), len(config.source.parts))
        self.info.set_splits(tfds.core.SplitDict([self._declare(split, rows) for split, rows in counts.items() if sum(rows.values())]))

    def _declare(self, split: str, rows: dict[int, int]) -> tfds.core.SplitInfo:
        """Gives the shards of a split, `rows` by index, the names that TFDS expects; TFDS knows no shard without records."""
        template = tfds.core.ShardedFileTemplate(
            data_dir=self.data_path, dataset_name=self.name, split=split, filetype_suffix=self.info.file_format.file_suffix
        )
        filled = [index for index in sorted(rows) if rows[index]]
        for index in rows.keys() - set(filled):
            (self.data_path / shard_name(index, split)).unlink(missing_ok=True)
        size = 0
        for number, index in enumerate(filled):
            path = template.sharded_filepath(shard_index=number, num_shards=len(filled))
            (self.data_path / shard_name(index, split)).replace(path)
            size += path.stat().length
        return tfds.core.SplitInfo(name=split, shard_lengths=[rows[index] for index in filled], num_bytes=size, filename_template=template)


def build_source(
    folder: epath.PathLike, source: Source, recipe: Recipe, tokenizer: epath.PathLike, beam_flags: Sequence[str]
) -> records.SourceInfo:
    """Writes the splits and tables of one source under `folder`, replacing what an interrupted run left of it.

    Args:
      folder: the dataset's folder.
      source: to write.
      recipe: to follow.
      tokenizer: its folder.
      beam_flags: Beam pipeline options; without a `--runner` the pipeline runs in this process.

    Raises:
      UserError: a row cannot be used.
    """
    place, work = records.source_folder(folder, source.name), epath.Path(folder) / "work" / source.name
    for left in (place, work):
        if left.exists():
            left.rmtree()
    work.mkdir(parents=True)
    config = SourceConfig(
        name=source.name, source=source, recipe=recipe, tokenizer=str(tokenizer), work=str(work), beam_flags=tuple(beam_flags)
    )
    builder = F2LLM(data_dir=folder, config=config, file_format="array_record")
    tfds.disable_progress_bar()  # its bars count splits, three a source
    try:
        with tempfile.TemporaryDirectory() as downloads:  # TFDS wants one; nothing is downloaded
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False), download_dir=downloads)
    except Exception as error:
        found = _USER_ERROR.search(f"UserError: {error}" if isinstance(error, UserError) else str(error))
        if not found:
            raise
        raise UserError(found[1]) from error
    info = tables.write_tables(folder, work, source)
    work.rmtree()
    return info
