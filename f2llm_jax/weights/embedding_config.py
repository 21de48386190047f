"""What a model was trained with and how its texts become vectors: the one statement of it, for checkpoints and for releases."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from f2llm_jax.errors import UserError
from f2llm_jax.text import DEFAULT_QUERY_INSTRUCTION, query_prompt, template_of

_NAME = re.compile(r"[\w./-]+")  # of a prompt; no text that ends with a space or a colon
DEFAULT_PROMPTS = {"query": query_prompt(DEFAULT_QUERY_INSTRUCTION), "document": ""}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """What a decoder's shape does not tell. What is unknown has the default."""

    matryoshka_dims: tuple[int, ...] = ()  # widths it was trained for, ascending
    depths: tuple[int, ...] = ()  # numbers of layers it was trained to serve with, ascending
    table_ranks: tuple[int, ...] = ()  # of the embedding table that it was trained to serve with, ascending
    max_length: int | None = None  # longest text in tokens, the end token included, that it was trained on or that its folder declares
    truncate_dim: int | None = None  # width that it serves for good; None for all
    prompts: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(DEFAULT_PROMPTS))  # before a text, by name
    tokenizer_fingerprint: str = ""  # `Tokenizer.fingerprint`

    def __post_init__(self) -> None:
        object.__setattr__(self, "matryoshka_dims", tuple(sorted(self.matryoshka_dims)))
        object.__setattr__(self, "depths", tuple(sorted(self.depths)))
        object.__setattr__(self, "table_ranks", tuple(sorted(self.table_ranks)))

    @property
    def query_prompt(self) -> str:
        """What a query begins with where its task names no instruction of its own."""
        return self.prompts.get("query", "")

    @property
    def instruction_template(self) -> str:
        """What an instruction of the user's is put into, `{instruction}` for its place: in the form of this model's own prompt."""
        return template_of(self.query_prompt)

    def resolve_prompt(self, prompt: str) -> str:
        """What goes before a text: the prompt of that name, else `prompt` as it is.

        Raises:
          UserError: `prompt` looks like a name and is none, which a slip would put before every text.
        """
        if prompt in self.prompts or not _NAME.fullmatch(prompt):
            return self.prompts.get(prompt, prompt)
        raise UserError(f"the model has no prompt {prompt!r}; it has {', '.join(self.prompts)}. A prompt of your own ends with a space")

    def to_metadata(self) -> dict[str, Any]:
        """As a checkpoint carries it, next to the decoder's shape, which tells the rank of the embedding table."""
        return dataclasses.asdict(self)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "EmbeddingConfig":
        """From a checkpoint's metadata; fields that an older checkpoint lacks have the default."""
        return cls(**{field.name: metadata[field.name] for field in dataclasses.fields(cls) if metadata.get(field.name) is not None})

    def to_config_json(self) -> dict[str, Any]:
        """The part of a release's config.json: vLLM and SGLang shorten embeddings only of a model that says it was trained for it."""
        dims = self.served_dims
        return {"is_matryoshka": True, "matryoshka_dimensions": list(dims)} if dims else {}

    def to_sentence_transformers(self) -> dict[str, Any]:
        """The part of a release's config_sentence_transformers.json."""
        return {"prompts": dict(self.prompts), "default_prompt_name": None, "similarity_fn_name": "cosine"}

    @property
    def served_dims(self) -> tuple[int, ...]:
        """The trained widths that are not beyond `truncate_dim`."""
        return tuple(dim for dim in self.matryoshka_dims if self.truncate_dim is None or dim <= self.truncate_dim)

    def truncated(self, name: str, width: int, dim: int) -> "EmbeddingConfig":
        """The same model serving `dim` of its `width` dimensions for good.

        Raises:
          UserError: the model `name` was not trained for `dim`.
        """
        known = self.served_dims or (self.truncate_dim or width,)
        if dim not in known:
            raise UserError(f"{name} was not trained for {dim} dimensions, only for {', '.join(map(str, known))}")
        return dataclasses.replace(self, truncate_dim=dim if dim < width else None)
