"""A release in everybody's software: `make clients`, or `python tests/clients/run.py [--release FOLDER] [--only CLIENT ...]`.

Each client gets an environment of its own under --environments, made once, and encodes documents, queries and a text beyond the limit
the way the model card tells (probe.py). Printed, and written to --table, is the worst cosine with this project's vectors.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile

import numpy as np

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

TORCH = "torch==2.13.0"  # an unpinned one brings gigabytes of CUDA
TRANSFORMERS_4 = "transformers==4.57.*"
REQUIRED = {"llama.cpp-q8_0": 0.99}  # of the others 0.99999
DEFAULT_REQUIRED = 0.99999
MINUTES = 20  # of one client


@dataclasses.dataclass(frozen=True)
class Client:
    """A row of the table."""

    label: str
    probe: str  # a key of probe.CLIENTS
    environment: str  # a key of ENVIRONMENTS
    how: str  # as the card tells it
    skipped: tuple[str, ...] = ()  # groups of texts that it cannot be asked for
    note: str = ""


ENVIRONMENTS = {
    "st2": ("sentence-transformers==2.7.0", TRANSFORMERS_4),
    "st3": ("sentence-transformers==3.4.1", TRANSFORMERS_4),
    "st5": ("sentence-transformers==5.1.2", TRANSFORMERS_4),
    "st6": ("sentence-transformers==6.2.0", "transformers==5.24.0", "mteb==2.26.24"),
    "frameworks": (
        "sentence-transformers>=6.2,<7", "haystack-ai", "sentence-transformers-haystack", "langchain-huggingface",
        "llama-index-embeddings-huggingface", "chromadb", "txtai",
    ),
    "infinity": ("infinity-emb[torch,server]==0.0.77", "click<8.2"),
    "onnx": ("optimum-onnx[onnxruntime]", TRANSFORMERS_4),
    "openvino": ("optimum-intel[openvino]", "sentence-transformers==5.1.2"),
    "llamacpp": (TRANSFORMERS_4, "sentencepiece", "gguf", "scikit-build-core", "llama-cpp-python"),
}  # fmt: skip
NAMED = "encode(queries, prompt_name='query')"
CLIENTS = (
    Client("sentence-transformers 2", "sentence-transformers", "st2", NAMED),
    Client("sentence-transformers 3", "sentence-transformers", "st3", NAMED),
    Client("sentence-transformers 5", "sentence-transformers", "st5", NAMED),
    Client("sentence-transformers 6", "sentence-transformers", "st6", NAMED),
    Client("transformers 4", "transformers", "st5", "the card's snippet, prompt before queries"),
    Client("transformers 5", "transformers", "st6", "the card's snippet, prompt before queries"),
    Client("mteb", "mteb", "st6", "SentenceTransformerEncoderWrapper(folder)"),
    Client("infinity", "infinity", "infinity", "a server; the prompt before queries is the caller's"),
    Client("llama.cpp, f32", "llama.cpp-f32", "llamacpp", "embed(prompt + query), last-token pooling from the file", ("long",)),
    Client("llama.cpp, q8_0", "llama.cpp-q8_0", "llamacpp", "embed(prompt + query), last-token pooling from the file", ("long",)),
    Client("Haystack", "haystack", "frameworks", "SentenceTransformersTextEmbedder(model, prefix=prompt)"),
    Client("LangChain", "langchain", "frameworks", "HuggingFaceEmbeddings(query_encode_kwargs={'prompt_name': 'query'})"),
    Client("LlamaIndex", "llama-index", "frameworks", "HuggingFaceEmbedding(query_instruction=prompt)"),
    Client("Chroma", "chroma", "frameworks", "SentenceTransformerEmbeddingFunction; the prompt before queries is the caller's"),
    Client("txtai", "txtai", "frameworks", "Embeddings(path=folder, method='sentence-transformers')"),
    Client("ONNX Runtime", "onnx", "onnx", "ORTModelForFeatureExtraction with position_ids, last token"),
    Client("OpenVINO", "openvino", "openvino", "SentenceTransformer(backend='openvino'), INFERENCE_PRECISION_HINT f32"),
)


def environment(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The interpreter of an environment, which is made if it is not there."""
    python, made = folder / name / "bin/python", folder / name / ".made"
    if not made.exists():
        subprocess.run([sys.executable, "-m", "venv", folder / name], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, TORCH], check=True)
        subprocess.run([*pip, TORCH, *ENVIRONMENTS[name]], check=True)
        if name == "openvino":  # comes with a torchvision of CUDA's PyTorch, at which transformers fails; nothing here reads pictures
            subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"], check=True)
        if name == "llamacpp":
            _converter(folder / name)
        made.touch()
    return python


