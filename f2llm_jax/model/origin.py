"""One door to a model, wherever it stands: a Hugging Face folder, a Hub id, a workdir or one of its checkpoints."""

import dataclasses
from collections.abc import Callable

import jax
from etils import epath
from flax import nnx

from f2llm_jax.model import hf_import, stored
from f2llm_jax.model.sizes import DecoderConfig
from f2llm_jax.text import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class ModelOrigin:
    """A model that has been found but whose weights have not been read.

    Attributes:
      name: as the user gave it.
      config: the decoder's shape.
      load: reads the parameters, fp32, sharded over the mesh if one is given.
      tokenizer: the one it was trained with, if it stands beside the weights.
      matryoshka_dims: widths it was trained for, ascending; empty if unknown.
      max_length: longest text in tokens it was trained on; None if unknown.
    """

    name: str
    config: DecoderConfig
    load: Callable[[jax.sharding.Mesh | None], nnx.State]
    tokenizer: Tokenizer | None
    matryoshka_dims: tuple[int, ...] = ()
    max_length: int | None = None


def find_model(name: str) -> ModelOrigin:
    """The model that `name` means: a checkpoint if it looks like one, else a Hugging Face folder or Hub id.

    Raises:
      CheckpointError, ModelFolderError: there is none, or it is not one this project can read.
    """
    path = epath.Path(name)
    if path.name.isdigit() or (path / "checkpoints").exists():
        return _checkpoint(name, path)
    folder = hf_import.resolve(name)
    config = hf_import.read_config(folder)
    tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").exists() else None
    return ModelOrigin(name, config, lambda mesh: hf_import.load_params(folder, config, mesh), tokenizer)


def _checkpoint(name: str, path: epath.Path) -> ModelOrigin:
    saved = stored.find_checkpoint(path)
    return ModelOrigin(
        name,
        saved.config,
        saved.load,
        load_tokenizer(saved.run_folder / "tokenizer"),
        matryoshka_dims=tuple(saved.metadata["matryoshka_dims"]),
        max_length=saved.metadata["max_length"],
    )
