"""Useful tokens a second of the training step, packed, on batches of given text lengths.

    python tests/benchmarks/step.py [--lengths FILE] [--steps 16] [--hidden 128 --layers 4 ... | --size 0.6b] [--dtype bfloat16]

FILE is a JSON list of batches, `{"task", "query": [length, ...], "passage": [...], "negatives": [[...], ...]}`; by default
step_lengths.json beside this file: log-normal, sources of short and of long texts. The step is the one that runs:
matryoshka, both losses, AdamW with clipping. Prints one JSON line, as a padded trainer's benchmark would:
`useful_tokens_per_s` counts real tokens, `token_efficiency` those over all slots that are computed on, `flops_per_s` what the model
needs for the real tokens (f2llm_jax/model/flops.py). Each batch is timed from the host's arrays to the loss; compilation is not.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import step_batches

ROW_TEXTS = 64


def arguments() -> argparse.Namespace:
    parser = step_batches.parser(__doc__)
    parser.add_argument("--row-tokens", type=int, default=0, help="T; default the longest text")
    parser.add_argument("--chunk-rows", type=int, default=2, help="M, rows in a layer at once; a step is one group")
    parser.add_argument("--remat", default="dots")
    parser.add_argument("--dtype", default="float32", help="computed in; weights and optimizer are fp32")
    parser.add_argument("--attention", default="auto")
    return parser.parse_args()


flags = arguments()
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: flags.threads])  # before XLA counts its threads

import jax  # noqa: E402
import numpy as np  # noqa: E402

from f2llm_jax import sharding  # noqa: E402
from f2llm_jax.batch import Batch, Samples  # noqa: E402
from f2llm_jax.configs import stage2  # noqa: E402
from f2llm_jax.data.packing import RowShape, lay_out  # noqa: E402
from f2llm_jax.model.decoder import init_decoder  # noqa: E402
from f2llm_jax.model.flops import Work, training_flops  # noqa: E402
from f2llm_jax.training import program  # noqa: E402


def sizes_of(lengths: dict, negatives: int) -> np.ndarray:
    """Of each text of a batch, 0 where there is none."""
    B, n = len(lengths["query"]), len(lengths["negatives"][0])
    sizes = np.zeros(B * (2 + negatives), np.int64)
    sizes[:B], sizes[B : 2 * B] = lengths["query"], lengths["passage"]
    sizes[2 * B :].reshape(B, negatives)[:, :n] = lengths["negatives"]
    return sizes


def batch_of(
    lengths: dict, shape: RowShape, chunks: int, negatives: int, vocabulary: int, rng: np.random.Generator
) -> tuple[Batch, Work, int]:
    """Random tokens in texts of these lengths; the batch on the host, the work in it, and the slots that are computed on."""
    B, n, sizes = len(lengths["query"]), len(lengths["negatives"][0]), sizes_of(lengths, negatives)
    tokens = [rng.integers(5, vocabulary, size, np.int32) for size in sizes]
    texts = lay_out(shape.pack(sizes), shape, lambda which: [tokens[i] for i in which], chunks=chunks)
    mask = np.zeros((B, negatives), np.float32)
    mask[:, :n] = 1
    ids = np.arange(B * negatives, dtype=np.int32).reshape(B, negatives) + B
    retrieval = np.float32(lengths["task"] == "retrieval")
    batch = Batch(texts, Samples(np.ones(B, np.float32), mask, retrieval, np.arange(B, dtype=np.int32), ids))
    return batch, Work(int(sizes.sum()), int((sizes**2).sum())), int(texts.chunks) * shape.chunk_rows * shape.row_tokens


def main() -> None:
    model, found = step_batches.model_of(flags), step_batches.batches_of(flags)
    longest = max(max(itertools.chain(b["query"], b["passage"], *b["negatives"])) for b in found)
    negatives = max(len(b["negatives"][0]) for b in found)
    shape = RowShape(flags.chunk_rows, flags.row_tokens or longest, ROW_TEXTS)
    most = max(shape.pack(sizes_of(b, negatives)).rows for b in found)
    shape = dataclasses.replace(shape, group_chunks=-(-most // shape.chunk_rows))
    worst = -(-len(found[0]["query"]) * (2 + negatives) // shape.chunk_rows)
    config = stage2.get_config("runlocal")
    config.update({"remat": flags.remat, "dtype": flags.dtype, "attention": flags.attention})
    config.batch.row_tokens = shape.row_tokens
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    rng = np.random.default_rng(0)
    useful = slots = 0
    seconds = needed = 0.0
    with jax.set_mesh(mesh):
        steps = program.build(config, model, 1000, jax.default_backend())
        state = program.fresh_state(init_decoder(model, 0, mesh), steps.optimizer)
        batches = [batch_of(b, shape, worst, negatives, model.vocab_size, rng) for b in found]
        for number in range(flags.steps + 1):  # the first step is warm-up
            host, work, computed = batches[number % len(batches)]
            begun = time.perf_counter()
            state, means = steps.train_step(state, None, sharding.batch_to_devices(host, mesh))
            means["loss"].value.block_until_ready()
            if number:
                seconds, useful, slots = seconds + time.perf_counter() - begun, useful + work.tokens, slots + computed
                needed += training_flops(model, work)
    result = {"useful_tokens_per_s": useful / seconds, "token_efficiency": useful / slots, "flops_per_s": needed / seconds}
    print(json.dumps(result | {"seconds_per_step": seconds / flags.steps, "steps": flags.steps, "attention": steps.kernel}))


if __name__ == "__main__":
    main()
