"""What a guide is worth where paraphrases of the positive are among the negatives, on the embedded corpus.

Rows pair a name in some language with the English name of the same thing. In `planted` half of a row's negatives are names of that same
thing in other languages; `guided` trains on the same rows with a guide. All arms start from a model that was trained on clean rows, which
is the guide too. Recall@1 of names never trained on: `bitext` searches the English name, `zero_shot` the name in a third language.

python tests/benchmarks/guide.py --out FOLDER [--steps 150] [--guide-steps 800] [--seeds 3]
"""

import argparse
import collections
import json
import pathlib
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from f2llm_jax import api
from f2llm_jax.configs import stage1
from f2llm_jax.evaluation import retrieval
from f2llm_jax.preparation import demo_corpus, writing
from f2llm_jax.preparation.selection import Recipe
from f2llm_jax.preparation.sources import find_sources
from f2llm_jax.text import strip_instruction

NEGATIVES, PLANTED, MAX_LENGTH = 2, 1, 64
ARMS = {
    "clean": ("clean", {}),
    "planted": ("planted", {}),
    "planted, guided": ("planted", {"objective.guide": "relative", "objective.guide_margin": 0.1}),
}


def plant(table: pa.Table, planted: int) -> pa.Table:
    """The rows to English with `NEGATIVES` negatives, the first `planted` of them other names of what the row is about."""
    rows = [row for row in table.to_pylist() if row["query"].startswith("Instruct")]
    names = collections.defaultdict(list)
    for row in rows:
        names[row["passage"]].append(strip_instruction(row["query"]))
    rng = np.random.default_rng(0)
    found = []
    for row in rows:
        others = sorted(set(names[row["passage"]]) - {strip_instruction(row["query"]), row["passage"]})
        taken = [others[i] for i in rng.permutation(len(others))[:planted]]
        negatives = [*taken, *(row[f"negative_{i}"] for i in range(1, 1 + NEGATIVES))][:NEGATIVES]
        found.append({name: row[name] for name in ("query", "passage", "lang")} | {f"negative_{i}": t for i, t in enumerate(negatives, 1)})
    return pa.Table.from_pylist(found)


def prepare(folder: pathlib.Path) -> None:
    corpus = demo_corpus.build(folder / "corpus")
    for name, planted in (("clean", 0), ("planted", PLANTED)):
        raw = folder / "raw" / name
        raw.mkdir(parents=True)
        pq.write_table(plant(corpus["raw/cldr_bitext"], planted), raw / "names.parquet")
        recipe = Recipe(stage=1, max_length=MAX_LENGTH, seed=0, cap=0, instruct_documents=0.0, policy="default")
        writing.prepare(find_sources(raw, stage=1), folder / "corpus" / "tokenizer", folder / name, recipe, workers=1)


def train(folder: pathlib.Path, workdir: pathlib.Path, data: str, steps: int, seed: int, fields: dict) -> dict:
    """Trains one model; its recall, and the shares that were left out on average."""
    config = stage1.get_config("runlocal")
    config.update_from_flattened_dict(
        {"data.folder": str(folder / data), "steps": steps, "seed": seed, "batch.negatives.retrieval": NEGATIVES}
        | {"eval.every": 10**6, "eval.batches": 0, "checkpoint.every": 10**6, "objective.matryoshka": False, "loggers": (), **fields}
    )
    begun = time.perf_counter()
    record = api.train(config, workdir)
    model = api.load(workdir)
    found = {}
    for name in ("bitext", "zero_shot"):
        pairs = retrieval.read_pairs(folder / "corpus" / "heldout" / f"{name}.parquet")
        found[name] = retrieval.evaluate(model._encoder, pairs, [model.width])[model.width].overall
    for name in ("masked_negatives", "masked_hard_negatives"):
        values = list(record.values(name).values())
        found[name] = float(np.mean(values)) if values else 0.0
    return found | {"seconds": time.perf_counter() - begun}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--guide-steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    flags = parser.parse_args()
    if not (flags.out / "corpus").exists():
        prepare(flags.out)
    guide = flags.out / "runs" / "guide"
    print(json.dumps({"arm": "guide", **train(flags.out, guide, "clean", flags.guide_steps, 100, {})}), flush=True)
    results = collections.defaultdict(list)
    for seed in range(flags.seeds):
        for arm, (data, fields) in ARMS.items():
            fields = {**fields, "init": str(guide)}
            if "objective.guide" in fields:
                fields |= {"teacher": str(guide), "objective.distillation_weight": 0.0}
            found = train(flags.out, flags.out / "runs" / f"{arm.replace(', ', '-')}-{seed}", data, flags.steps, seed, fields)
            print(json.dumps({"arm": arm, "seed": seed, **found}), flush=True)
            results[arm].append(found)
    for arm, found in results.items():
        print(json.dumps({"arm": arm} | {name: round(float(np.mean([one[name] for one in found])), 4) for name in found[0]}))


if __name__ == "__main__":
    main()
