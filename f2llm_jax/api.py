"""The Python API, for scripts and notebooks: `from f2llm_jax import api`.

    dataset = api.prepare("pairs.jsonl", MODEL, "DATA")
    run = api.train({"init": MODEL, "data.folder": "DATA"}, "RUN")
    api.release("RUN", "OUT")
    vectors = api.load("OUT").encode(["Who wrote Faust?"], prompt="query")

What a command does with flags these functions do with arguments. They raise `f2llm_jax.errors.UserError` for what the caller can correct,
print progress to stderr, and never end the process. They are in a module of their own because `f2llm_jax.prepare` and
`f2llm_jax.release` are modules of the package.
"""

import logging
import os
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Float

from f2llm_jax.cli import configuration
from f2llm_jax.cli.arguments import COMPUTE
from f2llm_jax.data.pipeline import BatchConfig, Pipeline, StepData
from f2llm_jax.data.records import Dataset, load_dataset
from f2llm_jax.data.task_kind import TaskKind
from f2llm_jax.errors import UserError
from f2llm_jax.inference.encode import TextEncoder, load_encoder, truncate_and_normalize
from f2llm_jax.inference.given_texts import given_texts
from f2llm_jax.inputs import folders
from f2llm_jax.inputs.columns import ColumnChoice
from f2llm_jax.inputs.rows import write_rows
from f2llm_jax.objectives import LossFunction
from f2llm_jax.preparation.selection import Recipe, SplitBy
from f2llm_jax.release import hf_folder
from f2llm_jax.reporting.run_record import RunRecord, read_record
from f2llm_jax.storage.files import check_apart
from f2llm_jax.text import find_tokenizer
from f2llm_jax.training.loggers import Logger
from f2llm_jax.training.run import run
from f2llm_jax.weights.embedding_config import EmbeddingConfig
from f2llm_jax.weights.models import find_model

__all__ = ["Encoder", "batches", "load", "prepare", "release", "train"]


class Encoder:
    """A model that turns texts into vectors; made by `load`."""

    def __init__(self, encoder: TextEncoder, width: int, embedding: EmbeddingConfig):
        self._encoder, self._embedding = encoder, embedding
        self.width = width  # D, the dimensions of a whole vector
        self.prompts = types.MappingProxyType(dict(embedding.prompts))  # of the model, by name

    @property
    def max_length(self) -> int:
        """Tokens, EOS included, at which texts are truncated."""
        return self._encoder.max_length

    @overload
    def encode(self, texts: str, prompt: str | None = ..., dim: int | None = ..., normalize: bool = ...) -> Float[np.ndarray, " K"]: ...
    @overload
    def encode(
        self, texts: Iterable[str], prompt: str | None = ..., dim: int | None = ..., normalize: bool = ...
    ) -> Float[np.ndarray, "S K"]: ...
    def encode(
        self, texts: str | Iterable[str], prompt: str | None = None, dim: int | None = None, normalize: bool = True
    ) -> Float[np.ndarray, " K"] | Float[np.ndarray, "S K"]:
        """Vectors of texts, in the order given. Texts that are truncated at `max_length` tokens are told by a `UserWarning`.

        Args:
          texts: one text, which gives one vector, or S texts (a list, an array, a generator, ...), which give a matrix.
          prompt: put before every text: the name of one of the model's `prompts`, such as "query", or any string as it is; None for none.
            For queries of a task of your own that is `f2llm_jax.text.query_prompt(instruction)`; documents take none.
          dim: K, leading dimensions to keep; None for all. The model should be trained for this width.
          normalize: give vectors of length 1, so that a dot product is a cosine.

        Returns:
          float32 `[K]` or `[S, K]`.

        Raises:
          UserError: `dim` is not between 1 and `width`, `prompt` looks like a name and is none, or one of `texts` is no text.
        """
        if dim is not None and not (_is_count(dim) and 1 <= dim <= self.width):
            raise UserError(f"dim={dim!r} must be from 1 to the model's {self.width} dimensions")
        if not isinstance(prompt, str | None):
            raise UserError(f"prompt={prompt!r} must be a str or None")
        prefix = self._embedding.resolve_prompt(prompt) if prompt else ""
        several = given_texts(texts)
        before = self._encoder.truncated
        raw = self._encoder.encode(several, prefix)
        if longer := self._encoder.truncated - before:
            told = f"{longer:,} of {len(several):,} texts are longer than {self.max_length:,} tokens and were truncated"
            warnings.warn(told, stacklevel=2)
        vectors = truncate_and_normalize(raw, dim or self.width) if normalize else raw[:, : dim or self.width]
        return vectors[0] if isinstance(texts, str) else vectors


