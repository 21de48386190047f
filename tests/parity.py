"""Replays a parity kit through this project's own encode, objective and update code: `python tests/parity.py KIT`.

A kit is a folder with `student/` and `teacher/` (Hugging Face), `batches.json` (token lists of three task kinds) and
`expected.json` (what the published recipe computes on them in float64). One JSON line is printed per trajectory:
`{"trajectory", "max_rel_loss", "max_rel_grad_norm", "max_rel_param_norm", "max_rel_embedding"}`; exit code 1 if any figure
exceeds 1e-4.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from f2llm_jax import sharding
from f2llm_jax.batch import Batch, Samples
from f2llm_jax.data.packing import RowShape, lay_out
from f2llm_jax.model.chunk_encoder import ChunkEncoder
from f2llm_jax.model.encoder import encode
from f2llm_jax.objectives import ContrastiveConfig, Objective, matryoshka_dims
from f2llm_jax.training.optimizer import OptimizerConfig, make_optimizer
from f2llm_jax.training.step import Teacher, TrainState, by_role, make_train_step
from f2llm_jax.weights import hf_config, hf_reader
from f2llm_jax.weights.hf_mapping import TABLE

TOLERANCE = 1e-4


class Kit:
    """A parity kit, its batches packed into rows."""

    def __init__(self, folder: pathlib.Path, shape: RowShape, mesh: jax.sharding.Mesh | None = None, cached: bool = False):
        """With `cached`, the teacher's vectors come with each batch instead of being made in the step."""
        self.folder, self.shape, self.mesh, self.cached = folder, shape, mesh, cached
        self.batches = json.loads((folder / "batches.json").read_text())["batches"]
        self.expected = json.loads((folder / "expected.json").read_text())
        self.negatives = max(len(row) for batch in self.batches for row in batch["negatives"])
        most = max(len(batch["query"]) for batch in self.batches)
        self.samples = -(-most // sharding.batch_shards(mesh)) * sharding.batch_shards(mesh)

    def model(self, role: str) -> tuple[Any, nnx.State]:
        """`(encode_chunk, params)` of "student" or "teacher" in float32."""
        config = hf_config.read_settings(self.folder / role).decoder
        return ChunkEncoder(config, jnp.float32, "full"), hf_reader.load_params(self.folder / role, config, self.mesh)

    def chunks(self) -> int:
        """The most chunks that a batch takes."""
        return max(int(self.batch(index).texts.chunks) for index in range(len(self.batches)))

    def with_teacher(self, batch: Batch, vectors: Callable[[Any], jax.Array]) -> Batch:
        """The batch with the vectors of its texts, `[B, 2 + N, W]`, as a cache of them would bring them."""
        roles = by_role(jnp.asarray(np.asarray(vectors(batch.texts))), np.asarray(batch.samples.negative_mask))
        stacked = jnp.concatenate([roles.query[:, None], roles.passage[:, None], roles.negatives], axis=1)
        return dataclasses.replace(batch, teacher=sharding.shard(stacked, sharding.P(sharding.BATCH, None, None)))

    def batch(self, index: int) -> Batch:
        """Batch `index` as the training step takes it, padded with masked samples and negatives."""
        raw, B, N = self.batches[index], self.samples, self.negatives
        texts: list[list[int]] = [[] for _ in range(B * (2 + N))]
        sample_mask, negative_mask = np.zeros(B, np.float32), np.zeros((B, N), np.float32)
        for b, (query, passage, negatives) in enumerate(zip(raw["query"], raw["passage"], raw["negatives"], strict=True)):
            texts[b], texts[B + b] = query, passage
            for n, negative in enumerate(negatives):
                texts[2 * B + b * N + n] = negative
            sample_mask[b], negative_mask[b, : len(negatives)] = 1, 1
        packing = self.shape.pack([len(text) for text in texts])
        most = -(-len(texts) // self.shape.chunk_rows)
        packed = lay_out(packing, self.shape, lambda wanted: [np.array(texts[t], np.int32) for t in wanted], chunks=most)
        passage_ids, negative_ids = np.arange(B, dtype=np.int32), np.arange(B, B + B * N, dtype=np.int32).reshape(B, N)
        retrieval = np.float32(raw["task"] == "retrieval")
        batch = Batch(packed, Samples(sample_mask, negative_mask, retrieval, passage_ids, negative_ids))
        return sharding.batch_to_devices(batch, self.mesh)

    def embedding_error(self, role: str) -> float:
        """Largest relative error of an embedding of batch 0 (L2 of the difference over L2 of the expected vector)."""
        encode_chunk, params = self.model(role)
        batch = self.batch(0)
        got = jax.jit(lambda p, t: encode(encode_chunk, p, t, batch.text_count))(params, batch.texts)
        raw, B, N = self.batches[0], self.samples, self.negatives
        b, n = len(raw["query"]), len(raw["negatives"][0])
        rows = [*range(b), *range(B, B + b), *(2 * B + i * N + j for i in range(b) for j in range(n))]
        got, want = np.asarray(got, np.float64)[rows], np.array(self.expected["embeddings_of_batch_0"][role])
        return float(np.max(np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)))

    def replay(self, name: str) -> dict[str, float]:
        """Runs one trajectory and returns its largest relative errors."""
        expected = self.expected["trajectories"][name]
        config = expected["config"]
        encode_chunk, params = self.model("student")
        teacher, teacher_params = self.model("teacher") if config["kd_weight"] else (None, None)
        width = params["norm"].get_value().shape[0]
        contrastive = ContrastiveConfig(
            temperature=config["temperature"],
            dims=matryoshka_dims(width) if config["use_mrl"] else (),
            in_batch_passage_grad=config["in_batch_passage_grad"],
        )
        objective = Objective(contrastive=contrastive, distillation_weight=config["kd_weight"])
        optimizer = OptimizerConfig(
            learning_rate=config["learning_rate"],
            warmup_steps=config["warmup_steps"],
            total_steps=config["total_steps"],
            min_learning_rate=config["min_lr"],
            beta1=config["betas"][0],
            beta2=config["betas"][1],
            epsilon=config["eps"],
            weight_decay=config["weight_decay"],
            clip_norm=config["clip_norm"],
        )
        online = teacher and not self.cached
        step = jax.jit(make_train_step(encode_chunk, objective, optimizer, Teacher(teacher) if online else None))
        texts = self.samples * (2 + self.negatives)
        vectors = jax.jit(lambda rows: encode(teacher, teacher_params, rows, texts))
        state = TrainState(jnp.int32(0), params, jax.jit(make_optimizer(optimizer).init)(params))
        worst = {"loss": 0.0, "grad_norm": 0.0}
        for want in expected["steps"]:
            batch = self.batch(want["step"])
            batch = self.with_teacher(batch, vectors) if teacher and self.cached else batch
            state, metrics = step(state, teacher_params if online else None, batch)
            got = {key: float(mean.value) for key, mean in metrics.items()}
            parts = {"hard": "hard", "in_batch": "in_batch", "kd": "weighted/distillation"}
            losses = [relative(got["loss"], want["loss"])] + [relative(got[ours], want[k]) for k, ours in parts.items() if k in want]
            worst["loss"] = max(worst["loss"], *losses)
            worst["grad_norm"] = max(worst["grad_norm"], relative(got["grad_norm"], want["grad_norm"]))
        norms = tensor_norms(state.params)
        roles = ["student", "teacher"] if teacher else ["student"]
        return {
            "max_rel_loss": worst["loss"],
            "max_rel_grad_norm": worst["grad_norm"],
            "max_rel_param_norm": max(relative(norms[key], want) for key, want in expected["final_param_norms"].items()),
            "max_rel_embedding": max(self.embedding_error(role) for role in roles),
        }


def relative(got: float, want: float) -> float:
    """|got - want| / |want|."""
    return abs(got - want) / max(abs(want), 1e-30)


def tensor_norms(params: nnx.State) -> dict[str, float]:
    """L2 norm of every tensor by its Hugging Face name."""
    norms = {}
    for entry in TABLE:
        leaf = params
        for key in entry.path:
            leaf = leaf[key]
        value = np.asarray(leaf.get_value(), np.float64)
        layers = value if entry.stacked else value[None]
        norms |= {entry.name.format(i=i): float(np.linalg.norm(layer)) for i, layer in enumerate(layers)}
    return norms


def main(argv: list[str]) -> int:
    """Prints one line a trajectory; 0 if all are within tolerance."""
    if len(argv) != 2:
        print("usage: python tests/parity.py KIT", file=sys.stderr)
        return 2
    kit = Kit(pathlib.Path(argv[1]), RowShape(chunk_rows=8, row_tokens=128))
    worst = 0.0
    for name in kit.expected["trajectories"]:
        figures = kit.replay(name)
        worst = max(worst, *figures.values())
        print(json.dumps({"trajectory": name, **figures}), flush=True)
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
