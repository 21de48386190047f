"""One command next to sentence-transformers' trainer: the same start, training rows, learning rate and processor seconds; held-out recall.

    pip install accelerate    (the peer's trainer needs it)
    python tests/benchmarks/finetune.py --base BASE --pairs pairs.jsonl --out OUT --learning-rate 1e-3

Seconds are those of processors (a machine that others use makes no difference), of the whole training command with its compilation; the
peer's import is not counted. Both models are scored by sentence-transformers, on the queries that the command held out, among all passages.
"""

import argparse
import json
import pathlib
import resource
import shutil
import subprocess
import sys
import time

import numpy as np

from f2llm_jax.data.records import load_dataset

KS = (1, 10)
TRIED_STEPS = 10


def texts(dataset, split, source):
    """Queries and passages of a split, as texts."""
    tokenizer = dataset.tokenizer()
    decoded = lambda ids: tokenizer.decode(ids[:-1])  # noqa: E731 - without the end token
    corpus = [decoded(ids) for ids in dataset.reader(source, "corpus").read(range(dataset.sources[source].documents))]
    queries = [decoded(ids) for ids in dataset.reader(source, split).read(range(dataset.sources[source].rows[split]))]
    own = np.asarray(dataset.tables(source, split).documents)[:, 0]
    return queries, own, corpus


def recalls(model, queries, own, corpus):
    """By k, as `f2llm_jax.evaluation.held_out.search`: the share of a query's passages among the k nearest, mean over queries."""
    right = {}
    for query, document in zip(queries, own.tolist(), strict=True):
        right.setdefault(query, set()).add(document)
    vectors = model.encode(corpus, normalize_embeddings=True, show_progress_bar=False)
    asked = model.encode(list(right), normalize_embeddings=True, show_progress_bar=False)
    nearest = np.argsort(-(asked @ vectors.T), axis=1, kind="stable")
    return {
        k: float(np.mean([len(set(row[:k]) & of) / len(of) for row, of in zip(nearest.tolist(), right.values(), strict=True)])) for k in KS
    }


def train_peer(folder, queries, passages, steps, size, learning_rate, out):
    """sentence-transformers' own script for pairs; the model, and the processor seconds of its steps but for the first, which warms up."""
    import datasets
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments, losses
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        ends = ()

        def on_step_end(self, *_, **__):
            self.ends = (*self.ends, time.process_time())

    model, clock = SentenceTransformer(str(folder), device="cpu"), Clock()
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_ratio=0.1,
        max_steps=steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        batch_sampler="no_duplicates",
    )
    data = datasets.Dataset.from_dict({"anchor": queries, "positive": passages})
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=data, loss=losses.MultipleNegativesRankingLoss(model), callbacks=[clock]
    )
    trainer.train()
    return model, clock.ends[-1] - clock.ends[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="a release (Hugging Face folder)")
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--columns", default="query=question,passage=answer")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    ours = ["--model", flags.base, "--data", flags.pairs, "--columns", flags.columns, "--out", str(flags.out / "model")]
    command = [sys.executable, "-m", "f2llm_jax.finetune", *ours, f"--config.optimizer.learning_rate={flags.learning_rate}"]
    subprocess.run(command, check=True)
    print(f"the whole command: {time.monotonic() - begun:.0f} s")
    work = flags.out / "model.work"
    (data,), (run,) = work.glob("data-*"), sorted(work.glob("run-*"))[-1:]
    dataset, config = load_dataset(data), json.loads((run / "config.json").read_text())
    # The training command alone, again, for its processor seconds.
    fields = [f"--config.init={flags.base}", f"--config.data.folder={data}", f"--config.optimizer.learning_rate={flags.learning_rate}"]
    train = [sys.executable, "-m", "f2llm_jax.main", "--config", "configs/finetune.py", "--workdir", str(flags.out / "again"), *fields]
    shutil.rmtree(flags.out / "again", ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(train, check=True, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    from sentence_transformers import SentenceTransformer

    (source,) = dataset.sources
    queries, own, corpus = texts(dataset, "train", source)
    size, rate = config["batch"]["size"], config["optimizer"]["learning_rate"]
    texts_of_peer = queries, [corpus[i] for i in own]
    _, tried = train_peer(flags.base, *texts_of_peer, TRIED_STEPS, size, rate, flags.out / "peer")
    steps = round(seconds * (TRIED_STEPS - 1) / tried)  # so that the schedule ends with the seconds
    peer, _ = train_peer(flags.base, *texts_of_peer, steps, size, rate, flags.out / "peer")
    held_out = texts(dataset, "validation", source)
    models = {
        "before": SentenceTransformer(flags.base, device="cpu"),
        "f2llm_jax": SentenceTransformer(str(flags.out / "model"), device="cpu"),
    }
    figures = {name: recalls(model, *held_out) for name, model in (models | {"sentence-transformers": peer}).items()}
    print(
        f"{len(queries):,} training rows, {len(set(held_out[0])):,} held-out queries, {len(corpus):,} passages; batch {size}, rate {rate:g}"
    )
    print(f"{seconds:.0f} processor seconds each; the peer made {steps} updates in them")
    for name, found in figures.items():
        print(f"{name:<24}" + "".join(f"recall@{k} {value:.3f}   " for k, value in found.items()))


if __name__ == "__main__":
    main()
