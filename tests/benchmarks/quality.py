"""Quality of this trainer and of sentence-transformers' on the same rows, from the same random start: one markdown table.

    pip install accelerate datasets    (the peer's trainer needs them)
    python tests/benchmarks/quality.py --raw RAW --manifest BENCH/manifest.json --root OUT --teacher MINILM \\
        --sources banking77 clinc150 xquad_en --tasks HWU64-eng STSb-captions-eng

RAW holds parquet files with `query`, `passage` and `negative_1`, ..., one a source; all are trained on as retrieval, without instructions
and with one negative a row, drawn from the first three. The manifest is that of `evaluate --manifest`. In OUT: a tokenizer trained on RAW,
the prepared dataset, a random Qwen3 for each seed, and a folder for each arm and seed. These are kept: the same command resumes.

Each side trains in a process of its own on one thread, arm after arm. Seconds are processor seconds of the training loop without its
first step, which compiles here; in brackets with everything but imports. With "equal seconds" the peer takes as many steps as fit in the
loop seconds of the arm that it is compared with, under a schedule of that length. With `--teacher`, a folder of sentence-transformers, both
sides have arms that learn from it (from the same vectors, computed once and not counted), and it is scored itself.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

WIDTH, LAYERS, VOCABULARY = 128, 2, 20_000
DIMS = (8, 16, 32, 64, 128)
NEGATIVES = ("negative_1", "negative_2", "negative_3")  # that are kept of a row
END, PAD = "<|im_end|>", "<|endoftext|>"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
ONE_THREAD |= {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"}

# Arms of this trainer: fields of configs/finetune.py. Arms of the peer: a name of `peer_loss`, and the arm whose seconds it gets.
_ONE_SOFTMAX = {"objective.in_batch_pool": "positives_and_negatives", "objective.hard_weight": 0.0}  # the peer's loss, and its optimizer
_ONE_SOFTMAX |= {"optimizer.schedule": "linear", "optimizer.beta2": 0.999, "optimizer.weight_decay": 0.0}
OURS: dict[str, dict[str, Any]] = {
    "contrastive": {"objective.matryoshka": False},
    "contrastive, one softmax": {"objective.matryoshka": False} | _ONE_SOFTMAX,
    "+ matryoshka": {},
    "+ matryoshka, one softmax": _ONE_SOFTMAX,
}
# Weights of distillation were chosen on seed 3, of 10, 30, 100, 300 and 1,000.
_PROJECTED = {"objective.distillation": "cosine", "objective.projection": True}
TAUGHT: dict[str, dict[str, Any]] = {
    "+ matryoshka, guide": {"objective.guide": "absolute", "objective.distillation_weight": 0.0},
    "+ matryoshka, scores, weight 30": {"objective.distillation": "scores", "objective.distillation_weight": 30.0},
    "+ matryoshka, projection, weight 30": _PROJECTED | {"objective.distillation_weight": 30.0},
    "+ matryoshka, projection, weight 1000": _PROJECTED | {"objective.distillation_weight": 1000.0},
    "the same, beta2 0.999": _PROJECTED | {"objective.distillation_weight": 1000.0, "optimizer.beta2": 0.999},  # the peer's
    "+ matryoshka, projection, one softmax": _PROJECTED | {"objective.distillation_weight": 1000.0} | _ONE_SOFTMAX,
    "projection, one softmax": {"objective.matryoshka": False, "objective.distillation_weight": 1000.0} | _PROJECTED | _ONE_SOFTMAX,
}
EQUAL = ", equal seconds"
PEER = {"MNRL": "contrastive", "MNRL + matryoshka": "+ matryoshka"}
PEER_TAUGHT = {"EmbedDistill": "projection, one softmax"}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--raw", type=pathlib.Path, required=True)
    found.add_argument("--manifest", type=pathlib.Path, required=True)
    found.add_argument("--root", type=pathlib.Path, required=True)
    found.add_argument("--sources", nargs="+", default=[], help="files of RAW, without their suffix (default: all)")
    found.add_argument("--tasks", nargs="+", default=[], help="tasks of the manifest (default: all)")
    found.add_argument("--teacher", type=pathlib.Path)
    found.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    found.add_argument("--steps", type=int, default=300)
    found.add_argument("--batch", type=int, default=48)
    found.add_argument("--cap", type=int, default=0, help="rows of a source at most")
    found.add_argument("--max-length", type=int, default=64)
    found.add_argument("--learning-rate", type=float, default=1e-3)
    found.add_argument("--arms", nargs="+", default=[], help="some of the arms, by their names in the table")
    found.add_argument("--table", action="store_true", help="print the table of what is there, and train nothing")
    found.add_argument("--worker", choices=("ours", "peer", "score", "teacher"), help=argparse.SUPPRESS)
    found.add_argument("--jobs", type=json.loads, help=argparse.SUPPRESS)
    return found


# What both sides start from ------------------------------------------------------------------------------------------------------------


def write_tokenizer(folder: pathlib.Path, texts: Iterable[str]) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[PAD, END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    end = [(END, tokenizer.token_to_id(END))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=end)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": PAD}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_start(folder: pathlib.Path, tokenizer: pathlib.Path, seed: int) -> None:
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.Qwen3Config(
        vocab_size=len(transformers.AutoTokenizer.from_pretrained(tokenizer)), hidden_size=WIDTH, intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    transformers.Qwen3Model(config).save_pretrained(folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)


def prepared(flags: argparse.Namespace) -> pathlib.Path:
    """The dataset, and next to it the tokenizer and a start for each seed; made where they are not there."""
    import pyarrow.parquet as pq

    root, data = flags.root, flags.root / "data"
    names = flags.sources or sorted(path.stem for path in flags.raw.glob("*.parquet"))
    if not (root / "tokenizer").exists():
        tables = (pq.read_table(flags.raw / f"{name}.parquet", columns=["query", "passage"]) for name in names)
        write_tokenizer(root / "tokenizer", (text for table in tables for column in table.columns for text in column.to_pylist() if text))
    for seed in flags.seeds:
        if not (root / f"start-{seed}").exists():
            write_start(root / f"start-{seed}", root / "tokenizer", seed)
    if not data.exists():
        (root / "raw").mkdir(exist_ok=True)
        for name in names:
            table = pq.read_table(flags.raw / f"{name}.parquet")
            kept = [column for column in ("query", "passage", *NEGATIVES) if column in table.column_names]
            pq.write_table(table.select(kept), root / "raw" / f"{name}.parquet")
        (root / "tasks.json").write_text(json.dumps(dict.fromkeys(names, "retrieval")))
        command = ["--raw", root / "raw", "--tokenizer", root / "tokenizer", "--out", data, "--tasks", root / "tasks.json"]
        call(
            "f2llm_jax.prepare",
            *command,
            "--stage",
            1,
            "--max-length",
            flags.max_length,
            "--skip-invalid",
            "--workers",
            1,
            "--validation",
            0,
            "--cap",
            flags.cap,
        )
    if flags.teacher and not (root / "teacher").exists():
        where = ["--sentence-transformers", flags.teacher, "--data", data, "--out", root / "teacher", "--max-length", flags.max_length]
        call("f2llm_jax.cache_teacher", *where)
    tasks = json.loads(flags.manifest.read_text())["tasks"]
    tasks = [task | {"instruction": ""} for task in tasks if not flags.tasks or task["name"] in flags.tasks]
    found = lambda path: str((flags.manifest.parent / path).absolute())  # noqa: E731
    files = {"file", "train", "test", "corpus", "queries", "qrels", "beir"}
    tasks = [{key: found(value) if key in files else value for key, value in task.items()} for task in tasks]
    (root / "manifest.json").write_text(json.dumps({"tasks": tasks}))
    return data


# The two trainers ----------------------------------------------------------------------------------------------------------------------


def train_ours(flags: argparse.Namespace, folder: pathlib.Path, name: str, seed: int, steps: int) -> list[float]:
    """`api.train` and a release; the processor's clock after each step."""
    from f2llm_jax import api

    clock: list[float] = []
    fields = fields_of(flags, seed, steps, (OURS | TAUGHT)[name] | ({"teacher_cache": flags.root / "teacher"} if name in TAUGHT else {}))
    api.train(fields, folder / "run", callbacks=[lambda step, values: clock.append(time.process_time()) if "loss" in values else None])
    api.release(folder / "run", folder / "model")
    return clock


