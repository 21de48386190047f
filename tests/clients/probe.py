"""One client encodes texts with a release, in an environment of its own: `python probe.py CLIENT JOB.json OUT.json`.

Each function below is used the way the model card tells. Nothing of this project is imported: the environments do not have it.
"""

import importlib.metadata
import json
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

Vectors = Sequence[Sequence[float]]
Encode = Callable[[list[str], bool], Vectors]  # (texts, whether they are queries)
Loaded = tuple[Encode, list[str]]  # and the packages whose versions matter
STARTS_WITHIN = 300  # seconds


def sentence_transformers(folder: str, prompt: str) -> Loaded:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu")

    def encode(texts: list[str], query: bool) -> Vectors:
        return model.encode(texts, prompt_name="query") if query else model.encode(texts)

    return encode, ["sentence-transformers", "transformers"]


def last_token(mask: Any) -> Any:
    """Where each text of a padded batch ends, on whichever side the padding is."""
    return mask.shape[1] - 1 - mask.flip(1).argmax(1)


def transformers(folder: str, prompt: str) -> Loaded:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)

    def encode(texts: list[str], query: bool) -> Vectors:
        inputs = tokenizer([prompt * query + text for text in texts], padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state
        last = last_token(inputs.attention_mask)
        return torch.nn.functional.normalize(hidden[torch.arange(len(last)), last], dim=-1).numpy()

    return encode, ["transformers"]


def onnx(folder: str, prompt: str) -> Loaded:
    """The exported graph wants positions, which sentence-transformers does not give it."""
    import torch
    from optimum.onnxruntime import ORTModelForFeatureExtraction
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), ORTModelForFeatureExtraction.from_pretrained(folder, export=True)

    def encode(texts: list[str], query: bool) -> Vectors:
        inputs = tokenizer([prompt * query + text for text in texts], padding=True, truncation=True, return_tensors="pt")
        mask = inputs.attention_mask
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        hidden = model(input_ids=inputs.input_ids, attention_mask=mask, position_ids=positions).last_hidden_state
        return torch.nn.functional.normalize(hidden[torch.arange(len(mask)), last_token(mask)], dim=-1).numpy()

    return encode, ["optimum-onnx", "onnxruntime", "transformers"]


def openvino(folder: str, prompt: str) -> Loaded:
    from sentence_transformers import SentenceTransformer

    exact = {"export": True, "ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}  # half precision by default
    model = SentenceTransformer(folder, device="cpu", backend="openvino", model_kwargs=exact)

    def encode(texts: list[str], query: bool) -> Vectors:
        return model.encode(texts, prompt_name="query") if query else model.encode(texts)

    return encode, ["openvino", "optimum-intel", "sentence-transformers", "transformers"]


def infinity(folder: str, prompt: str) -> Loaded:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(pathlib.Path(sys.executable).parent / "infinity_emb"),
        "v2",
        "--model-id",
        folder,
        "--device",
        "cpu",
        "--engine",
        "torch",
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), "--no-bettertransformer", "--no-model-warmup", "--served-model-name", "release"]
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the server)
    server = subprocess.Popen([*command, "--dtype", "float32"], stdout=log, stderr=log)
    address, started = f"http://127.0.0.1:{port}", time.monotonic()
    while True:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5)
            break
        except (urllib.error.URLError, OSError):
            if server.poll() is not None or time.monotonic() - started > STARTS_WITHIN:
                server.kill()
                log.seek(0)
                raise RuntimeError(f"the server did not start: {log.read()[-600:]}") from None
            time.sleep(1)

    def encode(texts: list[str], query: bool) -> Vectors:
        body = json.dumps({"model": "release", "input": [prompt * query + text for text in texts]}).encode()
        request = urllib.request.Request(f"{address}/embeddings", body, {"Content-Type": "application/json"})
        return [one["embedding"] for one in json.load(urllib.request.urlopen(request, timeout=300))["data"]]

    encode.close = server.kill  # type: ignore[attr-defined]
    return encode, ["infinity-emb", "sentence-transformers", "transformers"]


def llama_cpp(kind: str) -> Callable[[str, str], Loaded]:
    """Converted by llama.cpp's own converter; of a vocabulary that it does not know the pre-tokenizer is named for it: Qwen2's."""

    def load(folder: str, prompt: str) -> Loaded:
        import llama_cpp as binding

        source = pathlib.Path(sys.prefix) / "llama.cpp"
        out = tempfile.mkdtemp() + f"/{kind}.gguf"
        convert = (
            "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); import os; os.chdir(sys.path[0])\n"
            "try:\n    from conversion.base import TextModel as Model\n"
            "except ImportError:\n    Model = None\n"
            "name, known = 'get_vocab_base_pre', getattr(Model, 'get_vocab_base_pre', None)\n"
            "def named(self, tokenizer):\n    try:\n        return known(self, tokenizer)\n"
            "    except NotImplementedError:\n        return 'qwen2'\n"
            "setattr(Model, name, named) if Model else None\n"
            "sys.argv[0] = 'convert_hf_to_gguf.py'\n"
            "runpy.run_path('convert_hf_to_gguf.py', run_name='__main__')\n"
        )
        command = [sys.executable, "-c", convert, str(source), folder, "--outfile", out, "--outtype", kind]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the converter failed: {done.stderr[-600:]}")
        model = binding.Llama(out, embedding=True, n_ctx=0, n_batch=4096, n_ubatch=4096, verbose=False)

        def encode(texts: list[str], query: bool) -> Vectors:
            return [model.embed(prompt * query + text, normalize=True) for text in texts]

        return encode, ["llama-cpp-python"]

    return load


