"""Which channels and layers stay: a pure function of what was measured.

Layers first, then channels by what the layers that stay read. One set of hidden channels serves the whole model, since every
layer adds to one stream; each MLP has a set of its own, all of one size.

Layers and MLP channels keep their order. Hidden channels keep their place where the smaller model has it, and the others fill the
gaps: distillation compares a student with its teacher's first components, place by place, and matryoshka training has made the
first ones the important ones.
"""

import dataclasses
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from f2llm_jax.model.sizes import DecoderConfig

if TYPE_CHECKING:
    from f2llm_jax.pruning.calibration import Activations

ChannelsBy = Literal["l2", "mean-abs", "first"]
LayersBy = Literal["first", "influence"]
CHANNELS_BY: tuple[ChannelsBy, ...] = get_args(ChannelsBy)
LAYERS_BY: tuple[LayersBy, ...] = get_args(LayersBy)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """How to choose.

    Attributes:
      hidden_by: of hidden channels those with the largest sum, over all norms of the layers that stay and the final norm after the
        last of them, of a measure (see `calibration.MEASURES`); or the "first", which matryoshka training makes the important ones.
      ffn_by: of each MLP's channels those with the largest measure, or the first.
      layers_by: the "first" n (published), or the n with the largest block "influence" on the whole model's own stream.
    """

    hidden_by: ChannelsBy = "l2"
    ffn_by: ChannelsBy = "l2"
    layers_by: LayersBy = "first"


@dataclasses.dataclass(frozen=True)
class KeptParts:
    """What stays, and the scores that decided.

    Attributes:
      layers: int64 `[L']`, ascending.
      hidden: int64 `[D']`, in the order of the smaller model's channels.
      ffn: int64 `[L', F']`, a row for each layer that stays, ascending.
      hidden_scores: float64 `[D]`.
      ffn_scores: float64 `[L', F]`.
      influence: float64 `[L]`.
    """

    layers: np.ndarray
    hidden: np.ndarray
    ffn: np.ndarray
    hidden_scores: np.ndarray
    ffn_scores: np.ndarray
    influence: np.ndarray


def choose_kept(activations: "Activations", target: DecoderConfig, method: Method) -> KeptParts:
    """What stays of the model that was measured; equal scores go to the lower index."""
    influence = activations.influence
    layers = _largest(_rank(len(influence)) if method.layers_by == "first" else influence, target.num_hidden_layers)
    hidden_scores, ffn_scores = _hidden_scores(activations, layers, method.hidden_by), _ffn_scores(activations, layers, method.ffn_by)
    ffn = np.stack([_largest(scores, target.intermediate_size) for scores in ffn_scores])
    hidden = _in_place(_largest(hidden_scores, target.hidden_size))
    return KeptParts(layers, hidden, ffn, hidden_scores, ffn_scores, influence)


def _hidden_scores(activations: "Activations", layers: np.ndarray, by: ChannelsBy) -> np.ndarray:
    if by == "first":
        return _rank(next(iter(activations.final.values())).shape[1])
    return activations.stream[by][layers].sum(axis=(0, 1)) + activations.final[by][layers[-1]]


def _ffn_scores(activations: "Activations", layers: np.ndarray, by: ChannelsBy) -> np.ndarray:
    if by == "first":
        return np.tile(_rank(next(iter(activations.ffn.values())).shape[1]), (len(layers), 1))
    return activations.ffn[by][layers]


def _rank(count: int) -> np.ndarray:
    """Scores by which the first are the largest: count, count - 1, ..., 1."""
    return np.arange(count, 0, -1, dtype=np.float64)


def _largest(scores: np.ndarray, count: int) -> np.ndarray:
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def _in_place(chosen: np.ndarray) -> np.ndarray:
    """`chosen`, ascending, reordered so that each channel below their number keeps its own index; the others fill the gaps."""
    count = len(chosen)
    placed = np.arange(count)
    placed[np.setdiff1d(placed, chosen)] = chosen[chosen >= count]
    return placed
