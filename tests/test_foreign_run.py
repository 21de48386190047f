"""A model in Qwen3-Embedding's form through the whole chain: it trains, teaches, mines, and is released again."""

import json
import subprocess

import foreign
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentence_transformers
import small_data
from small_runs import environment, losses, train_command

from f2llm_jax import convert, mine, prepare
from f2llm_jax.inference.encode import load_encoder, truncate_and_normalize
from f2llm_jax.weights.models import find_model

pytestmark = [
    pytest.mark.slow,
    *(pytest.mark.filterwarnings(f"ignore:::{module}") for module in ("tensorflow_datasets", "apache_beam")),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]
PROMPT = "Instruct: Find the passage.\nQuery:"
STEPS, ROWS = 20, 200


def test_qwen3_embedding_trains_teaches_mines_and_is_released(tmp_path):
    model = foreign.qwen3_embedding(tmp_path / "model")
    pairs = {
        "query": [f"{PROMPT}{query}" for query in small_data.raw("pairs")["query"][:ROWS]],
        "passage": small_data.raw("pairs")["passage"][:ROWS],
    }
    (tmp_path / "pairs").mkdir()
    pq.write_table(pa.table(pairs), tmp_path / "pairs/pairs.parquet")

    mined = ["--model", model, "--queries", tmp_path / "pairs/pairs.parquet", "--out", tmp_path / "raw", "--max-score", "none"]
    assert mine.main([str(part) for part in (*mined, "--max-relative", "none", "--near-duplicate", "2")]) == 0
    found = pq.read_table(next((tmp_path / "raw").glob("*.parquet"))).to_pydict()
    assert set(found["negative_1"]) <= set(pairs["passage"]) and len(set(found["negative_1"])) > 10
    assert set(found["negative_1"]).isdisjoint({""})
    peer = sentence_transformers.SentenceTransformer(str(model), device="cpu")
    cosines = (peer.encode(found["query"][:40]) * peer.encode(found["negative_1"][:40])).sum(1)
    np.testing.assert_allclose([scores[1] for scores in found["scores"][:40]], cosines, atol=2e-3)  # vectors are stored in float16

    (tmp_path / "raw/tasks.json").write_text(json.dumps({"pairs": "retrieval"}))
    prepared = ["--raw", tmp_path / "raw", "--tokenizer", model, "--out", tmp_path / "data", "--max-length", "48", "--workers", "1"]
    assert prepare.main([str(part) for part in prepared]) == 0
    command = train_command(tmp_path / "data", tmp_path / "run", init=model, teacher=model, steps=STEPS)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run").keys() and all(np.isfinite(list(losses(tmp_path / "run").values())))

    assert convert.main(["to-hf", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    released = find_model(str(tmp_path / "out"))
    assert released.embedding.query_prompt == PROMPT and released.text_limit == 48
    assert released.tokenizer.decode([released.tokenizer.end_id]) == "<|endoftext|>"
    texts = pairs["passage"][:40]
    trained = truncate_and_normalize(load_encoder(find_model(str(tmp_path / "run"))).encode(texts), 64)
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(texts)
    assert (trained * theirs).sum(1).min() >= 0.99999
    before = truncate_and_normalize(load_encoder(find_model(str(model)), max_length=48).encode(texts), 64)
    assert (trained * before).sum(1).min() < 0.999  # it did train