def peer_loss(name: str, model: Any, width: int) -> Any:
    from sentence_transformers import losses

    if name == "EmbedDistill":
        return losses.EmbedDistillLoss(model, projection_dim=width)
    inner = losses.MultipleNegativesRankingLoss(model, scale=20.0)
    return losses.MatryoshkaLoss(model, inner, matryoshka_dims=list(DIMS)) if "matryoshka" in name else inner


def peer_rows(root: pathlib.Path, seed: int, taught: bool) -> dict[str, Any]:
    """The training rows of each source as texts, with one negative each, drawn by the seed; `taught` adds the teacher's vectors."""
    import datasets

    from f2llm_jax.data.records import load_dataset
    from f2llm_jax.data.teacher_cache import TeacherCache

    dataset, found, rng = load_dataset(root / "data"), {}, np.random.default_rng(seed)
    tokenizer, teacher = dataset.tokenizer(), TeacherCache(root / "teacher", dataset, dataset.max_length, None) if taught else None
    text = lambda ids: tokenizer.decode(ids[:-1])  # noqa: E731 - without the end token
    for name, source in dataset.sources.items():
        numbers = np.arange(source.rows["train"])
        corpus = [text(ids) for ids in dataset.reader(name, "corpus").read(range(source.documents))]
        queries = [text(ids) for ids in dataset.reader(name, "train").read(numbers)]
        documents = np.asarray(dataset.tables(name, "train").documents)
        pair = np.array([(row[0], rng.choice(row[1:][row[1:] >= 0])) for row in documents])
        columns = {"query": queries, "passage": [corpus[i] for i in pair[:, 0]], "negative": [corpus[i] for i in pair[:, 1]]}
        if teacher:
            vectors = [teacher.read(name, "train", numbers), *(teacher.read(name, "corpus", column) for column in pair.T)]
            columns["label"] = np.stack(vectors, axis=1).astype(np.float32).tolist()
        found[name] = datasets.Dataset.from_dict(columns)
    return found


