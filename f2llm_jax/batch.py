"""The two kinds of array bundle that travel from the input pipeline to the device.

Dimensions: B samples, N negatives a sample, S = B * (2 + N) texts, C chunks, M rows of a chunk, T positions of a row,
X text slots of a row.
"""

import dataclasses

import jax
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedTexts:
    """S texts laid into rows of T tokens; rows come in chunks of M, of which the first `chunks` are in use.

    Attributes:
      token_ids: token ids; 0 in padding.
      positions: position within the text, from 0.
      segment_ids: 1, 2, ... for the texts of a row in order; 0 in padding.
      last: position in the row of the last token (EOS) of the text in slot x; 0 in an unused slot.
      text: which text that is, 0 <= text < S; S in an unused slot.
      chunks: number of chunks that hold texts, at least 1. Traced, so one program serves every amount of text.
    """

    token_ids: Int[Array, "C M T"]
    positions: Int[Array, "C M T"]
    segment_ids: Int[Array, "C M T"]
    last: Int[Array, "C M X"]
    text: Int[Array, "C M X"]
    chunks: Int[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """The samples of one step, all from one source.

    Texts are numbered queries first, then positives, then negatives sample by sample: text b is the query of sample b,
    B + b its positive, 2B + bN + n its n-th negative. What does not exist is masked, never absent, so every task kind runs
    the same program.

    Attributes:
      texts: the packed texts.
      sample_mask: 1.0 for a sample that exists, else 0.0.
      negative_mask: 1.0 for a negative that exists, else 0.0.
      in_batch_weight: 1.0 for a retrieval source, else 0.0: only retrieval uses in-batch negatives (paper, section 3.1).
      passage_ids: which document of the source each positive is; equal ids mean equal text.
      negative_ids: the same for each negative; -1 for one that does not exist.
      teacher: cached teacher embeddings of query, positive and negatives; None if there are none.
    """

    texts: PackedTexts
    sample_mask: Float[Array, "B"]
    negative_mask: Float[Array, "B N"]
    in_batch_weight: Float[Array, ""]
    passage_ids: Int[Array, "B"]
    negative_ids: Int[Array, "B N"]
    teacher: Float[Array, "B 2+N W"] | None = None

    @property
    def text_count(self) -> int:
        """S."""
        samples, negatives = self.negative_mask.shape
        return samples * (2 + negatives)
