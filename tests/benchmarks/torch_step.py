"""A padded PyTorch training step on the batches of step.py, on a GPU where there is one: its peer.

    python tests/benchmarks/torch_step.py [--lengths FILE] [--steps 16] [--hidden 128 ... | --size 0.6b] [--dtype bfloat16] [--checkpoint]

As the published trainer: queries, passages and negatives padded to the longest of them all, a Qwen3 decoder of transformers, both losses
under matryoshka, AdamW with clipping. It ran on several GPUs with flash_attention_2 (`--attention`, where flash-attn is installed;
sdpa otherwise, for which transformers repeats keys and values) and kept fp32 weights beside those in bfloat16; here weights and optimizer
are in `--dtype`, which is faster. Prints one JSON line as step.py does. Every batch is run once before the clock runs.
"""

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

import step_batches

TEMPERATURE = 0.05
NOT_OF_QWEN3 = ("table_rank", "rope_theta")  # of random weights any theta serves


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
    parser = step_batches.parser(__doc__)
    parser.add_argument("--dtype", default="float32", help="of weights, optimizer and computation")
    parser.add_argument("--attention", default="sdpa", help="attn_implementation of transformers")
    parser.add_argument("--checkpoint", action="store_true", help="compute activations again in the backward pass")
    flags = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(flags.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = {name: value for name, value in dataclasses.asdict(step_batches.model_of(flags)).items() if name not in NOT_OF_QWEN3}
    config = transformers.Qwen3Config(**shape, tie_word_embeddings=True, use_cache=False, attn_implementation=flags.attention)
    model = transformers.Qwen3Model(config).to(device, getattr(torch, flags.dtype)).train()
    if flags.checkpoint:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), weight_decay=0.01)
    batches = step_batches.batches_of(flags)
    useful = padded = 0
    seconds = 0.0
    for number in range(-len(batches), flags.steps):
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
        if number >= 0:
            seconds += time.perf_counter() - begun
            useful, padded = useful + sum(lengths), padded + len(lengths) * max(lengths)
    result = {"useful_tokens_per_s": useful / seconds, "token_efficiency": useful / padded}
    print(json.dumps(result | {"seconds_per_step": seconds / flags.steps, "steps": flags.steps, "device": device}))


if __name__ == "__main__":
    main()
