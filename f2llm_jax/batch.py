"""The arrays that travel from the input pipeline to the device.

Dimensions: B samples, N negatives per sample, S = B * (2 + N) texts, C chunks of M rows of T tokens, X texts per row.
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Float, Int

Leaf = Any  # an array on devices or on the host, or what describes one: its shape, its PartitionSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedTexts:
    """S texts in rows of T tokens. Rows come in chunks of M, of which the first `chunks` are in use.

    Chunks pass the decoder in groups of up to `group_chunks`. In the first `short_chunks` no text crosses a part of its row, of `parts`
    equal ones, so that each may be encoded as a row: short rows cost less attention.
    """

    token_ids: Int[Leaf, "C M T"]  # 0 in padding
    positions: Int[Leaf, "C M T"]  # within the text, from 0
    segment_ids: Int[Leaf, "C M T"]  # 1, 2, ... for the texts of a row in order; 0 in padding
    last: Int[Leaf, "C M X"]  # position in the row of each text's last token (EOS); 0 where there is no text
    text: Int[Leaf, "C M X"]  # which text that is, 0 <= text < S; S where there is none
    chunks: Int[Leaf, ""]  # in use, at least 1; traced as the next, so one program serves every amount of text
    short_chunks: Int[Leaf, ""]
    group_chunks: int = dataclasses.field(default=1, metadata={"static": True})
    parts: int = dataclasses.field(default=1, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Samples:
    """Which samples and negatives exist, and which document each candidate is. Equal ids mean equal text."""

    sample_mask: Float[Leaf, " B"]  # 1.0 for a sample that exists, else 0.0
    negative_mask: Float[Leaf, "B N"]
    in_batch_weight: Float[Leaf, ""]  # 1.0 for a retrieval source, else 0.0: only retrieval uses in-batch negatives (paper, 3.1)
    passage_ids: Int[Leaf, " B"]  # of each positive, a document of the source
    negative_ids: Int[Leaf, "B N"]  # -1 for a negative that does not exist
    query_ids: Int[Leaf, " B"] | None = None  # of each query within its source; None where the data does not tell
    scores: Float[Leaf, "B 1+N"] | None = None  # of positive and negatives, NaN for none; None where no source of the data has any
    graded_weight: Float[Leaf, ""] | None = None  # 1.0 for a source of graded pairs, else 0.0; None where there is no such source


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """The samples of one step, all from one source.

    Texts are numbered queries first, then positives, then negatives sample by sample: text b is the query of sample b,
    B + b its positive, 2B + bN + n its n-th negative. What does not exist is masked, never absent, so every task kind runs
    the same program.
    """

    texts: PackedTexts
    samples: Samples
    teacher: Float[Leaf, "B 2+N W"] | None = None  # cached embeddings of query, positive and negatives

    @property
    def text_count(self) -> int:
        """S."""
        samples, negatives = self.samples.negative_mask.shape
        return samples * (2 + negatives)
