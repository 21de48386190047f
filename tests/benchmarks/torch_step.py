"""The padded PyTorch recipe's training step on the batches of step.py, on a GPU where there is one: its peer.

    python tests/benchmarks/torch_step.py [--lengths FILE] [--steps 16] [--hidden 128 ... | --size 0.6b] [--dtype bfloat16] [--checkpoint]

As the published trainer does it: queries, passages and negatives padded to the longest of them all, a Qwen3 decoder of transformers in
`--dtype`, both losses under matryoshka, AdamW with clipping. Prints one JSON line as step.py does. Needs torch and transformers.
"""

import argparse
import dataclasses
import itertools
import json
import math
import pathlib
import sys
import time

import torch
import torch.nn.functional as F
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from f2llm_jax.model.sizes import SIZES

MODEL = {"hidden": 128, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn": 384, "vocab": 8192}
TEMPERATURE = 0.05


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"steps": 16, "threads": 2, **MODEL}.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    parser.add_argument("--lengths", default=str(pathlib.Path(__file__).with_name("step_lengths.json")))
    parser.add_argument("--size", default="", help="a published size, in place of the widths and depths")
    parser.add_argument("--dtype", default="float32", help="of weights, optimizer and computation")
    parser.add_argument("--attention", default="sdpa", help="attn_implementation of transformers")
    parser.add_argument("--checkpoint", action="store_true", help="compute activations again in the backward pass")
    return parser.parse_args()


def shape_of(flags: argparse.Namespace) -> dict[str, int]:
    if flags.size:
        found = dataclasses.asdict(SIZES[flags.size])
        return {name: found[name] for name in found if name not in ("rope_theta", "rms_norm_eps", "table_rank")}
    return {
        "vocab_size": flags.vocab,
        "hidden_size": flags.hidden,
        "intermediate_size": flags.ffn,
        "num_hidden_layers": flags.layers,
        "num_attention_heads": flags.heads,
        "num_key_value_heads": flags.kv_heads,
        "head_dim": flags.head_dim,
    }


def matryoshka(width: int, loss_at) -> torch.Tensor:
    """The n-th widest of width, ..., 16, 8 weighs 1 / (n sqrt(width / dim))."""
    dims = [width, *(2**i for i in range(14, 2, -1) if 2**i < width)]
    return sum(loss_at(dim) / (n * math.sqrt(width / dim)) for n, dim in enumerate(dims, 1))


def loss_of(q: torch.Tensor, p: torch.Tensor, n: torch.Tensor, retrieval: bool) -> torch.Tensor:
    """Of queries `[B, D]`, passages `[B, D]` and negatives `[B, N, D]`: hard negatives and, for retrieval, all passages of the batch."""
    candidates = torch.cat([p[:, None], n], 1)

    def hard(dim: int) -> torch.Tensor:
        scores = torch.einsum("bd,bkd->bk", F.normalize(q[:, :dim], dim=-1), F.normalize(candidates[..., :dim], dim=-1))
        return F.cross_entropy(scores / TEMPERATURE, torch.zeros(len(q), dtype=torch.long, device=q.device))

    def in_batch(dim: int) -> torch.Tensor:
        scores = F.normalize(q[:, :dim], dim=-1) @ F.normalize(p[:, :dim], dim=-1).T
        return F.cross_entropy(scores / TEMPERATURE, torch.arange(len(q), device=q.device))

    total = matryoshka(q.shape[-1], hard)
    return total + matryoshka(q.shape[-1], in_batch) if retrieval else total


def encode(model: torch.nn.Module, lengths: list[int], vocabulary: int, device: str) -> torch.Tensor:
    """The last hidden states of random texts of these lengths, padded on the right, `[texts, D]`."""
    sizes = torch.tensor(lengths)
    mask = torch.arange(int(sizes.max()))[None] < sizes[:, None]
    tokens = torch.randint(5, vocabulary, mask.shape) * mask
    hidden = model(input_ids=tokens.to(device), attention_mask=mask.long().to(device)).last_hidden_state
    return hidden[torch.arange(len(sizes)), sizes - 1]


def main() -> None:
    flags = arguments()
    torch.manual_seed(0)
    torch.set_num_threads(flags.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = shape_of(flags)
    config = transformers.Qwen3Config(**shape, tie_word_embeddings=True, use_cache=False, attn_implementation=flags.attention)
    model = transformers.Qwen3Model(config).to(device, getattr(torch, flags.dtype)).train()
    if flags.checkpoint:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), weight_decay=0.01)
    batches = json.loads(pathlib.Path(flags.lengths).read_text())
    useful = padded = 0
    seconds = 0.0
    for number in range(flags.steps + 1):  # the first step is warm-up
        batch = batches[number % len(batches)]
        B = len(batch["query"])
        lengths = [*batch["query"], *batch["passage"], *itertools.chain(*batch["negatives"])]
        begun = time.perf_counter()
        vectors = encode(model, lengths, shape["vocab_size"], device)
        negatives = vectors[2 * B :].view(B, -1, vectors.shape[-1])
        loss = loss_of(vectors[:B], vectors[B : 2 * B], negatives, batch["task"] == "retrieval")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        if number:
            seconds += time.perf_counter() - begun
            useful, padded = useful + sum(lengths), padded + len(lengths) * max(lengths)
    result = {"useful_tokens_per_s": useful / seconds, "token_efficiency": useful / padded}
    print(json.dumps(result | {"seconds_per_step": seconds / flags.steps, "steps": flags.steps, "device": device}))


if __name__ == "__main__":
    main()
