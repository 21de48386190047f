"""Finding a model, wherever it lies: a Hugging Face folder (local or `gs://`), a Hub id, a workdir or one of its checkpoints."""

import dataclasses
from collections.abc import Callable

import jax
from etils import epath
from flax import nnx

from f2llm_jax.errors import UserError
from f2llm_jax.hf_settings import Note
from f2llm_jax.model.sizes import DecoderConfig
from f2llm_jax.storage.files import absolute
from f2llm_jax.text import Tokenizer, load_tokenizer
from f2llm_jax.weights import checkpoint_reader, hf_config, hf_fetch, hf_reader
from f2llm_jax.weights.embedding_config import EmbeddingConfig
from f2llm_jax.weights.factors import stored_rank
from f2llm_jax.weights.parameters import OpenParameters
from f2llm_jax.weights.truncation import Truncation

WHOLE = Truncation()
DEFAULT_TEXT_LIMIT = 8192  # of a checkpoint that knows none: mteb's `codefuse_models.py`, for every F2LLM model


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that can be written out: its weights come block by block and are never all in memory."""

    name: str  # as the user gave it
    config: DecoderConfig
    open_params: OpenParameters
    tokenizer: Tokenizer | None  # None where none lies next to the weights
    embedding: EmbeddingConfig = dataclasses.field(default_factory=EmbeddingConfig)
    run_folder: epath.Path | None = None  # workdir of the run that made it, with what the run recorded
    step: int | None = None  # updates it has had in that run
    notes: tuple[Note, ...] = ()  # of a Hugging Face folder: what becomes of each of its settings

    @property
    def short_name(self) -> str:
        """For a model card: `checkpoints/320` or `owner/model`, not where it lies on this machine."""
        return "/".join(self.name.rstrip("/").split("/")[-2:])

    @property
    def text_limit(self) -> int:
        """Tokens, the end token included, at which texts are cut: by this project's encoder and by every reader of its releases."""
        return min(self.embedding.max_length or DEFAULT_TEXT_LIMIT, self.config.max_position_embeddings)

    @property
    def width(self) -> int:
        """Dimensions of the embeddings that it serves."""
        return self.embedding.truncate_dim or self.config.hidden_size

    def matching_tokenizer(self) -> Tokenizer:
        """The tokenizer, known to be there and to fit the embedding table.

        Raises:
          UserError: it is not, or does not.
        """
        if self.tokenizer is None:
            raise UserError(f"{self.name} has no tokenizer.json; copy the one that it was trained with into it")
        if self.tokenizer.vocab_size > self.config.vocab_size:
            raise UserError(
                f"{self.name}: the tokenizer makes ids up to {self.tokenizer.vocab_size - 1}, but there are only {self.config.vocab_size} "
                "embedding rows; use the tokenizer that it was trained with"
            )
        return self.tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadableModel(ModelSource):
    """A model that has been found but whose weights have not been read."""

    load: Callable[[jax.sharding.Mesh | None], nnx.State]  # reads the parameters, fp32, sharded over the mesh if one is given


def find_model(name: str, truncation: Truncation = WHOLE, shared: epath.PathLike | None = None) -> LoadableModel:
    """The model that `name` means, as it is served: a checkpoint if it looks like one, else a Hugging Face folder or Hub id.

    Args:
      name: a local or `gs://` path, or a Hub id.
      truncation: layers and table rank to keep, and whether to keep the table's factors.
      shared: of several processes, a folder that all see; a Hub model is then downloaded once.

    Raises:
      UserError: there is none, it is not one this project can read, or it was not trained to be truncated so.
    """
    path = absolute(name)
    if (path.name.isdigit() and not (path / "config.json").exists()) or (path / "checkpoints").exists():
        return _checkpoint(name, path, truncation)
    folder = hf_fetch.local_folder(name, shared)
    settings = hf_config.read_settings(folder)
    config = settings.decoder
    if truncation.factored or truncation.table_rank:
        config = dataclasses.replace(config, table_rank=stored_rank(folder))
    tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").exists() else None
    truncation.check(name, config, (config.num_hidden_layers,), (config.table_rank,))
    return LoadableModel(
        name=name,
        config=truncation.config(config),
        open_params=truncation.open(config, lambda: hf_reader.open_params(folder, config)),
        load=lambda mesh: truncation.state(config, hf_reader.load_params(folder, config, mesh)),
        tokenizer=tokenizer,
        embedding=settings.embedding,
        notes=settings.notes + (tokenizer.notes if tokenizer else ()),
    )


def _checkpoint(name: str, path: epath.Path, truncation: Truncation) -> LoadableModel:
    saved = checkpoint_reader.find_checkpoint(path)
    truncation.check(name, saved.config, saved.depths, saved.embedding.table_ranks)
    config = truncation.config(saved.config)
    depths = tuple(depth for depth in saved.depths if depth <= config.num_hidden_layers)
    return LoadableModel(
        name=name,
        config=config,
        open_params=truncation.open(saved.config, saved.open_params),
        load=lambda mesh: truncation.state(saved.config, saved.load(mesh)),
        tokenizer=_tokenizer_of(saved),
        embedding=dataclasses.replace(saved.embedding, depths=depths),
        run_folder=saved.run_folder,
        step=saved.step,
    )


def _tokenizer_of(saved: checkpoint_reader.SavedModel) -> Tokenizer:
    """The tokenizer in the workdir, known to be the one that the checkpoint was trained with."""
    folder = saved.run_folder / "tokenizer"
    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != saved.embedding.tokenizer_fingerprint:
        raise UserError(f"{folder} is not the tokenizer that {saved.run_folder} was trained with; restore it")
    return tokenizer
