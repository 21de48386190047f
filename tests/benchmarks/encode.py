"""Texts a second of this project's encoder and of sentence-transformers `encode` at its best batch size, on one model.

    python tests/benchmarks/encode.py --raw DIR --model FOLDER
    python tests/benchmarks/encode.py --raw DIR --random 4,512 --tokenizer DIR    random weights: layers, width

DIR holds parquet files in the raw layout (`query`, `passage`); texts are drawn from all files alike, instructions removed, so
lengths are mixed. Both sides have the same threads (two) and start from strings; they take turns in one process, and the ratio is of
the best rounds. On a machine with other work two threads wait for each other, torch's more than XLA's; --threads 1 and CPU time are
then the fair figures. Exit code 1 if a vector differs (cosine below 0.99999) or a ratio is below 2.
"""

import argparse
import dataclasses
import os
import pathlib
import random
import sys
import tempfile
import time

import numpy as np
import pyarrow.parquet as pq
import sentence_transformers
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import tiny

from f2llm_jax.inference.encode import load_encoder, truncate_and_normalize
from f2llm_jax.model.decoder import init_decoder
from f2llm_jax.model.sizes import DecoderConfig
from f2llm_jax.release import hf_folder
from f2llm_jax.text import load_tokenizer, strip_instruction
from f2llm_jax.weights.models import LoadableModel, find_model

THREADS = 2
BATCH_SIZES = (2, 4, 8, 16, 32, 64, 128)
TRIAL_TEXTS = 300


def sample(raw: pathlib.Path, count: int) -> list[str]:
    """Distinct texts, of every file and column the same number."""
    rng, texts = random.Random(0), {}
    columns = [
        pq.read_table(file, columns=[name])[name].to_pylist() for file in sorted(raw.glob("*.parquet")) for name in ("query", "passage")
    ]
    columns = [list(dict.fromkeys(map(strip_instruction, column))) for column in columns]
    for column in columns:
        rng.shuffle(column)
    while len(texts) < count and any(columns):
        for column in filter(None, columns):
            texts[column.pop()] = None
    texts = list(texts)[:count]
    rng.shuffle(texts)
    return texts


def random_model(shape: str, tokenizer: str, max_length: int, out: str) -> str:
    """A release of random weights in the proportions of the published sizes."""
    layers, width = map(int, shape.split(","))
    config = DecoderConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128),
        head_dim=64,
    )
    params = init_decoder(config, 0)
    origin = LoadableModel(
        name=f"random weights, {layers} layers of {width}",
        config=config,
        load=lambda mesh: params,
        open_params=lambda: tiny.in_memory(params),
        tokenizer=load_tokenizer(tokenizer),
        max_length=max_length,
    )
    hf_folder.export(origin, out, hf_folder.ReleaseForm(golden=False))
    return out


@dataclasses.dataclass(frozen=True)
class Took:
    """Of one run: seconds on the clock and of all threads' CPU time, and the vectors."""

    wall: float
    cpu: float
    vectors: np.ndarray

    @classmethod
    def of(cls, run) -> "Took":
        wall, cpu = time.perf_counter(), time.process_time()
        vectors = run()
        return cls(time.perf_counter() - wall, time.process_time() - cpu, vectors)

    def rate(self) -> str:
        return f"{len(self.vectors) / self.wall:,.0f} texts/s, {len(self.vectors) / self.cpu:,.0f} a CPU second"


def compare(folder: str, texts: list[str], rounds: int) -> bool:
    """Prints lengths, every round and the ratio; whether vectors are equal and the ratio is held."""
    origin = find_model(folder)
    lengths = [len(ids) for ids in origin.tokenizer.encode(texts, origin.text_limit)]
    quantiles = ", ".join(f"{q:.0f}" for q in np.quantile(lengths, (0, 0.1, 0.5, 0.9, 1)))
    print(f"{folder}: {origin.config.num_hidden_layers} layers of {origin.config.hidden_size}; {len(texts):,} texts")
    print(f"{sum(lengths):,} tokens; a text has (least, 10%, median, 90%, most): {quantiles}", flush=True)
    encoder = load_encoder(origin)
    peer = sentence_transformers.SentenceTransformer(folder, device="cpu")
    theirs = lambda batch, some=texts: peer.encode(some, batch_size=batch, show_progress_bar=False)  # noqa: E731
    trials = {batch: Took.of(lambda b=batch: theirs(b, texts[:TRIAL_TEXTS])) for batch in (BATCH_SIZES[0], *BATCH_SIZES)}
    best = min(trials, key=lambda batch: trials[batch].cpu)  # wall time chooses by what else runs
    print("sentence-transformers by batch size: " + "; ".join(f"{b}: {took.rate()}" for b, took in trials.items()), flush=True)
    encoder.encode(texts)  # compiles what these texts need
    ours, peers = [], []
    for number in range(rounds):
        ours.append(Took.of(lambda: encoder.encode(texts)))
        peers.append(Took.of(lambda: theirs(best)))
        print(f"round {number + 1}: here {ours[-1].rate()}; sentence-transformers, batch {best}, {peers[-1].rate()}", flush=True)
    width = encoder.width
    same = truncate_and_normalize(ours[-1].vectors, width) * truncate_and_normalize(peers[-1].vectors, width)
    cosine = float(same.sum(axis=1).min())
    by_wall, by_cpu = (min(getattr(t, kind) for t in peers) / min(getattr(t, kind) for t in ours) for kind in ("wall", "cpu"))
    print(f"{by_wall:.2f} times the texts/s, {by_cpu:.2f} times the texts a CPU second; worst cosine {cosine:.8f}")
    return min(by_wall, by_cpu) >= 2 and cosine >= 0.99999


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=pathlib.Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--random", metavar="LAYERS,WIDTH")
    parser.add_argument("--tokenizer")
    parser.add_argument("--max-length", type=int, default=512, help="of the random model (default 512)")
    parser.add_argument("--texts", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=THREADS)
    flags = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: flags.threads])  # before any library starts its threads
    torch.set_num_threads(flags.threads)
    texts = sample(flags.raw, flags.texts)
    with tempfile.TemporaryDirectory() as scratch:
        folder = flags.model or random_model(flags.random, flags.tokenizer, flags.max_length, f"{scratch}/model")
        return 0 if compare(folder, texts, flags.rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