def train_peer(flags: argparse.Namespace, folder: pathlib.Path, name: str, seed: int, steps: int) -> list[float]:
    """SentenceTransformerTrainer with its defaults, but rate and warm-up, which are those of the other side."""
    import datasets
    import torch
    import transformers
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments, models

    torch.set_num_threads(1)
    name = name.removesuffix(EQUAL)
    data = datasets.DatasetDict(peer_rows(flags.root, seed, name == "EmbedDistill"))
    start = models.Transformer(str(flags.root / f"start-{seed}"), max_seq_length=flags.max_length)
    model = SentenceTransformer(modules=[start, models.Pooling(WIDTH, "lasttoken")], device="cpu")
    clock: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *arguments: object, **named: object) -> None:
            clock.append(time.process_time())

    arguments = SentenceTransformerTrainingArguments(
        str(folder / "run"), per_device_train_batch_size=flags.batch, max_steps=steps, learning_rate=flags.learning_rate, warmup_ratio=0.1,
        use_cpu=True, save_strategy="no", report_to=[], logging_strategy="no", disable_tqdm=True, seed=seed,
    )  # fmt: skip
    width = len(next(iter(data.values()))["label"][0][0]) if name == "EmbedDistill" else 0
    loss = peer_loss(name, model, width)
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss, callbacks=[Clock()]).train()
    model.save_pretrained(str(folder / "model"))
    return clock


