"""What step.py and torch_step.py have to agree on: the model's shape and the texts' lengths. Imports neither JAX nor PyTorch."""

import argparse
import json
import pathlib

from f2llm_jax.model.sizes import SIZES, DecoderConfig

MODEL = {"hidden": 128, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn": 384, "vocab": 8192}


def parser(description: str) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"steps": 16, "threads": 2, **MODEL}.items():
        found.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    found.add_argument("--size", default="", choices=["", *SIZES], help="a published size, in place of the widths and depths")
    found.add_argument("--lengths", type=pathlib.Path, default=pathlib.Path(__file__).with_name("step_lengths.json"))
    return found


def model_of(flags: argparse.Namespace) -> DecoderConfig:
    if flags.size:
        return SIZES[flags.size]
    return DecoderConfig(
        vocab_size=flags.vocab,
        hidden_size=flags.hidden,
        intermediate_size=flags.ffn,
        num_hidden_layers=flags.layers,
        num_attention_heads=flags.heads,
        num_key_value_heads=flags.kv_heads,
        head_dim=flags.head_dim,
    )


def batches_of(flags: argparse.Namespace) -> list[dict]:
    """Lengths of texts: `{"task", "query": [length, ...], "passage": [...], "negatives": [[...], ...]}` each."""
    return json.loads(flags.lengths.read_text())
