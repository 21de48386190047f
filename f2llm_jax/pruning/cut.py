"""The pruned model: the larger one's weights, cut as they are read.

Nothing is rescaled. A norm of the pruned model takes the mean square over the channels that stay and keeps their scales, so it
computes what the larger model would if the removed channels were zero and its mean were over those that stay. Its outputs are
thus larger than the larger model's own by `sqrt(mean of squares over all / mean over those that stay)`, token by token: less than
1 where the strongest channels stay. With nothing removed every weight is the same to the bit.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np

from f2llm_jax.model.sizes import DecoderConfig
from f2llm_jax.pruning.choice import KeptParts
from f2llm_jax.weights.hf_mapping import Entry
from f2llm_jax.weights.models import ModelSource
from f2llm_jax.weights.parameters import Parameters, parameter_dims


def cut(source: ModelSource, target: DecoderConfig, choice: KeptParts) -> ModelSource:
    """The model of shape `target` that `choice` leaves of `source`; reads nothing yet.

    Of the widths that the model was trained for stay those whose channels all stay in place: the first d of the pruned model
    are then still the first d of the larger one.
    """

    @contextlib.contextmanager
    def open_params() -> Iterator[Parameters]:
        with source.open_params() as parameters:
            yield _Cut(parameters, source.config, choice)

    dims = tuple(d for d in source.embedding.matryoshka_dims if np.array_equal(choice.hidden[:d], np.arange(d)))
    return ModelSource(
        name=f"{target.hidden_size} x {target.intermediate_size} x {target.num_hidden_layers} model pruned from {source.short_name}",
        config=target,
        open_params=open_params,
        tokenizer=source.tokenizer,
        embedding=dataclasses.replace(source.embedding, matryoshka_dims=dims, depths=(), truncate_dim=None),
    )


class _Cut:
    """Parameters of the pruned model, for `parameters.blocks`."""

    def __init__(self, parameters: Parameters, config: DecoderConfig, choice: KeptParts):
        self._parameters, self._config, self._choice = parameters, config, choice
        self._dims = parameter_dims(config)

    def unit(self, entry: Entry) -> int:
        return self._parameters.unit(entry)

    def read(self, entry: Entry, start: int, stop: int) -> np.ndarray:
        if entry.stacked:
            layers = self._choice.layers[start:stop]
            whole = self._parameters.read(entry, layers[0], layers[-1] + 1)
            return np.stack([self._kept(whole[layer - layers[0]], entry, n) for n, layer in enumerate(layers, start)])
        if self._dims[entry] == "D":  # the final norm: its first axis is the one that is cut
            return self._parameters.read(entry, 0, self._config.hidden_size)[self._choice.hidden[start:stop]]
        return self._kept(self._parameters.read(entry, start, stop), entry, 0)

    def _kept(self, array: np.ndarray, entry: Entry, layer: int) -> np.ndarray:
        """One layer's array, or rows of the embedding table, without what goes; `layer` counts the layers that stay."""
        for axis, letter in enumerate(self._dims[entry]):
            if letter in "DF":
                array = np.take(array, self._choice.hidden if letter == "D" else self._choice.ffn[layer], axis=axis)
        return array
