"""A model as a workdir: its weights in one checkpoint of step 0 and its tokenizer, in the layout that training leaves.

Orbax saves only arrays that stand in memory whole. So it saves a stand-in of the same tree with one number a parameter, which
gives the files that describe a checkpoint, and the arrays are written block by block next to copies of those.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath
from orbax.checkpoint import v1 as ocp

from f2llm_jax.cli.progress import Progress
from f2llm_jax.model.sizes import DecoderConfig
from f2llm_jax.storage.files import FileError, seal, workdir_path
from f2llm_jax.storage.folders import new_folder
from f2llm_jax.weights import checkpoint_reader, chunks
from f2llm_jax.weights.checkpoint_reader import array_spec
from f2llm_jax.weights.models import ModelSource
from f2llm_jax.weights.parameters import Parameters, Shape, blocks, parameter_shapes

STEP = "checkpoints/0"
COMMITTED = "commit_success.txt"  # what Orbax looks for on an object store
DESCRIPTION = ("params/_METADATA", f"params/{COMMITTED}", "_CHECKPOINT_METADATA", COMMITTED)  # in the order of writing
COMPRESSION = 1  # zstd; bfloat16 weights, which are half zeros in float32, shrink to half at any level


def write_workdir(source: ModelSource, out: epath.PathLike, *, overwrite: bool) -> None:
    """Writes `OUT/checkpoints/0` and `OUT/tokenizer`. There is no optimizer state: a run starts from it, none resumes it.

    Args:
      source: the model.
      out: folder to make; complete or absent.
      overwrite: replace an older workdir at `out`, checkpoints and all.

    Raises:
      UserError: `out` may not be written, or the model has no tokenizer or one that does not fit it.
    """
    source.matching_tokenizer()
    with new_folder(workdir_path(out), f"{STEP}/{COMMITTED}", overwrite) as folder:
        fill(folder, source)


def fill(folder: epath.Path, source: ModelSource) -> None:
    """Writes the same into an empty folder that the caller keeps complete or absent.

    Raises:
      UserError: as `write_workdir`.
    """
    tokenizer = source.matching_tokenizer()
    embedding = dataclasses.replace(source.embedding, tokenizer_fingerprint=tokenizer.fingerprint)
    with _description(source.config, checkpoint_reader.metadata(source.config, embedding)) as described:
        tokenizer.save(folder / "tokenizer")
        with source.open_params() as parameters:
            _write_arrays(folder / STEP / "params", source.config, parameters)
        for name in DESCRIPTION:
            (folder / STEP / name).write_bytes((described / name).read_bytes())


@contextlib.contextmanager
def _description(config: DecoderConfig, metadata: dict[str, Any]) -> Iterator[epath.Path]:
    """A checkpoint of one number a parameter."""
    stand_in = {"/".join(entry.path): np.zeros((1,) * len(shape), np.float32) for entry, shape in parameter_shapes(config).items()}
    context = ocp.Context()
    context.array.saving.enable_write_sharding_file = False  # both would state the stand-in's shapes
    context.array.saving.array_metadata_store = None
    with tempfile.TemporaryDirectory() as folder:
        with ocp.training.Checkpointer(epath.Path(folder) / "checkpoints", context=context) as checkpoints:
            checkpoints.save_checkpointables(0, {"params": stand_in}, custom_metadata=seal(metadata))
        yield epath.Path(folder) / STEP


def _write_arrays(folder: epath.Path, config: DecoderConfig, parameters: Parameters) -> None:
    shapes = parameter_shapes(config)
    total = sum(4 * int(np.prod(shape)) for shape in shapes.values())
    folder.mkdir(parents=True)
    with Progress() as progress:
        report = progress.counter("importing", "B", total)
        for entry, shape in shapes.items():
            rows = chunks.chunk_rows(shape, shape, stacked=entry.stacked)
            array = ts.open(array_spec(folder, entry) | {"metadata": _layout(shape, rows)}, create=True).result()
            for start, stop in blocks(parameters, entry, shape, rows):
                block = parameters.read(entry, start, stop)
                if not np.isfinite(block).all():
                    raise FileError(f"{'/'.join(entry.path)}: a weight is not finite; take a model whose weights are, or repair it")
                array[start:stop].write(block).result()
                report(block.nbytes)


def _layout(shape: Shape, rows: int) -> dict[str, Any]:
    """zarr 3 metadata: chunks of so many rows, which a later release can read one at a time."""
    return {
        "shape": list(shape),
        "data_type": "float32",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [rows, *shape[1:]]}},
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "zstd", "configuration": {"level": COMPRESSION}},
            {"name": "crc32c"},  # compared by tensorstore whenever a chunk is read
        ],
    }
