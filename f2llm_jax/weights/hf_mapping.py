"""The Hugging Face weight table, read both ways.

A Hugging Face linear layer stores `[out, in]`; ours stores the model's width first, `DHE` and the like, whichever side it is on. `TABLE`
says for each of our parameters what the other side calls it and how the layouts relate: import reads it left to right, export
right to left, so the two cannot disagree.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter of ours and its Hugging Face name.

    Attributes:
      path: where it is in the decoder's state; under "layers" ours holds all layers on a leading axis L.
      name: the `Qwen3Model` tensor name, `{i}` for the layer, without the `model.` prefix of `Qwen3ForCausalLM`.
      order: our (one layer's) axes in the order of theirs, e.g. (1, 2, 0) if ours is DHE and theirs `[H*E, D]`.
      merged: how many of the reordered axes each of their axes holds, e.g. (2, 1) for `[H*E, D]`.
    """

    path: tuple[str, ...]
    name: str
    order: tuple[int, ...]
    merged: tuple[int, ...]

    @property
    def stacked(self) -> bool:
        """Whether ours holds all layers on a leading axis."""
        return self.path[0] == "layers"

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of their tensor for our (one layer's) shape."""
        return tuple(math.prod(shape[a] for a in group) for group in self._groups())

    def to_hf(self, ours: np.ndarray) -> np.ndarray:
        """Our (one layer's) array in their layout, C-contiguous."""
        return np.ascontiguousarray(np.transpose(ours, self.order)).reshape(self.hf_shape(ours.shape))

    def from_hf(self, theirs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Their array in our (one layer's) layout and the given shape."""
        reordered = theirs.reshape([shape[a] for a in self.order])
        return np.transpose(reordered, np.argsort(self.order))

    def hf_index(self, index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
        """The part of their tensor that holds `ours[index]`: only the first axis of a merged group may be cut."""
        parts = []
        for first, *rest in self._groups():
            inner = math.prod(shape[a] for a in rest)
            if any(index[a].indices(shape[a])[:2] != (0, shape[a]) for a in rest):
                raise ValueError(f"{self.name}: a shard cuts an axis that is stored inside another; use a spec that splits heads whole")
            start, stop, _ = index[first].indices(shape[first])
            parts.append(slice(start * inner, stop * inner))
        return tuple(parts)

    def _groups(self) -> list[tuple[int, ...]]:
        axes = iter(self.order)
        return [tuple(next(axes) for _ in range(n)) for n in self.merged]


def _layer(path: str, name: str, order: tuple[int, ...], merged: tuple[int, ...]) -> Entry:
    return Entry(("layers", path), f"layers.{{i}}.{name}.weight", order, merged)


TABLE = (
    Entry(("embedding",), "embed_tokens.weight", (0, 1), (1, 1)),
    _layer("attention_norm", "input_layernorm", (0,), (1,)),
    _layer("query", "self_attn.q_proj", (1, 2, 0), (2, 1)),
    _layer("key", "self_attn.k_proj", (1, 2, 0), (2, 1)),
    _layer("value", "self_attn.v_proj", (1, 2, 0), (2, 1)),
    _layer("query_norm", "self_attn.q_norm", (0,), (1,)),
    _layer("key_norm", "self_attn.k_norm", (0,), (1,)),
    _layer("output", "self_attn.o_proj", (0, 1, 2), (1, 2)),
    _layer("mlp_norm", "post_attention_layernorm", (0,), (1,)),
    _layer("gate", "mlp.gate_proj", (1, 0), (1, 1)),
    _layer("up", "mlp.up_proj", (1, 0), (1, 1)),
    _layer("down", "mlp.down_proj", (0, 1), (1, 1)),
    Entry(("norm",), "norm.weight", (0,), (1,)),
)
EMBEDDING = TABLE[0]
# What replaces the embedding table where it is a product (low_rank.py), by ML-Embed's names. Qwen3 knows no such tensors.
LEFT, RIGHT = Entry(("embedding_left",), "U", (0, 1), (1, 1)), Entry(("embedding_right",), "V", (0, 1), (1, 1))
