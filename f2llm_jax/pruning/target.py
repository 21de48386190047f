"""What a model is to be pruned to, checked against the model before any work."""

import dataclasses
import difflib

from f2llm_jax.errors import UserError
from f2llm_jax.model.sizes import SIZES, DecoderConfig

# A target's words and the fields they stand for. Heads are not among them: the family keeps them whole (paper, table 1).
FIELDS = {"hidden": "hidden_size", "ffn": "intermediate_size", "layers": "num_hidden_layers"}
KEPT = ("num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps")


def parse_target(target: str, model: DecoderConfig) -> DecoderConfig:
    """The shape that `target` means for `model`.

    Args:
      target: a size by name ("330m"), or "hidden=896,ffn=2560,layers=16"; what is left out stays as it is.
      model: shape of the model to prune. Its vocabulary stays.

    Raises:
      UserError: an unknown word or size, a number below 1 or above the model's, or a size with other heads.
    """
    if "=" not in target:
        return _check(_by_name(target, model), target, model)
    numbers = {}
    for part in target.split(","):
        word, _, value = part.partition("=")
        if word not in FIELDS:
            raise UserError(f"--target {target}: unknown {word!r}; {_nearest(word, FIELDS)}")
        if not value.isdecimal() or not int(value):
            raise UserError(f"--target {target}: {word}={value} must be a whole number of at least 1")
        numbers[FIELDS[word]] = int(value)
    return _check(dataclasses.replace(model, **numbers), target, model)


def _by_name(name: str, model: DecoderConfig) -> DecoderConfig:
    if name not in SIZES:
        raise UserError(f"--target {name}: no size of that name; {_nearest(name, SIZES)}; or hidden=...,ffn=...,layers=...")
    size = dataclasses.replace(SIZES[name], vocab_size=model.vocab_size, max_position_embeddings=model.max_position_embeddings)
    if other := [
        f"{field} {getattr(model, field)}, not {getattr(size, field)}" for field in KEPT if getattr(model, field) != getattr(size, field)
    ]:
        raise UserError(
            f"--target {name}: pruning leaves attention alone, but the model has {'; '.join(other)}; pass hidden=...,ffn=...,layers=..."
        )
    return size


def _check(wanted: DecoderConfig, target: str, model: DecoderConfig) -> DecoderConfig:
    larger = [
        f"{word} {getattr(wanted, field)} of {getattr(model, field)}"
        for word, field in FIELDS.items()
        if getattr(wanted, field) > getattr(model, field)
    ]
    if larger:
        raise UserError(f"--target {target}: more than the model has: {', '.join(larger)}; pruning only takes away, so choose less")
    return wanted


def _nearest(name: str, names: dict) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names)}"
