"""Models of this project as teachers."""

import functools
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from f2llm_jax.data.records import Dataset
from f2llm_jax.data.teacher_cache import TeacherCacheError
from f2llm_jax.inference.encode import TextEncoder, load_encoder
from f2llm_jax.teachers.texts import Prompts, Role, StoredText
from f2llm_jax.text import TokenIds
from f2llm_jax.weights.digest import model_digest
from f2llm_jax.weights.models import LoadableModel


class OwnTeacher:
    """Reads the student's token ids, its instructions included."""

    reads: Final = "ids"
    prompts = Prompts()

    def __init__(
        self,
        origin: LoadableModel,
        dataset: Dataset,
        max_length: int,
        *,
        compute: str = "float32",
        mesh: jax.sharding.Mesh | None = None,
        chunk_tokens: int | None = None,
    ):
        """Reads all weights once; they are loaded when the first text is encoded.

        Args:
          origin: the teacher.
          dataset: whose texts it will read.
          max_length: tokens of the longest.
          compute: dtype that the teacher computes in.
          mesh, chunk_tokens: of the encoder.

        Raises:
          TeacherCacheError: the dataset was prepared with another tokenizer.
        """
        self._tokenizer = origin.matching_tokenizer()
        if self._tokenizer.fingerprint != dataset.tokenizer_fingerprint:
            raise TeacherCacheError(
                f"{dataset.folder} was prepared with another tokenizer than {origin.name}'s; prepare it with that one, or pass "
                "--retokenize, and the teacher reads the texts by its own tokenizer"
            )
        self.name, self.digest, self.compute, self.width = origin.name, model_digest(origin), compute, origin.config.hidden_size
        self._origin, self._max_length, self._mesh, self._chunk_tokens = origin, max_length, mesh, chunk_tokens

    @functools.cached_property
    def _encoder(self) -> TextEncoder:
        origin, mesh = self._origin, self._mesh
        return TextEncoder(
            origin.config,
            origin.load(mesh),
            self._tokenizer,
            self._max_length,
            dtype=jnp.dtype(self.compute),
            mesh=mesh,
            chunk_tokens=self._chunk_tokens,
        )

    def encode(self, ids: list[TokenIds], role: Role) -> Float[np.ndarray, "S W"]:
        del role
        return self._encoder.encode_ids(ids)


class OwnTextModel:
    """Reads texts by its own tokenizer, behind its own prompts."""

    def __init__(
        self, origin: LoadableModel, *, compute: str = "float32", mesh: jax.sharding.Mesh | None = None, chunk_tokens: int | None = None
    ):
        """Args as for `OwnTeacher`."""
        self.name, self.digest, self.compute, self.width = origin.name, model_digest(origin), compute, origin.width
        self._origin, self._mesh, self._chunk_tokens = origin, mesh, chunk_tokens

    @functools.cached_property
    def _encoder(self) -> TextEncoder:
        return load_encoder(self._origin, dtype=jnp.dtype(self.compute), mesh=self._mesh, chunk_tokens=self._chunk_tokens)

    def encode(self, texts: list[StoredText]) -> Float[np.ndarray, "S W"]:
        prompts = self._origin.embedding.prompts
        return self._encoder.encode([(prompts.get(text.role, "") if text.prompt is None else text.prompt) + text.text for text in texts])