def _converter(environment: pathlib.Path) -> None:
    """llama.cpp's own converter, which only the source of its Python binding carries."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [environment / "bin/python", "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--dest", folder, "--no-build-isolation", "llama-cpp-python"], check=True)
        with tarfile.open(next(pathlib.Path(folder).glob("*.tar.gz"))) as archive:
            members = [m for m in archive.getmembers() if "/vendor/llama.cpp/" in m.name and m.name.endswith((".py", ".txt", ".jinja"))]
            archive.extractall(folder, members, filter="data")
        next(pathlib.Path(folder).glob("*/vendor/llama.cpp")).rename(environment / "llama.cpp")


def job(release: str) -> tuple[dict, dict[str, np.ndarray]]:
    """What every client is asked for, and this project's answers, float32 `[S, K]` at length 1."""
    from f2llm_jax.inference.encode import load_encoder, truncate_and_normalize
    from f2llm_jax.release.golden import TEXTS
    from f2llm_jax.weights.models import find_model

    model = find_model(release)
    encoder, prompt = load_encoder(model), model.embedding.query_prompt
    short = [
        text
        for text in TEXTS
        if text and "\n" not in text and len(model.matching_tokenizer().encode([prompt + text], 10**9)[0]) <= model.text_limit
    ]
    texts = {"documents": short, "queries": short, "long": ["the quick brown fox jumps over it " * model.text_limit]}
    answers = {
        name: truncate_and_normalize(encoder.encode(group, prompt if name == "queries" else ""), model.width)
        for name, group in texts.items()
    }
    return {"folder": str(pathlib.Path(release).resolve()), "prompt": prompt, "texts": texts}, answers


def ask(client: Client, python: pathlib.Path, asked: dict, answers: dict[str, np.ndarray]) -> tuple[dict[str, float], str]:
    """The worst cosine of each group of texts, and the versions; or nothing and the reason."""
    asked = {**asked, "texts": {name: texts for name, texts in asked["texts"].items() if name not in client.skipped}}
    with tempfile.TemporaryDirectory() as folder:
        job_file, out = pathlib.Path(folder) / "job.json", pathlib.Path(folder) / "out.json"
        job_file.write_text(json.dumps(asked))
        settings = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "DO_NOT_TRACK": "1",
            "INFINITY_ANONYMOUS_USAGE_STATS": "0",
        }
        settings.pop("PYTHONPATH", None)
        command = [python, HERE / "probe.py", client.probe, job_file, out]
        try:
            done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=60 * MINUTES, cwd=folder)
        except subprocess.TimeoutExpired:
            return {}, f"no answer within {MINUTES} minutes"
        if done.returncode:
            return {}, done.stderr.strip().splitlines()[-1][:200]
        found = json.loads(out.read_text())
    cosines = {}
    for name, vectors in found["vectors"].items():
        theirs = np.asarray(vectors, np.float64)[:, : answers[name].shape[1]]
        theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
        cosines[name] = float((theirs * answers[name]).sum(1).min())
    return cosines, ", ".join(f"{package} {version}" for package, version in found["versions"].items())


def row(client: Client, cosines: dict[str, float], told: str) -> str:
    cells = [
        f"{cosines[name]:.7f}" if name in cosines else "not asked" if name in client.skipped else "-"
        for name in ("documents", "queries", "long")
    ]
    versions = told if cosines else f"**not run**: {told}"
    return f"| {client.label} | {versions} | {' | '.join(cells)} | `{client.how}` |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", help="folder of `convert to-hf` (default: a small one of random weights)")
    parser.add_argument("--environments", type=pathlib.Path, default=HERE.parents[1] / "build/clients", help="default build/clients")
    parser.add_argument("--only", nargs="+", default=[], choices=[client.probe for client in CLIENTS], metavar="CLIENT")
    parser.add_argument("--table", type=pathlib.Path, help="Markdown file whose table is replaced, such as docs/clients.md")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        asked, answers = job(flags.release or small_release(pathlib.Path(folder)))
        lines, bad = [], 0
        for client in CLIENTS:
            if flags.only and client.probe not in flags.only:
                continue
            try:
                cosines, told = ask(client, environment(flags.environments, client.environment), asked, answers)
            except subprocess.CalledProcessError as error:
                cosines, told = {}, f"its packages could not be installed ({error.cmd[-1]})"
            bad += any(cosine < REQUIRED.get(client.probe, DEFAULT_REQUIRED) for cosine in cosines.values())
            lines.append(row(client, cosines, told))
            print(lines[-1], flush=True)
    if flags.table:
        write_table(flags.table, lines)
    return int(bad > 0)


def small_release(folder: pathlib.Path) -> str:
    """Random weights with a tokenizer of Qwen3's form, which llama.cpp can be told of."""
    import tiny

    from f2llm_jax.release import hf_folder
    from f2llm_jax.text import load_tokenizer

    tokenizer = load_tokenizer(tiny.write_tokenizer(folder / "tokenizer", form="qwen"))
    hf_folder.export(tiny.origin(folder / "unused", tokenizer=tokenizer, max_length=256), folder / "release", hf_folder.ReleaseForm())
    return str(folder / "release")


def write_table(path: pathlib.Path, lines: list[str]) -> None:
    begin, end = "<!-- table -->\n", "<!-- end of table -->\n"
    head = ["| client | versions | documents | queries | a text beyond the limit | called as |", "|---|---|---|---|---|---|"]
    made = "\n".join([f"Measured on {datetime.date.today()}.\n", *head, *lines]) + "\n"
    before, _, rest = path.read_text().partition(begin)
    path.write_text(before + begin + made + end + rest.partition(end)[2])


if __name__ == "__main__":
    sys.exit(main())
