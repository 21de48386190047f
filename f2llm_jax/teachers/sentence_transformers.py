"""Models that sentence-transformers loads, as teachers."""

import hashlib
import json

import numpy as np
from jaxtyping import Float

from f2llm_jax.errors import UserError
from f2llm_jax.teachers.texts import StoredText

BATCH = 64  # texts at once; they are sorted by length


class SentenceTransformersModel:
    """A folder or Hub id of sentence-transformers. It truncates texts at its own limit, `longest` tokens of its own."""

    def __init__(self, name: str, compute: str = "float32"):
        """Loads the model, to a GPU if there is one.

        Raises:
          UserError: there is none at `name`, or it cannot be loaded.
        """
        import sentence_transformers
        import torch

        try:
            self._model = sentence_transformers.SentenceTransformer(name, model_kwargs={"dtype": getattr(torch, compute)})
        except (OSError, ValueError, KeyError) as error:  # what transformers, the Hub's client and safetensors raise
            told = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"--sentence-transformers {name}: sentence-transformers cannot load it ({told})") from error
        self.name, self.compute, self.digest = name, compute, self._digest()
        self.longest = self._model.max_seq_length

    @property
    def width(self) -> int:
        return int(self._model.get_embedding_dimension())

    def encode(self, texts: list[StoredText]) -> Float[np.ndarray, "S W"]:
        vectors = np.empty((len(texts), self.width), np.float32)
        prompts = [text.prompt for text in texts]
        for prompt in dict.fromkeys(prompts):
            mine = [i for i, other in enumerate(prompts) if other == prompt]
            encode = self._model.encode_query if texts[mine[0]].role == "query" else self._model.encode_document
            vectors[mine] = encode([texts[i].text for i in mine], prompt=prompt, batch_size=BATCH, show_progress_bar=False)
        return vectors

    def _digest(self) -> str:
        """Of weights, modules, tokenizer and prompts, wherever they came from."""
        model = self._model
        settings = {"modules": repr(model), "prompts": model.prompts, "longest": model.max_seq_length}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        digest.update(json.dumps(sorted(model.tokenizer.get_vocab().items())).encode())
        for name, weight in sorted(model.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()