def _is_count(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def load(model: str | os.PathLike[str], *, dtype: str = "float32", max_length: int | None = None) -> Encoder:
    """Loads a model for encoding.

    Args:
      model: Hugging Face folder, Hub id, workdir of a run (its last checkpoint) or one of its checkpoints, `WORKDIR/checkpoints/STEP`.
      dtype: compute dtype, "float32" or "bfloat16".
      max_length: tokens at which texts are truncated; the model's own limit if None.

    Raises:
      UserError: there is no such model, it has no tokenizer that fits it, or an argument is not of its kind.
    """
    if dtype not in COMPUTE:
        raise UserError(f"dtype={dtype!r}: a model computes in {' or '.join(COMPUTE)}")
    if max_length is not None and not (_is_count(max_length) and max_length >= 1):
        raise UserError(f"max_length={max_length!r} must be a whole number of at least 1, or None for the model's own limit")
    found = find_model(str(model))
    return Encoder(load_encoder(found, dtype=jnp.dtype(dtype), max_length=max_length), found.width, found.embedding)


def prepare(
    data: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    max_length: int = 1024,
    validation: float = 0.1,
    split_by: SplitBy = "query",
    columns: Mapping[str, str] | None = None,
    ignore_columns: Sequence[str] = (),
    instruction: str | None = None,
    stage: int = 2,
    cap: int = 0,
    seed: int = 0,
    skip_invalid: bool = False,
    workers: int | None = None,
    overwrite: bool = False,
) -> Dataset:
    """Tokenises pairs or triplets, or returns the dataset at `out` if it was made from the same data with the same settings.

    Args:
      data: a file or a folder of files, of the forms of docs/data.md; or rows, such as `{"query": ..., "passage": ...,
        "negative": ...}`, which are kept as `OUT.rows/rows.jsonl`.
      model: whose tokenizer is used: Hugging Face folder, Hub id, or workdir of a run.
      out: folder to write.
      max_length: tokens of a text at most, EOS included.
      validation: share of the rows of each source that is held out.
      split_by: "query": all rows of a query are on one side; or "row".
      columns: the data's columns by role, such as `{"query": "question", "passage": "answer"}`, where their names are others.
      ignore_columns: names, or patterns such as `*_id`, of columns to leave out.
      instruction: the task of queries that carry no instruction.
      stage: 2, or 1 to strip instructions and take retrieval sources alone (paper, section 3.2).
      cap: rows of a source at most; 0 for all.
      seed: of what is random.
      skip_invalid: leave out and count rows without valid texts, in place of an error.
      workers: processes; one a CPU if None.
      overwrite: replace another dataset at `out`.

    Raises:
      UserError: the data, the tokenizer or `out` cannot be used.
    """
    from f2llm_jax.preparation import sources, writing  # TFDS and Beam take seconds to import

    raw = os.fspath(data) if isinstance(data, str | os.PathLike) else write_rows(data, f"{os.fspath(out).rstrip('/')}.rows")
    names = list(folders.find_sources(raw).paths) if os.path.isdir(raw) else [folders.table_name(raw)]
    found = sources.find_sources(
        raw,
        stage=stage,
        choice=ColumnChoice(
            dict(columns or {}), ignore_columns, use='columns={{"{role}": "{column}"}}', ignore='ignore_columns=["{column}"]'
        ),
        instructions=dict.fromkeys(names, instruction) if instruction else None,
    )
    recipe = Recipe(
        stage=stage,
        max_length=max_length,
        seed=seed,
        cap=cap,
        instruct_documents=0.0,
        policy="skip" if skip_invalid else "default",
        validation=validation,
        split_by=split_by,
    )
    return writing.prepare(found, find_tokenizer(str(model)), os.fspath(out), recipe, workers=workers, overwrite=overwrite)


def batches(
    dataset: Dataset | str | os.PathLike[str],
    size: int = 32,
    *,
    split: str = "train",
    epochs: int = 1,
    seed: int = 0,
    max_length: int | None = None,
    negatives: Mapping[TaskKind, int] | None = None,
    sources: str | Sequence[str] | None = None,
) -> Iterator[StepData]:
    """The batches of a prepared dataset as training draws them: each of one source, in random order, every row once an epoch.

    Args:
      dataset: from `prepare`, or its folder.
      size: B, samples of a batch.
      split: "train" or "validation".
      epochs: how many times to go over the rows.
      seed: of the order and of the negatives that are drawn.
      max_length: tokens at which texts are truncated; those of the dataset if None.
      negatives: hard negatives drawn by task kind; None for the published 7 (retrieval), 9 (clustering) and 1 (classification).
      sources: names of the sources to draw from; None for all.

    Raises:
      UserError: there is no such dataset, split, source or task kind, or an argument is not of its kind.

    Yields:
      `StepData`, whose `batch` has the packed token rows and the masks (see `f2llm_jax.batch.Batch`) and whose `plan` says which rows of
      which source they are.
    """
    if not (_is_count(epochs) and epochs >= 1):
        raise UserError(f"epochs={epochs!r} must be a whole number of at least 1")
    dataset = dataset if isinstance(dataset, Dataset) else load_dataset(dataset)
    length = dataset.max_length if max_length is None else max_length
    config = BatchConfig(size=size, row_tokens=length, microbatch_rows=1, max_length=length, negatives=negatives)
    names = [sources] if isinstance(sources, str) else sources
    pipeline = Pipeline(dataset, split, config, seed, None, None if names is None else list(names))
    yield from pipeline.steps(0, pipeline.plan.epochs.steps(epochs))


def train(
    config: ml_collections.ConfigDict | Mapping[str, Any] | str,
    workdir: str | os.PathLike[str],
    *,
    objective: LossFunction | None = None,
    callbacks: Sequence[Logger] = (),
) -> RunRecord:
    """Trains a model, or resumes the run in `workdir`.

    Args:
      config: a configuration; or fields of configs/finetune.py by name, such as `{"init": "Qwen/Qwen3-Embedding-0.6B", "data.folder":
        "DATA", "epochs": 1}`; or the name of a file, such as "configs/stage2.py:size=0.6b".
      workdir: folder of checkpoints and metrics, local or `gs://`.
      objective: a loss of your own in place of the configuration's: a pure function `objective(embeddings, samples, teacher)` that returns
        `(loss, metrics)`, of the whole batch at once (B samples, N negatives, width D):

        * `embeddings.query` float32 `[B, D]`, `embeddings.passage` `[B, D]`, `embeddings.negatives` `[B, N, D]`, raw;
        * `samples.sample_mask` `[B]`, `samples.negative_mask` `[B, N]`: 1 for what exists and 0 for padding, whose
          embeddings are ones; `samples.passage_ids` `[B]` and `samples.negative_ids` `[B, N]`: equal ids mean equal texts;
        * `teacher`: the teacher's embeddings in the same form, or None;
        * `loss`, a scalar to minimise, and `metrics` by name, made by `f2llm_jax.objectives.mean_of(values, mask)`.

        `functools.partial(f2llm_jax.objectives.total, objective=...)` is the package's own.
      callbacks: functions `callback(step, values)` that take every line of metrics as it is written.

    Returns:
      The record of the run: `record.values("loss")` maps steps to values, by any name in `metrics.jsonl`. Metrics of an objective of your
      own are there by their names for training batches, and as `validation/NAME` for held-out rows; its loss on these is
      `validation/objective`.

    Raises:
      UserError: configuration, data and model do not fit together, or the run diverged.
      Preempted: SIGTERM came; the state is saved, and the same call resumes.
    """
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise UserError(f"callbacks={callbacks!r} must be a list of functions, such as callbacks=[print]")
    if not isinstance(config, ml_collections.ConfigDict | Mapping | str):
        raise UserError(f"config={config!r} must be a configuration, a dictionary of its fields or the name of a file")
    logging.getLogger("absl").setLevel(logging.WARNING)
    if isinstance(config, str):
        config = configuration.load(config)
    elif not isinstance(config, ml_collections.ConfigDict):
        config = configuration.load("configs/finetune.py", [(field, str(value)) for field, value in config.items()])
    run(config, os.fspath(workdir), own=objective, callbacks=callbacks)
    return read_record(os.fspath(workdir))


def release(
    model: str | os.PathLike[str], out: str | os.PathLike[str], *, dtype: str = "float32", dim: int | None = None, overwrite: bool = False
) -> None:
    """Writes a model as a folder that sentence-transformers, transformers, text-embeddings-inference, vLLM and llama.cpp read.

    Args:
      model: workdir of a run (its last checkpoint), one of its checkpoints, or a Hugging Face folder.
      out: folder to write; complete or absent.
      dtype: of the weights: "float32", "bfloat16" or "float16".
      dim: width that sentence-transformers gives; None for all.
      overwrite: replace an older release at `out`.

    Raises:
      UserError: there is no such model, it was not trained for the width, or `out` may not be written.
    """
    check_apart(os.fspath(out), {f"model {model}": os.fspath(model)})
    hf_folder.check_out(os.fspath(out), overwrite)
    hf_folder.export(find_model(str(model)), os.fspath(out), hf_folder.ReleaseForm(dtype=dtype, truncate_dim=dim), overwrite=overwrite)