# Arms ----------------------------------------------------------------------------------------------------------------------------------


def call(module: str, *command: object, **options: Any) -> None:
    subprocess.run([sys.executable, "-m", module, *map(str, command)], check=True, env=os.environ | ONE_THREAD, **options)


def fields_of(flags: argparse.Namespace, seed: int, steps: int, fields: dict[str, Any]) -> dict[str, Any]:
    rows = max(1, 1024 // flags.max_length)  # in a layer at once; memory and time alone, as the next
    common = {"init": flags.root / f"start-{seed}", "data.folder": flags.root / "data", "seed": seed, "steps": steps}
    common |= {"batch.size": flags.batch, "batch.negatives.retrieval": 1, "batch.max_length": flags.max_length, "loggers": "()"}
    common |= {"batch.row_tokens": flags.max_length, "batch.microbatch_rows": 8 * rows, "batch.chunk_rows": rows}
    common |= {"optimizer.learning_rate": flags.learning_rate, "eval.every": 10**6, "checkpoint.every": 10**6, "remat": "dots"}
    return {name: str(value) for name, value in (common | fields).items()}


def score(flags: argparse.Namespace, folder: pathlib.Path) -> None:
    """`evaluate --manifest` of `folder / "model"`; scores.json has the main score of each task at each width."""
    from f2llm_jax import evaluate

    where = ["--model", folder / "model", "--manifest", flags.root / "manifest.json", "--out", folder / "eval", "--dims", "32,full"]
    evaluate.main([*map(str, where), "--max-length", str(flags.max_length)])
    found: dict[str, Any] = {}
    for path in (folder / "eval" / "results").rglob("*.json"):
        result = json.loads(path.read_text())
        if "task_name" in result:
            width = "32" if "embed_dim_32" in str(path) else "full"
            found.setdefault(width, {})[result["task_name"]] = statistics.fmean(one["main_score"] for one in result["scores"]["test"])
    (folder / "scores.json").write_text(json.dumps(found))


def score_teacher(flags: argparse.Namespace) -> None:
    """The same tasks by mteb and sentence-transformers alone, at the teacher's full width."""
    import mteb
    from sentence_transformers import SentenceTransformer

    from f2llm_jax.evaluation.local_tasks import read_manifest

    tasks, _ = read_manifest(flags.root / "manifest.json")
    result = mteb.evaluate(SentenceTransformer(str(flags.teacher), device="cpu"), tasks, co2_tracker=False, cache=None)
    (flags.root / "teacher.json").write_text(json.dumps({one.task_name: one.get_score() for one in result.task_results}))


def work(flags: argparse.Namespace) -> None:
    """In a process of one side: its arms, one after the other; or the scores of all."""
    if flags.worker == "teacher":
        return score_teacher(flags)
    for name, seed, steps in flags.jobs:
        if flags.worker == "score":
            score(flags, pathlib.Path(name))
            continue
        folder = flags.root / flags.worker / name / str(seed)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        begun = time.process_time()
        clock = (train_ours if flags.worker == "ours" else train_peer)(flags, folder, name, seed, steps)
        loop = (clock[-1] - clock[0]) * steps / (steps - 1)
        (folder / "seconds.json").write_text(json.dumps({"steps": steps, "loop": loop, "all": time.process_time() - begun}))


def run(flags: argparse.Namespace, worker: str, jobs: list[tuple[Any, int, int]]) -> "subprocess.Popen[bytes]":
    """Starts a process for the jobs that are not done."""
    own = [sys.executable, __file__, "--raw", flags.raw, "--manifest", flags.manifest, "--root", flags.root, "--batch", flags.batch]
    own += ["--max-length", flags.max_length, "--learning-rate", flags.learning_rate, "--worker", worker]
    own += ["--teacher", flags.teacher] if flags.teacher else []
    jobs = [job for job in jobs if not (flags.root / worker / job[0] / str(job[1]) / "seconds.json").exists()]
    return subprocess.Popen(list(map(str, [*own, "--jobs", json.dumps(jobs)])), env=os.environ | ONE_THREAD)


def train_and_score(flags: argparse.Namespace) -> None:
    ours, peer = OURS | (TAUGHT if flags.teacher else {}), PEER | (PEER_TAUGHT if flags.teacher else {})
    ours, peer = ({name: of for name, of in side.items() if not flags.arms or name in flags.arms} for side in (ours, peer))
    sides = [run(flags, side, [(n, s, flags.steps) for s in flags.seeds for n in of]) for side, of in (("ours", ours), ("peer", peer))]
    wait(*sides)

    def loop(side: str, name: str) -> float:
        return statistics.median(json.loads((flags.root / side / name / str(s) / "seconds.json").read_text())["loop"] for s in flags.seeds)

    equal = {name: round(flags.steps * loop("ours", rival) / loop("peer", name)) for name, rival in peer.items() if rival in ours}
    wait(run(flags, "peer", [(name + EQUAL, seed, steps) for seed in flags.seeds for name, steps in equal.items()]))
    trained = [path.parent for path in sorted(flags.root.glob("*/*/*/seconds.json")) if not (path.parent / "scores.json").exists()]
    wait(run(flags, "score", [(str(folder), 0, 0) for folder in trained]))
    if flags.teacher and not (flags.root / "teacher.json").exists():
        wait(run(flags, "teacher", []))


def wait(*processes: "subprocess.Popen[bytes]") -> None:
    for process in processes:
        if process.wait():
            raise SystemExit(f"a worker ended with {process.returncode}")


def table(root: pathlib.Path) -> str:
    """Means over seeds at full width and, after a slash, at 32; the seeds of the mean of all tasks in brackets."""
    rows, tasks = [], [task["name"] for task in json.loads((root / "manifest.json").read_text())["tasks"]]
    for side in ("ours", "peer"):
        for folder in sorted((root / side).glob("*")):
            done = [path.parent for path in sorted(folder.glob("*/scores.json"))]
            if not done:
                continue
            found = [json.loads((one / "scores.json").read_text()) for one in done]
            cells = [" / ".join(f"{100 * statistics.fmean(one[w][task] for one in found):.1f}" for w in ("full", "32")) for task in tasks]
            means = {w: [100 * statistics.fmean(one[w][task] for task in tasks) for one in found] for w in ("full", "32")}
            mean = " / ".join(f"{statistics.fmean(means[w]):.1f}" for w in means)
            seconds = [json.loads(path.read_text()) for path in folder.glob("*/seconds.json")]
            steps, loop, whole = (statistics.median(one[key] for one in seconds) for key in ("steps", "loop", "all"))
            spread = ", ".join(f"{value:.1f}" for value in means["full"])
            rows.append(f"| {side} | {folder.name} | {steps:.0f} | {loop:.0f} ({whole:.0f}) | {' | '.join(cells)} | {mean} ({spread}) |")
    if (root / "teacher.json").exists():
        found = json.loads((root / "teacher.json").read_text())
        cells = [f"{100 * found[task]:.1f}" for task in tasks]
        rows.append(f"| teacher | itself | | | {' | '.join(cells)} | {100 * statistics.fmean(found[task] for task in tasks):.1f} |")
    head = ["side", "arm", "steps", "seconds", *tasks, "mean (seeds)"]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows])


def main() -> None:
    flags = parser().parse_args()
    flags.root = flags.root.absolute()
    if flags.worker:
        return work(flags)
    if not flags.table:
        prepared(flags)
        train_and_score(flags)
    print(table(flags.root))


if __name__ == "__main__":
    main()
