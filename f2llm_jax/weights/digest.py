"""What a model is, in one string: the key of everything that is kept of its vectors."""

import dataclasses
import hashlib
import json

import numpy as np

from f2llm_jax.weights.models import ModelSource
from f2llm_jax.weights.parameters import blocks, parameter_shapes


def model_digest(source: ModelSource) -> str:
    """Digest of everything that turns a text into a vector: equal for a checkpoint and its float32 release."""
    settings = {**dataclasses.asdict(source.config), "tokenizer": source.matching_tokenizer().fingerprint}
    if source.embedding.truncate_dim:
        settings["truncate_dim"] = source.embedding.truncate_dim
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    with source.open_params() as parameters:
        for entry, shape in parameter_shapes(source.config).items():
            for start, stop in blocks(parameters, entry, shape):
                digest.update(np.ascontiguousarray(parameters.read(entry, start, stop), np.float32).data)
    return digest.hexdigest()