def haystack(folder: str, prompt: str) -> Loaded:
    from haystack import Document
    from haystack_integrations.components.embedders.sentence_transformers import (
        SentenceTransformersDocumentEmbedder,
        SentenceTransformersTextEmbedder,
    )

    queries = SentenceTransformersTextEmbedder(model=folder, prefix=prompt)
    documents = SentenceTransformersDocumentEmbedder(model=folder)
    for one in (queries, documents):
        one.warm_up()

    def encode(texts: list[str], query: bool) -> Vectors:
        if query:
            return [queries.run(text)["embedding"] for text in texts]
        return [one.embedding for one in documents.run([Document(content=text) for text in texts])["documents"]]

    return encode, ["haystack-ai", "sentence-transformers-haystack", "sentence-transformers"]


def langchain(folder: str, prompt: str) -> Loaded:
    from langchain_huggingface import HuggingFaceEmbeddings

    model = HuggingFaceEmbeddings(model_name=folder, query_encode_kwargs={"prompt_name": "query"})

    def encode(texts: list[str], query: bool) -> Vectors:
        return [model.embed_query(text) for text in texts] if query else model.embed_documents(texts)

    return encode, ["langchain-huggingface", "sentence-transformers"]


def llama_index(folder: str, prompt: str) -> Loaded:
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    model = HuggingFaceEmbedding(model_name=folder, query_instruction=prompt, device="cpu")

    def encode(texts: list[str], query: bool) -> Vectors:
        return [model.get_query_embedding(text) for text in texts] if query else model.get_text_embedding_batch(texts)

    return encode, ["llama-index-embeddings-huggingface", "sentence-transformers"]


def chroma(folder: str, prompt: str) -> Loaded:
    from chromadb.utils.embedding_functions import SentenceTransformerEmbeddingFunction

    model = SentenceTransformerEmbeddingFunction(model_name=folder)

    def encode(texts: list[str], query: bool) -> Vectors:
        return model([prompt * query + text for text in texts])

    return encode, ["chromadb", "sentence-transformers"]


def txtai(folder: str, prompt: str) -> Loaded:
    from txtai import Embeddings

    model = Embeddings(path=folder, method="sentence-transformers")

    def encode(texts: list[str], query: bool) -> Vectors:
        return [model.transform(text, "query" if query else "data") for text in texts]

    return encode, ["txtai", "sentence-transformers"]


def mteb(folder: str, prompt: str) -> Loaded:
    from mteb.models import SentenceTransformerEncoderWrapper

    wrapper = SentenceTransformerEncoderWrapper(folder, device="cpu")

    def encode(texts: list[str], query: bool) -> Vectors:
        from datasets import Dataset
        from mteb import get_task
        from mteb.types import PromptType
        from torch.utils.data import DataLoader

        loader = DataLoader(Dataset.from_dict({"text": texts}), batch_size=4)
        kind = PromptType.query if query else PromptType.document
        return wrapper.encode(loader, task_metadata=get_task("SciFact").metadata, hf_split="test", hf_subset="default", prompt_type=kind)

    return encode, ["mteb", "sentence-transformers"]


CLIENTS = {
    "sentence-transformers": sentence_transformers,
    "transformers": transformers,
    "onnx": onnx,
    "openvino": openvino,
    "infinity": infinity,
    "llama.cpp-f32": llama_cpp("f32"),
    "llama.cpp-q8_0": llama_cpp("q8_0"),
    "haystack": haystack,
    "langchain": langchain,
    "llama-index": llama_index,
    "chroma": chroma,
    "txtai": txtai,
    "mteb": mteb,
}


def main(client: str, job_file: str, out: str) -> None:
    job = json.loads(pathlib.Path(job_file).read_text())
    encode, packages = CLIENTS[client](job["folder"], job["prompt"])
    try:
        vectors = {}
        for name, texts in job["texts"].items():
            vectors[name] = [[float(x) for x in vector] for vector in encode(texts, name == "queries")]
    finally:
        getattr(encode, "close", lambda: None)()
    versions = {package: importlib.metadata.version(package) for package in packages}
    pathlib.Path(out).write_text(json.dumps({"versions": versions, "vectors": vectors}))


if __name__ == "__main__":
    main(*sys.argv[1:])
