"""One door to a model, wherever it stands: a Hugging Face folder, a Hub id, a workdir or one of its checkpoints."""

import dataclasses
from collections.abc import Callable

import jax
from etils import epath
from flax import nnx

from f2llm_jax.files import absolute
from f2llm_jax.model.sizes import DecoderConfig
from f2llm_jax.text import Tokenizer, TokenizerError, load_tokenizer
from f2llm_jax.weights import checkpoint_reader, hf_reader
from f2llm_jax.weights.parameters import OpenParameters
from f2llm_jax.weights.truncation import Truncation

WHOLE = Truncation()
DEFAULT_TEXT_LIMIT = 8192  # where training left no word of it: mteb's `codefuse_models.py`, for every F2LLM model


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that can be written out: its weights come block by block and are never all in memory.

    Attributes:
      name: as the user gave it.
      config: the decoder's shape.
      open_params: opens the weights.
      tokenizer: the one it was trained with, if it stands beside the weights.
      matryoshka_dims: widths it was trained for, ascending; empty if unknown.
      max_length: longest text in tokens it was trained on; None if unknown.
      run_folder: the workdir of the run that made it, which holds what the run recorded; None if unknown.
      step: the updates it has had in that run; None if unknown.
      depths: numbers of layers it was trained to serve with, ascending; empty if unknown.
    """

    name: str
    config: DecoderConfig
    open_params: OpenParameters
    tokenizer: Tokenizer | None
    matryoshka_dims: tuple[int, ...] = ()
    max_length: int | None = None
    run_folder: epath.Path | None = None
    step: int | None = None
    depths: tuple[int, ...] = ()

    @property
    def short_name(self) -> str:
        """For a model card: `checkpoints/320` or `owner/model`, not where it stood on this machine."""
        return "/".join(self.name.rstrip("/").split("/")[-2:])

    @property
    def text_limit(self) -> int:
        """Tokens, EOS included, at which texts are cut: by this project's encoder and by every reader of its releases."""
        return min(self.max_length or DEFAULT_TEXT_LIMIT, self.config.max_position_embeddings)

    def matching_tokenizer(self) -> Tokenizer:
        """The tokenizer, known to be there and to fit the embedding table.

        Raises:
          TokenizerError: it is not, or does not.
        """
        if self.tokenizer is None:
            raise TokenizerError(f"{self.name} has no tokenizer.json; copy the one that it was trained with into it")
        if self.tokenizer.vocab_size > self.config.vocab_size:
            raise TokenizerError(
                f"{self.name}: the tokenizer makes {self.tokenizer.vocab_size} ids, but there are only {self.config.vocab_size} "
                "embedding rows; use the tokenizer that it was trained with"
            )
        return self.tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadableModel(ModelSource):
    """A model that has been found but whose weights have not been read.

    Attributes:
      load: reads the parameters, fp32, sharded over the mesh if one is given.
    """

    load: Callable[[jax.sharding.Mesh | None], nnx.State]


def find_model(name: str, cut: Truncation = WHOLE) -> LoadableModel:
    """The model that `name` means, as it is served: a checkpoint if it looks like one, else a Hugging Face folder or Hub id.

    Raises:
      CheckpointError, ModelFolderError: there is none, or it is not one this project can read.
      TruncationError: it was not trained to be cut so.
    """
    path = absolute(name)
    if (path.name.isdigit() and not (path / "config.json").exists()) or (path / "checkpoints").exists():
        return _checkpoint(name, path, cut)
    folder = hf_reader.resolve(name)
    config = hf_reader.read_config(folder)
    tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").exists() else None
    dims, max_length = hf_reader.read_training_facts(folder)
    cut.check(name, config, (config.num_hidden_layers,))
    return LoadableModel(
        name=name,
        config=config,
        open_params=lambda: hf_reader.open_params(folder, config),
        load=lambda mesh: hf_reader.load_params(folder, config, mesh),
        tokenizer=tokenizer,
        matryoshka_dims=dims,
        max_length=max_length,
    )


def _checkpoint(name: str, path: epath.Path, cut: Truncation) -> LoadableModel:
    saved = checkpoint_reader.find_checkpoint(path)
    cut.check(name, saved.config, saved.depths)
    return LoadableModel(
        name=name,
        config=cut.config(saved.config),
        open_params=cut.open(saved.config, saved.open_params),
        load=lambda mesh: cut.state(saved.config, saved.load(mesh)),
        tokenizer=load_tokenizer(saved.run_folder / "tokenizer"),
        matryoshka_dims=tuple(saved.metadata["matryoshka_dims"]),
        max_length=saved.metadata["max_length"],
        run_folder=saved.run_folder,
        step=saved.step,
        depths=tuple(depth for depth in saved.depths if depth <= cut.config(saved.config).num_hidden_layers),
    )
