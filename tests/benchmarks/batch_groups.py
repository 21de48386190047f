"""Does a model learn better from batches of one file (one language) than from batches of a whole unit (all languages)?

    python tests/benchmarks/batch_groups.py --raw RAW --root RUNS [--steps 300] [--seeds 0 1 2]

RAW holds `tatoeba_*.parquet` and `xquad_*.parquet` in the F2LLM layout. Of each file every tenth row is held out. The two arms differ in
the catalogue alone: `"batch": "file"` against `"batch": "unit"`. Recall@1 at full width, of held-out queries among all held-out documents
of all languages, and among those of their own file.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from f2llm_jax.inference.encode import load_encoder
from f2llm_jax.text import strip_instruction
from f2llm_jax.weights.models import find_model

UNITS, HELD_OUT, VOCABULARY, MAX_LENGTH, BATCH = ("tatoeba", "xquad"), 10, 16_000, 48, 150
TRAIN = {"steps": 300, "batch.size": BATCH, "batch.max_length": MAX_LENGTH, "batch.row_tokens": MAX_LENGTH, "batch.microbatch_rows": 96}
TRAIN |= {"eval.every": 10**6, "checkpoint.every": 10**6, "checkpoint.merge_last": 0}


def split(raw: pathlib.Path, out: pathlib.Path) -> dict[str, list[tuple[str, str]]]:
    """Writes the rows to train on; returns the held-out pairs of each file."""
    (out / "raw").mkdir(parents=True, exist_ok=True)
    pairs, texts = {}, []
    for path in sorted(path for unit in UNITS for path in raw.glob(f"{unit}_*.parquet")):
        table = pq.read_table(path)
        held = np.arange(len(table)) % HELD_OUT == 0
        pq.write_table(table.filter(pa.array(~held)), out / "raw" / path.name)
        rows = table.filter(pa.array(held)).to_pydict()
        pairs[path.stem] = list(zip(rows["query"], rows["passage"], strict=True))
        texts += table.column("query").to_pylist() + table.column("passage").to_pylist()
    write_tokenizer(out / "tokenizer", texts)
    return pairs


def write_tokenizer(folder: pathlib.Path, texts: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special[1], "pad_token": special[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def call(*command: object) -> None:
    subprocess.run([sys.executable, "-m", *map(str, command)], check=True)


def prepared(out: pathlib.Path, arm: str) -> pathlib.Path:
    units = [{"unit": unit, "batch": arm, "files": sorted(path.name for path in (out / "raw").glob(f"{unit}_*.parquet"))} for unit in UNITS]
    sources = [{"source": unit["unit"], "task": "retrieval", "stage1": True, "units": [unit]} for unit in units]
    (out / f"{arm}.json").write_text(json.dumps({"sources": sources}))
    where = ("--raw", out / "raw", "--tokenizer", out / "tokenizer", "--out", out / f"data-{arm}", "--workers", 1)
    call("f2llm_jax.prepare", *where, "--catalogue", out / f"{arm}.json", "--cap", 0, "--stage", 1, "--max-length", MAX_LENGTH)
    return out / f"data-{arm}"


def recall(workdir: pathlib.Path, pairs: dict[str, list[tuple[str, str]]]) -> dict[str, float]:
    encoder = load_encoder(find_model(str(workdir)))
    query = {name: unit(encoder.encode([strip_instruction(q) for q, _ in rows])) for name, rows in pairs.items()}
    documents = {name: list(dict.fromkeys(d for _, d in rows)) for name, rows in pairs.items()}
    vectors = {name: unit(encoder.encode(texts)) for name, texts in documents.items()}
    every, pool = [d for texts in documents.values() for d in texts], np.concatenate(list(vectors.values()))
    found = {}
    for group in UNITS:
        names = [name for name in pairs if name.startswith(group)]
        mixed, own = [], []
        for name in names:
            positives = [d for _, d in pairs[name]]
            mixed += [every[i] == d for i, d in zip((query[name] @ pool.T).argmax(1), positives, strict=True)]
            own += [documents[name][i] == d for i, d in zip((query[name] @ vectors[name].T).argmax(1), positives, strict=True)]
        found |= {f"{group}, all languages": float(np.mean(mixed)), f"{group}, own file": float(np.mean(own))}
    return found


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=pathlib.Path, required=True)
    parser.add_argument("--root", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=TRAIN["steps"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flags = parser.parse_args()
    pairs = split(flags.raw, flags.root)
    for seed in flags.seeds:
        for arm in ("file", "unit"):
            data, workdir = prepared(flags.root, arm), flags.root / f"run-{arm}-{seed}"
            settings = TRAIN | {"steps": flags.steps, "seed": seed, "data.folder": data}
            fields = [f"--config.{name}={value}" for name, value in settings.items()]
            call("f2llm_jax.main", "--config", "configs/stage1.py:runlocal", "--workdir", workdir, *fields)
            print(json.dumps({"seed": seed, "arm": arm, **recall(workdir, pairs)}), flush=True)


if __name__ == "__main__":
    main()
