"""Real texts as local tasks of each type: scores through this project's encoder and through mteb's sentence-transformers wrapper.

    python tests/benchmarks/mteb_agreement.py --raw DIR --model FOLDER --dims 8,32,full

FOLDER is a release in float32, DIR holds xquad_en and at least ten tatoeba sources, French among them, in the raw layout. Prints
the largest difference of any measure, task by task and width by width; exit code 1 if one is above 1e-4.
"""

import argparse
import json
import math
import pathlib
import sys
import tempfile

import mteb
import pyarrow as pa
import pyarrow.parquet as pq
from mteb.models import ModelMeta
from mteb.models.instruct_wrapper import InstructSentenceTransformerModel

from f2llm_jax import evaluate
from f2llm_jax.evaluation import instructions
from f2llm_jax.evaluation.local_tasks import read_manifest
from f2llm_jax.text import INSTRUCTION_TEMPLATE, strip_instruction
from f2llm_jax.weights.models import find_model

ROWS, LANGUAGES = 300, 10
BOUND = 1e-4


def rows(raw: pathlib.Path, source: str, count: int) -> tuple[list[str], list[str]]:
    table = pq.read_table(raw / f"{source}.parquet", columns=["query", "passage"])
    step = max(1, len(table) // count)
    columns = (table[name].to_pylist()[::step][:count] for name in ("query", "passage"))
    return tuple(list(map(strip_instruction, column)) for column in columns)


def write_manifest(raw: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    def file(name: str, **columns: list) -> str:
        pq.write_table(pa.table(columns), folder / name)
        return name

    questions, passages = rows(raw, "xquad_en", ROWS)
    number = {text: f"d{i}" for i, text in enumerate(dict.fromkeys(passages))}
    ids = [f"q{i}" for i in range(len(questions))]
    judged = {"query-id": ids, "corpus-id": [number[text] for text in passages], "score": [1] * len(ids)}
    french, english = rows(raw, "tatoeba_fra", ROWS)
    beside = [english[i] if i % 2 else english[(i + 1) % len(english)] for i in range(len(english))]
    sources = sorted(path.stem for path in raw.glob("tatoeba_*.parquet"))[:LANGUAGES]
    texts, languages = zip(*((text, source) for source in sources for text in rows(raw, source, 2 * ROWS // LANGUAGES)[0]), strict=True)
    files = [file(f"{k}.parquet", text=texts[k::2], label=languages[k::2]) for k in (0, 1)]
    shared = [len(set(a.split()) & set(b.split())) for a, b in zip(french, beside, strict=True)]
    tasks = [
        {
            "name": "LocalXquad", "type": "Retrieval",
            "corpus": file("corpus.parquet", id=list(number.values()), text=list(number)),
            "queries": file("queries.parquet", id=ids, text=questions), "qrels": file("qrels.parquet", **judged),
        },
        {"name": "LocalTatoeba", "type": "BitextMining", "file": file("bitext.parquet", sentence1=french, sentence2=english)},
        {"name": "LocalLanguages", "type": "Classification", "train": files[0], "test": files[1]},
        {"name": "LocalClusters", "type": "Clustering", "file": file("clusters.parquet", sentences=texts, labels=languages)},
        {"name": "LocalSharedWords", "type": "STS", "file": file("sts.parquet", sentence1=french, sentence2=beside, score=shared)},
        {
            "name": "LocalTranslation", "type": "PairClassification",
            "file": file("pairs.parquet", sentence1=french, sentence2=beside, labels=[i % 2 for i in range(len(french))]),
        },
    ]  # fmt: skip
    path = folder / "tasks.json"
    path.write_text(json.dumps({"tasks": tasks}))
    return path


def compare(model: str, manifest: pathlib.Path, out: pathlib.Path, dims: str) -> float:
    """Prints a line for each task and width; the largest difference of all."""
    assert evaluate.main(["--model", model, "--manifest", str(manifest), "--dims", dims, "--out", str(out), "--name", "us/here"]) == 0
    (results,) = (out / "results" / "us__here").iterdir()
    worst = 0.0
    for dim in dims.split(","):
        width = None if dim == "full" or int(dim) == find_model(model).config.hidden_size else int(dim)
        peer = InstructSentenceTransformerModel(
            model, None, device="cpu", instruction_template=INSTRUCTION_TEMPLATE, prompts_dict=instructions.published(),
            apply_instruction_to_passages=False, embed_dim=width,
        )  # fmt: skip
        peer.mteb_model_meta = ModelMeta.create_empty({"name": "their/wrapper"})
        for task in read_manifest(manifest)[0]:
            kwargs = {"batch_size": 16, "normalize_embeddings": True, "show_progress_bar": False}
            theirs = mteb.evaluate(peer, task, cache=None, co2_tracker=False, encode_kwargs=kwargs).task_results[0].scores["test"][0]
            where = results / "experiments" / f"embed_dim_{width}" if width else results
            ours = json.loads((where / f"{task.metadata.name}.json").read_text())["scores"]["test"][0]
            gaps = {name: abs(value - theirs[name]) for name, value in ours.items() if isinstance(value, float) and not math.isnan(value)}
            name = max(gaps, key=gaps.get)
            worst = max(worst, gaps[name])
            main = f"main score {ours['main_score']:.5f} here, {theirs['main_score']:.5f} there"
            print(f"{task.metadata.name:<20}{dim:>5}  {main}; of {len(gaps)} measures {name} differs most: {gaps[name]:.1e}", flush=True)
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=pathlib.Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dims", default="full")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        worst = compare(flags.model, write_manifest(flags.raw, folder), folder / "out", flags.dims)
    print(f"largest difference {worst:.1e}: {'held' if worst <= BOUND else 'NOT HELD'}")
    return 0 if worst <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
