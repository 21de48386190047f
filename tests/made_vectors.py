"""A model for tests that needs no weights: every text has a random vector of its own, always the same."""

import numpy as np

from f2llm_jax.errors import UserError
from f2llm_jax.teachers.fill import fill_cache
from f2llm_jax.teachers.texts import Prompts, TextDecoder, TextTeacher


def vector(text, width=6):
    return np.random.default_rng(list(text.encode())).normal(size=width).astype(np.float32)


class Model:
    """Answers `calls` times, then is gone."""

    digest, compute = "0", ""

    def __init__(self, width=6, sign=1, calls=10**9):
        self.name, self.width, self.sign, self.calls = f"made of {width}", width, sign, calls

    def encode(self, texts):
        self.calls -= 1
        if self.calls < 0:
            raise UserError("gone")
        return self.sign * np.stack([vector(text.read, self.width) for text in texts])


def fill(model, dataset, out, max_length):
    """The cache of a model at `out`."""
    teacher = TextTeacher(model, TextDecoder(dataset.tokenizer().backend, max_length), Prompts())
    return fill_cache(teacher, dataset, out, dims=None, max_length=max_length, dtype="float16")
