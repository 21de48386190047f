"""Texts to raw embeddings with a finished model, by a handful of programs of fixed shape.

Short texts are packed into short rows, because a row pays for attention over its whole length; a text that does not fit goes
to the next longer row length. Each row length is one compiled program, and one that no text needs is never compiled.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from f2llm_jax import sharding
from f2llm_jax.cli.progress import ProgressCallback
from f2llm_jax.data.packing import RowShape, lay_out
from f2llm_jax.errors import UserError
from f2llm_jax.inference.by_layer import check_ids
from f2llm_jax.model import attention
from f2llm_jax.model.chunk_encoder import ChunkEncoder
from f2llm_jax.model.sizes import DecoderConfig
from f2llm_jax.text import Tokenizer, truncate
from f2llm_jax.weights.models import LoadableModel

ROW_TOKENS = (128, 256, 512, 2048)  # and the longest text, if longer
ROW_TEXTS = 32  # most texts in the shortest row
CHUNK_TOKENS = {"cpu": 1024}  # encoded at once; fastest of 1024, 2048, 4096 on two cores, and least wasted on a few texts
CHUNK_TOKENS_ACCELERATOR = 32_768
NO_LIMIT = 2**31 - 1  # tokens
BLOCK_TEXTS = 4096  # tokenised and packed together; bounds the host's memory


class TextEncoder:
    """A model that turns texts into embeddings."""

    def __init__(
        self,
        config: DecoderConfig,
        params: nnx.State,
        tokenizer: Tokenizer,
        max_length: int,
        *,
        dtype: jnp.dtype = jnp.float32,
        mesh: jax.sharding.Mesh | None = None,
        chunk_tokens: int | None = None,
        width: int | None = None,
    ):
        """Compiles nothing yet.

        Args:
          config: the decoder's shape.
          params: its parameters, on the mesh if there is one.
          tokenizer: of the model.
          max_length: tokens, EOS included, at which a text is cut.
          dtype: compute dtype.
          mesh: as for training; None for one device.
          chunk_tokens: tokens encoded at once, which is memory and nothing else; chosen by the kind of device if None.
          width: first dimensions to give (D below); all if None.
        """
        self.width = width or config.hidden_size
        self._config, self.dtype = config, jnp.dtype(dtype)
        self.max_length = max_length
        self.truncated = 0  # texts so far that were longer
        self._tokenizer = tokenizer
        self._mesh = mesh
        # float32 means it: accelerators multiply float32 matrices in fewer bits unless told otherwise.
        self._precision = "highest" if dtype == jnp.float32 else None
        self._params = jax.tree.map(lambda x: x.astype(dtype), params)
        self._shapes = _row_shapes(max_length, chunk_tokens or _default_chunk_tokens(), sharding.batch_shards(mesh))

    def encode(self, texts: Sequence[str], prompt: str = "", report: ProgressCallback | None = None) -> Float[np.ndarray, "S D"]:
        """Raw embeddings, float32 `[S, D]`, of `prompt + text` for each text, in the order given."""
        embeddings, done = np.empty((len(texts), self.width), np.float32), 0
        for vectors in self.encode_blocks(texts, prompt):
            embeddings[done : done + len(vectors)] = vectors
            done += len(vectors)
            if report:
                report(done, len(texts))
        return embeddings

    def encode_blocks(self, texts: Sequence[str], prompt: str = "") -> Iterator[Float[np.ndarray, "S D"]]:
        """What `encode` gives, `BLOCK_TEXTS` texts at a time; the next block is tokenised while the device encodes this one."""
        if isinstance(texts, str):
            raise TypeError("texts is one string; pass a list of texts, or use f2llm_jax.api.load, whose encode takes both")

        def tokenised(start: int) -> list[np.ndarray]:
            whole = self._tokenizer.encode([prompt + text for text in texts[start : start + BLOCK_TEXTS]], NO_LIMIT)
            self.truncated += sum(len(ids) > self.max_length for ids in whole)
            return [truncate(ids, self.max_length, self._tokenizer.end_id) for ids in whole]

        with futures.ThreadPoolExecutor(1) as thread:
            following = thread.submit(tokenised, 0)
            for start in range(0, len(texts), BLOCK_TEXTS):
                ids = following.result()
                if start + BLOCK_TEXTS < len(texts):
                    following = thread.submit(tokenised, start + BLOCK_TEXTS)
                yield self.encode_ids(ids)

    def encode_ids(self, ids: list[np.ndarray]) -> Float[np.ndarray, "S D"]:
        """Raw embeddings, float32 `[S, D]`, of token ids (int32, EOS last, at most `max_length`), in the order given."""
        embeddings = np.empty((len(ids), self.width), np.float32)
        for numbers, vectors in _one_late(self._encoded(ids)):
            embeddings[numbers] = vectors()[:, : self.width]
        if len(wrong := np.flatnonzero(~np.isfinite(embeddings).all(axis=1))):
            text = self._tokenizer.decode(ids[wrong[0]])
            raise UserError(f"the model's vector of {text[:80]!r} is not finite; compute in float32, or check the model's weights")
        return embeddings

    def _encoded(self, ids: list[np.ndarray]) -> Iterator[tuple[np.ndarray, Callable[[], np.ndarray]]]:
        """Chunk by chunk: the numbers of its texts, and a function that waits for the device and returns their embeddings."""
        lengths = np.array([len(i) for i in ids])
        check_ids(np.concatenate(ids) if ids else np.empty(0, np.int32), self._config)
        row_length = np.searchsorted([shape.row_tokens for shape in self._shapes], lengths)
        for k, shape in enumerate(self._shapes):
            members = np.flatnonzero(row_length == k)
            if not len(members):
                continue
            packed = lay_out(shape.pack(lengths[members]), shape, lambda which, members=members: [ids[i] for i in members[which]])  # type: ignore[misc]
            for c in range(int(packed.chunks)):
                used = packed.text[c] < len(members)
                pooled = self._run(packed.token_ids[c], packed.positions[c], packed.segment_ids[c], packed.last[c])
                yield members[packed.text[c][used]], lambda pooled=pooled, used=used: np.asarray(pooled)[used]  # type: ignore[misc]

    def _run(self, *rows: np.ndarray) -> jax.Array:
        in_mesh = jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext()
        with in_mesh, jax.default_matmul_precision(self._precision):
            if self._mesh:
                placed = [sharding.to_global(array, self._mesh, sharding.ROWS_T) for array in rows]
                return _program(self._config, self.dtype, self._params, *placed)
            return _program(self._config, self.dtype, self._params, *rows)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _program(config: DecoderConfig, dtype: jnp.dtype, params: nnx.State, *rows: Int[Array, "M _"]) -> Float[Array, "M X D"]:
    """Embeddings of one chunk. Not a method, so that encoders of one shape share what is compiled."""
    kernel = attention.choose_kernel("auto", jax.default_backend(), dtype, rows[0].shape[1], config.head_dim)
    encoder = ChunkEncoder(config, dtype, kernel=kernel)
    return sharding.shard(encoder(params, *rows), sharding.P(None, None, None))  # every host can read the result


def load_encoder(origin: LoadableModel, *, max_length: int | None = None, mesh: jax.sharding.Mesh | None = None, **options) -> TextEncoder:
    """The encoder of a model that has been found; texts are cut at the model's own limit unless `max_length` is given.

    Raises:
      UserError: the model has no tokenizer or one that does not fit it.
    """
    tokenizer = origin.matching_tokenizer()
    limit = max_length or origin.text_limit
    return TextEncoder(origin.config, origin.load(mesh), tokenizer, limit, mesh=mesh, width=origin.width, **options)


def truncate_and_normalize(embeddings: Float[np.ndarray, "S D"], dim: int) -> Float[np.ndarray, "S K"]:
    """The first `dim` components at length 1, in float32; a zero vector stays zero."""
    cut = np.asarray(embeddings[:, :dim], np.float32)
    return cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), 1e-12)


def _default_chunk_tokens() -> int:
    return CHUNK_TOKENS.get(jax.default_backend(), CHUNK_TOKENS_ACCELERATOR)


def _row_shapes(max_length: int, chunk_tokens: int, shards: int) -> list[RowShape]:
    """Rows of each length, of which a chunk holds about `chunk_tokens` tokens and a multiple of `shards`."""
    shapes, shorter = [], 0
    longest = max(max_length, ROW_TOKENS[0])
    for tokens in [*(t for t in ROW_TOKENS if t < longest), longest]:
        rows = -(-max(1, chunk_tokens // tokens) // shards) * shards
        # Texts that fit a shorter row are never here, which bounds how many fit this one.
        shapes.append(RowShape(rows, tokens, tokens // (shorter + 1) if shorter else ROW_TEXTS))
        shorter = tokens
    return shapes


def _one_late(items: Iterator) -> Iterator:
    """The same items, each only after the next one has been asked for: the device computes while the host stores."""
    late = None
    for item in items:
        if late:
            yield late
        late = item
    if late:
        yield late
