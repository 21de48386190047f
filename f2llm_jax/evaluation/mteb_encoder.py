"""This project's encoder as mteb 2 wants one, and how mteb's leaderboard describes the model."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from f2llm_jax.cli.progress import Progress
from f2llm_jax.errors import UserError
from f2llm_jax.evaluation import instructions
from f2llm_jax.inference.encode import truncate_and_normalize
from f2llm_jax.inference.vector_cache import CachedEncoder
from f2llm_jax.model.decoder import count_parameters
from f2llm_jax.text import leading_prompt
from f2llm_jax.weights.models import ModelSource

MEGABYTE = 2**20


class MtebEncoder:
    """mteb's `EncoderProtocol` at one width. Vectors are cut first and then normalised; similarity is the cosine."""

    def __init__(self, encoder: CachedEncoder, table: Mapping[str, str], meta, dim: int):
        """Encodes nothing yet.

        Args:
          encoder: of the model.
          table: of instructions (`evaluation.instructions`).
          meta: mteb's `ModelMeta`.
          dim: components of each vector.
        """
        self.mteb_model_meta = meta
        self._encoder, self._table, self._dim = encoder, table, dim

    def encode(self, inputs, *, task_metadata, hf_split: str, hf_subset: str, prompt_type=None, **_: Any) -> np.ndarray:
        """Unit vectors, float32 `[S, dim]`, of the texts of a data loader."""
        texts = [text for batch in inputs for text in batch["text"]]
        template = self.mteb_model_meta.loader_kwargs["instruction_template"]
        prompt = instructions.prompt(self._table, task_metadata, prompt_type, template)
        label = " ".join((task_metadata.name, hf_subset, hf_split, prompt_type.value if prompt_type else "texts"))
        with Progress() as progress:
            return truncate_and_normalize(self._encoder.encode(texts, prompt, self._dim, progress.of(label, "texts")), self._dim)

    def similarity(self, embeddings1, embeddings2):
        """Cosines of all pairs."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1, embeddings2):
        """Cosines of corresponding rows."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What a result depends on besides model, width and task.

    Attributes:
      dtype: compute dtype.
      max_length: tokens at which texts are cut; None for the model's own limit.
      own: the user's instructions.
    """

    dtype: str = "float32"
    max_length: int | None = None
    own: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def experiment(self, dim: int | None) -> dict[str, Any] | None:
        """mteb's `experiment_kwargs`, which give other conditions a folder of their own; None for the model as released."""
        told = {"embed_dim": dim, "max_length": self.max_length, "dtype": None if self.dtype == "float32" else self.dtype}
        told["instructions"] = hashlib.sha256(json.dumps(self.own, sort_keys=True).encode()).hexdigest()[:8] if self.own else None
        return {key: value for key, value in told.items() if value is not None} or None


def model_meta(source: ModelSource, digest: str, name: str | None = None):
    """mteb's `ModelMeta`: what follows from the model, with the loader of the published family.

    What only its maker knows (release date, languages, licence of the data, training sets) is None.

    Args:
      source: the model.
      digest: of the model; its first digits are the revision until it has one on the Hub.
      name: `owner/name` on the leaderboard; made from the model's own if None.

    Raises:
      UserError: the model's own prompt has no place for the instruction of a task.
    """
    if (prompt := source.embedding.query_prompt) != leading_prompt(prompt):
        raise UserError(
            f"queries of {source.name} begin with {prompt!r}, where a task's instruction has no place; measure it with mteb's own "
            "SentenceTransformerEncoderWrapper, or leave the prompt out of its config_sentence_transformers.json"
        )
    from mteb.models import ModelMeta
    from mteb.models.instruct_wrapper import InstructSentenceTransformerModel
    from mteb.models.model_meta import ScoringFunction

    parameters, config = count_parameters(source.config), source.config
    return ModelMeta(
        loader=InstructSentenceTransformerModel,
        loader_kwargs={
            "instruction_template": source.embedding.instruction_template,
            "prompts_dict": instructions.published(),
            "apply_instruction_to_passages": False,
            "max_seq_length": source.text_limit,
        },
        name=name or _name(source),
        revision=digest[:16],
        release_date=None,
        languages=None,
        n_parameters=parameters,
        n_embedding_parameters=config.vocab_size * (config.table_rank or config.hidden_size) + config.table_rank * config.hidden_size,
        memory_usage_mb=round(4 * parameters / MEGABYTE),
        max_tokens=source.text_limit,
        embed_dim=sorted({*source.embedding.served_dims, source.width}) if source.embedding.served_dims else source.width,
        license="apache-2.0",
        open_weights=True,
        public_training_code=None,
        public_training_data=None,
        framework=["JAX", "Sentence Transformers", "PyTorch", "Transformers", "safetensors"],
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=True,
        training_datasets=None,
    )


def meta_code(meta) -> str:
    """The model's entry as a file for a pull request to mteb's `models/model_implementations`."""
    variable = re.sub(r"\W", "_", meta.name.split("/")[1])
    return "\n".join(
        [
            "from mteb.models import ModelMeta",
            "from mteb.models.instruct_wrapper import InstructSentenceTransformerModel",
            "from mteb.models.model_meta import ScoringFunction",
            "",
            f"{variable} = {meta.to_python()}",
            "",
        ]
    )


def _name(source: ModelSource) -> str:
    """A Hub id as it is; `local/` and the folder's name, or the run's and its step."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source.name) and not epath.Path(source.name).exists():
        return source.name
    last = source.name.rstrip("/").rsplit("/", 1)[-1] if source.run_folder is None else f"{source.run_folder.name}-{source.step}"
    return "local/" + re.sub(r"[^\w.-]", "-", last)
