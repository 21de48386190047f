"""Real texts through a release, here and in sentence-transformers and transformers: the worst cosine of every way to encode.

    python tests/benchmarks/agreement.py --model FOLDER --raw DIR

DIR holds parquet files in the raw layout (`query`, `passage`); 200 of their texts are drawn, from all files alike. Batched and
singly, as documents and as queries, whole and cut at 16 tokens, full width and the narrowest matryoshka width. Exit code 1
if any is below 0.99999 (a release in float32) or 0.999 (bfloat16).
"""

import argparse
import json
import pathlib
import random
import sys

import pyarrow.parquet as pq
import sentence_transformers
import torch
import transformers

from f2llm_jax import text
from f2llm_jax.inference.encode import load_encoder, truncate_and_normalize
from f2llm_jax.weights.models import find_model

TEXTS = 200
CUT = 16
BATCH = 16


def sample(raw):
    files = sorted(raw.glob("*.parquet"))
    rng = random.Random(0)
    texts = []
    for i in range(TEXTS):
        table = pq.read_table(files[i % len(files)], columns=["query", "passage"])
        texts.append(text.strip_instruction(table[("query", "passage")[i // len(files) % 2]][rng.randrange(len(table))].as_py()))
    return texts


def with_transformers(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def encode(texts, prompt, limit, batch):
        vectors = []
        for start in range(0, len(texts), batch):
            texts_with = [prompt + one for one in texts[start : start + batch]]
            inputs = tokenizer(texts_with, padding=True, truncation=True, max_length=limit, return_tensors="pt")
            hidden = model(**inputs).last_hidden_state
            if tokenizer.padding_side == "left":  # as the card of Qwen3-Embedding has it
                pooled = hidden[:, -1]
            else:
                pooled = hidden[torch.arange(len(hidden)), inputs["attention_mask"].sum(1) - 1]
            vectors.append(pooled.float())
        return torch.cat(vectors).numpy()

    return encode


def with_sentence_transformers(folder, dim):
    model = sentence_transformers.SentenceTransformer(folder, device="cpu", truncate_dim=dim)

    def encode(texts, prompt, limit, batch):
        model.max_seq_length = limit
        name = "query" if prompt else "document"
        return model.encode(texts, prompt_name=name, batch_size=batch, show_progress_bar=False)

    return encode


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--raw", type=pathlib.Path, required=True)
    flags = parser.parse_args()
    texts = sample(flags.raw)
    origin = find_model(flags.model)
    dtype = json.loads((pathlib.Path(flags.model) / "config.json").read_text())["dtype"]
    required = 0.99999 if dtype == "float32" else 0.999
    narrow = origin.embedding.matryoshka_dims[0]
    peers = {
        "transformers": (with_transformers(flags.model), None),
        "sentence-transformers": (with_sentence_transformers(flags.model, None), None),
        f"sentence-transformers, truncate_dim={narrow}": (with_sentence_transformers(flags.model, narrow), narrow),
    }
    query = text.query_prompt(text.DEFAULT_QUERY_INSTRUCTION)
    worst = 1.0
    for limit in (origin.text_limit, CUT):
        encoder = load_encoder(origin, max_length=limit)
        for kind, prompt in {"documents": "", "queries": query}.items():
            ours = encoder.encode(texts, prompt)
            for name, (encode, dim) in peers.items():
                for batch in (BATCH, 1):
                    theirs = encode(texts, prompt, limit, batch)
                    width = dim or ours.shape[1]
                    assert theirs.shape[1] == width
                    cosine = float((truncate_and_normalize(ours, width) * truncate_and_normalize(theirs, width)).sum(1).min())
                    worst = min(worst, cosine)
                    print(f"{name:<42}{kind:<11}limit {limit:<6}batch {batch:<4}worst cosine {cosine:.8f}", flush=True)
    print(f"{len(texts)} texts, {dtype}: worst cosine {worst:.8f}, required {required}: {'held' if worst >= required else 'NOT HELD'}")
    return 0 if worst >= required else 1


if __name__ == "__main__":
    sys.exit(main())
