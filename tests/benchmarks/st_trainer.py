"""The training step against sentence-transformers' own trainer: the same rows, the same start folder, useful tokens a second.

    python tests/benchmarks/st_trainer.py --raw RAW --tokenizer TOKENIZER [--max-length 64] [--samples 64] [--rounds 3]

RAW is a folder of parquet files with `query`, `passage` and `negative_1`, `negative_2`, ... Both sides train a random Qwen3 of
4 layers, in fp32, on steps of `--samples` rows of one file each, with `--negatives` hard negatives: here both losses under matryoshka,
there MultipleNegativesRankingLoss under MatryoshkaLoss with the same widths, which pads each column of a batch to its longest text.
Sides run in turn, in processes of their own with `--threads` threads; the first step of each file is not timed. Prints each round and
the median ratios, by the clock and by processor time, which a busy machine changes less. Needs accelerate and datasets, as training
with sentence-transformers does.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

WIDTH, LAYERS, WIDTHS = 256, 4, (8, 16, 32, 64, 128, 256)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--raw", type=pathlib.Path, required=True)
    found.add_argument("--tokenizer", type=pathlib.Path, required=True)
    found.add_argument("--files", default="tatoeba_fra,xquad_en,sib_bitext,xquad_zh", help="names in RAW, a step from each in turn")
    found.add_argument("--max-length", type=int, default=64)
    found.add_argument("--samples", type=int, default=64)
    found.add_argument("--negatives", type=int, default=3)
    found.add_argument("--steps", type=int, default=2, help="timed steps of each file")
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--row-tokens", type=int, default=0, help="here; default the longest text")
    found.add_argument("--microbatch-rows", type=int, default=0, help="here; default as many as hold 16,384 tokens, which a step fits")
    found.add_argument("--chunk-rows", type=int, default=0, help="here; default as many as hold 1,024 tokens")
    found.add_argument("--remat", default="dots", help="here")
    found.add_argument("--side", choices=("here", "there"), help=argparse.SUPPRESS)
    found.add_argument("--start", type=pathlib.Path, help=argparse.SUPPRESS)
    return found


def rows_of(flags: argparse.Namespace) -> dict[str, list[list[str]]]:
    """By file, one step of warm-up and the timed ones: query, passage and negatives of each row."""
    import pyarrow.parquet as pq

    columns, found = ["query", "passage", *(f"negative_{n + 1}" for n in range(flags.negatives))], {}
    for name in flags.files.split(","):
        table = pq.read_table(flags.raw / f"{name}.parquet", columns=columns).slice(0, flags.samples * (flags.steps + 1))
        found[name] = [list(row) for row in zip(*(table[column].to_pylist() for column in columns), strict=True)]
    return found


def write_start(folder: pathlib.Path, tokenizer: pathlib.Path) -> None:
    import shutil

    import transformers

    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    vocabulary = len(transformers.AutoTokenizer.from_pretrained(tokenizer))
    config = transformers.Qwen3Config(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    transformers.Qwen3Model(config).save_pretrained(folder)


def now() -> np.ndarray:
    """Seconds by the clock, and of processor time."""
    return np.array([time.perf_counter(), time.process_time()])


def here(flags: argparse.Namespace) -> tuple[np.ndarray, int]:
    """Seconds of the timed steps and the real tokens in them."""
    import jax

    from f2llm_jax import sharding
    from f2llm_jax.batch import Batch, Samples
    from f2llm_jax.configs import stage2
    from f2llm_jax.data.packing import RowShape, lay_out
    from f2llm_jax.text import load_tokenizer
    from f2llm_jax.training import program
    from f2llm_jax.weights import hf_config, hf_reader

    B, N, T = flags.samples, flags.negatives, flags.row_tokens or flags.max_length
    microbatch, chunk_rows = flags.microbatch_rows or max(1, 16_384 // T), flags.chunk_rows or max(1, 1024 // T)
    shape = RowShape(chunk_rows, T, 64, microbatch // chunk_rows)
    tokenizer, mesh = load_tokenizer(flags.tokenizer), sharding.make_mesh(devices=jax.devices()[:1])
    config = stage2.get_config("runlocal")
    config.update({"remat": flags.remat, "dtype": "float32"})
    config.batch.row_tokens = T

    def batch_of(rows: list[list[str]]) -> tuple[Batch, int]:
        columns = list(zip(*rows, strict=True))
        negatives = [text for row in rows for text in row[2:]]
        ids = tokenizer.encode([*columns[0], *columns[1], *negatives], flags.max_length)
        packing = shape.pack([len(one) for one in ids])
        texts = lay_out(packing, shape, lambda which: [ids[i] for i in which], chunks=-(-len(ids) // chunk_rows))
        numbers = np.arange(B, dtype=np.int32)
        samples = Samples(np.ones(B, np.float32), np.ones((B, N), np.float32), np.float32(1), numbers, B + np.arange(B * N).reshape(B, N))
        return Batch(texts, samples), sum(map(len, ids))

    seconds, useful = np.zeros(2), 0
    with jax.set_mesh(mesh):
        model = hf_config.read_settings(flags.start).decoder
        steps = program.build(config, model, 1000, "cpu")
        state = program.fresh_state(hf_reader.load_params(flags.start, model, mesh), steps.optimizer)
        for rows in rows_of(flags).values():
            for number in range(flags.steps + 1):
                begun = now()
                batch, tokens = batch_of(rows[number * B : (number + 1) * B])
                state, means = steps.train_step(state, None, sharding.batch_to_devices(batch, mesh))
                means["loss"].value.block_until_ready()
                if number:
                    seconds, useful = seconds + now() - begun, useful + tokens
    return seconds, useful


def there(flags: argparse.Namespace) -> tuple[np.ndarray, int]:
    """The same of SentenceTransformerTrainer, from the end of each first step to the end of the last."""
    import datasets
    import torch
    import transformers
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments, losses, models

    torch.set_num_threads(flags.threads)
    transformer = models.Transformer(str(flags.start), max_seq_length=flags.max_length)
    model = SentenceTransformer(modules=[transformer, models.Pooling(WIDTH, "lasttoken")], device="cpu")
    loss = losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model, scale=20.0), matryoshka_dims=list(WIDTHS))
    ends: list[np.ndarray] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *arguments: object, **named: object) -> None:
            ends.append(now())

    seconds, useful = np.zeros(2), 0
    for rows in rows_of(flags).values():
        names = ["query", "passage", *(f"negative_{n}" for n in range(flags.negatives))]
        data = datasets.Dataset.from_dict(dict(zip(names, zip(*rows, strict=True), strict=True)))
        with tempfile.TemporaryDirectory() as folder:
            arguments = SentenceTransformerTrainingArguments(
                folder, per_device_train_batch_size=flags.samples, max_steps=flags.steps + 1, use_cpu=True, save_strategy="no",
                report_to=[], logging_strategy="no", disable_tqdm=True, learning_rate=1e-5,
            )  # fmt: skip
            ends.clear()
            SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss, callbacks=[Clock()]).train()
        seconds += ends[-1] - ends[0]
        counted = [text for row in rows for text in row]
        lengths = [min(len(ids) + 1, flags.max_length) for ids in model.tokenizer(counted)["input_ids"]]  # and an EOS
        useful += sum(lengths) * flags.steps // (flags.steps + 1)
    return seconds, useful


def main() -> None:
    flags = parser().parse_args()
    if flags.side:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: flags.threads])  # before either counts its threads
        seconds, useful = (here if flags.side == "here" else there)(flags)
        rate, cpu_rate = useful / seconds
        print(json.dumps({"side": flags.side, "useful_tokens_per_s": rate, "per_cpu_s": cpu_rate, "tokens": useful}))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_start(pathlib.Path(folder), flags.tokenizer)
        ratios = []
        for _ in range(flags.rounds):
            rates = []
            for side in ("there", "here"):
                command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--start", folder]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
                print(done.stdout.splitlines()[-1], flush=True)
                found = json.loads(done.stdout.splitlines()[-1])
                rates.append((found["useful_tokens_per_s"], found["per_cpu_s"]))
            ratios.append([mine / theirs for theirs, mine in zip(*rates, strict=True)])
    clock, cpu = (statistics.median(column) for column in zip(*ratios, strict=True))
    print(f"here over there, median of {flags.rounds} rounds: {clock:.2f} by the clock, {cpu:.2f} by processor time")


if __name__ == "__main__":
    main()
