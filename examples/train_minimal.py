"""An embedding model trained on one screen: no configuration, no checkpoints, one device.

    python examples/train_minimal.py [--steps 300]

Everything that `f2llm_jax.main` does is here in small: names of countries, languages and currencies in 250 languages are matched with
their English names. Texts of all lengths are packed into rows, a Qwen3 decoder reads the rows, the hidden state of a text's last token is
its embedding, and a contrastive loss pulls the two sides of a pair together. Needs `pip install -e '.[demo]'`; a minute or two on a CPU.
"""

import argparse
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow.parquet as pq

from f2llm_jax.data.packing import RowShape, lay_out
from f2llm_jax.model.chunk_encoder import ChunkEncoder
from f2llm_jax.model.decoder import init_decoder
from f2llm_jax.model.encoder import encode, value_and_grad
from f2llm_jax.model.sizes import DecoderConfig
from f2llm_jax.preparation import demo_corpus
from f2llm_jax.text import load_tokenizer

PAIRS = 128  # a step: each query is compared with the documents of all
MAX_LENGTH = 64  # tokens of a text
TEMPERATURE = 0.05
CHUNKS = 8  # that a batch may take at most; only those in use are computed
SHAPE = RowShape(chunk_rows=16, row_tokens=128, row_texts=32, group_chunks=CHUNKS)


def read_corpus(folder: pathlib.Path):
    """Token ids of training and held-out pairs, `(queries, documents)` each; a document is the English name."""
    demo_corpus.build(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    pairs = []
    for file, query, document in (("raw/cldr_bitext", "query", "passage"), ("heldout/bitext", "query", "document")):
        table = pq.read_table(folder / f"{file}.parquet", columns=[query, document])
        # Bitext needs no instruction: a query is the name alone.
        queries = [text.split("\nQuery: ")[-1] for text in table[query].to_pylist()]
        pairs.append((tokenizer.encode(queries, MAX_LENGTH), tokenizer.encode(table[document].to_pylist(), MAX_LENGTH)))
    return tokenizer.vocab_size, *pairs


def pack(texts):
    """Token ids of texts as the arrays of a step: rows of `SHAPE`, several texts in each, and where each text ends."""
    packing = SHAPE.pack([len(ids) for ids in texts])
    return lay_out(packing, SHAPE, lambda wanted: [texts[i] for i in wanted], chunks=CHUNKS)


def contrastive_loss(same_document):
    """InfoNCE over the batch; `same_document` `[PAIRS, PAIRS]` is 1 where another pair has the same document, which is no negative."""

    def loss(embeddings):  # [2 * PAIRS, D]: queries, then documents
        unit = embeddings / jnp.linalg.norm(embeddings, axis=-1, keepdims=True)
        scores = unit[:PAIRS] @ unit[PAIRS:].T / TEMPERATURE
        scores = jnp.where((same_document > 0) & ~jnp.eye(PAIRS, dtype=bool), -jnp.inf, scores)
        return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(scores))), None

    return loss


def recall_at_1(embed, queries, documents):
    """How many queries have their document nearest among all distinct ones."""
    number = {ids: i for i, ids in enumerate(dict.fromkeys(map(tuple, documents)))}
    target = np.array([number[tuple(ids)] for ids in documents])
    texts = [*queries, *(np.array(ids, np.int32) for ids in number)]
    blocks = [texts[i : i + 2 * PAIRS] for i in range(0, len(texts), 2 * PAIRS)]
    vectors = np.concatenate([embed(pack(block + [block[0]] * (2 * PAIRS - len(block)))) for block in blocks])[: len(texts)]
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    return float(np.mean(np.argmax(vectors[: len(queries)] @ vectors[len(queries) :].T, axis=1) == target))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--held-out", type=int, default=2000, help="queries that recall is measured on")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        vocab_size, (queries, documents), held_out = read_corpus(pathlib.Path(folder))
    config = DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    params = init_decoder(config, seed=0)
    encoder = ChunkEncoder(config, jnp.float32, remat="dots")
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 5e-3, flags.steps // 10, flags.steps), b2=0.98, weight_decay=0.01)

    @jax.jit
    def step(params, state, texts, same_document):
        (loss, _), gradients = value_and_grad(contrastive_loss(same_document), encoder, params, texts, 2 * PAIRS)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    embed = jax.jit(lambda params, texts: encode(encoder, params, texts, 2 * PAIRS))
    chosen = np.random.default_rng(0).permutation(len(held_out[0]))[: flags.held_out]
    held_out = [[side[i] for i in chosen] for side in held_out]
    print(f"recall@1 before training {recall_at_1(lambda texts: np.array(embed(params, texts)), *held_out):.4f}", flush=True)
    rng, state = np.random.default_rng(0), optimizer.init(params)
    for number in range(1, flags.steps + 1):
        rows = rng.choice(len(queries), PAIRS, replace=False)
        texts = [queries[i] for i in rows] + [documents[i] for i in rows]
        same = np.array([[np.array_equal(documents[i], documents[j]) for j in rows] for i in rows], np.float32)
        params, state, loss = step(params, state, pack(texts), same)
        if number % 50 == 0 or number == flags.steps:
            print(f"step {number}/{flags.steps}  loss {loss:.4f}", flush=True)
    print(f"recall@1 after training {recall_at_1(lambda texts: np.array(embed(params, texts)), *held_out):.4f}")


if __name__ == "__main__":
    main()
