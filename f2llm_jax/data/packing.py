"""Texts into rows of fixed length: best-fit decreasing, and the arrays that say where each text went.

The plan is a function of the lengths alone, so every host computes the same one for the global batch without communication
and then fills in only the rows of its own devices.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int

from f2llm_jax.batch import PackedTexts
from f2llm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where each of S texts is."""

    row: Int[np.ndarray, " S"]  # its row; -1 for an absent text (length 0)
    start: Int[np.ndarray, " S"]  # position of its first token in the row
    slot: Int[np.ndarray, " S"]  # its place among the texts of the row; without parts its rank: 0, 1, ...
    lengths: Int[np.ndarray, " S"]  # as given
    rows: int  # number of rows in use
    short_rows: int  # of which the first so many have no text across the bounds of their parts


def pack(lengths: Sequence[int] | np.ndarray, row_tokens: int, row_texts: int, parts: int = 1) -> Packing:
    """Best-fit decreasing: longest text first, each into the fullest row that still holds it.

    With `parts`, rows are opened for texts that fit a part of a row in parts: each is filled as if it were a row. These rows come first.

    Args:
      lengths: `[S]` tokens of each text; 0 for a text that does not exist.
      row_tokens: T.
      row_texts: X, the most texts of a row.
      parts: that such rows consist of; divides T and X.

    Raises:
      UserError: a text is longer than a row.
    """
    lengths = np.asarray(lengths, np.int32)
    if lengths.max(initial=0) > row_tokens:
        raise UserError(f"a text of {lengths.max()} tokens does not fit a row of {row_tokens}; raise row_tokens or lower max_length")
    bin_, start, slot = (np.full(len(lengths), -1, np.int32) for _ in range(3))  # a bin is a row, or a part of one
    open_bins: list[list[int]] = [[] for _ in range(row_tokens + 1)]  # by tokens left
    free = 0  # bit k is set if a bin with k tokens left is open: the best fit is the lowest set bit from `length` up
    texts: list[int] = []  # texts in each bin
    whole = 0  # bins that are rows; longer texts come first, so these do
    order = np.argsort(-lengths, kind="stable")
    for text, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if length == 0:
            break
        fits = free >> length
        if fits:
            left = length + (fits & -fits).bit_length() - 1
            b = open_bins[left].pop()
            if not open_bins[left]:
                free ^= 1 << left
        else:
            long, b = length > row_tokens // parts, len(texts)
            left = row_tokens if long else row_tokens // parts
            whole += long
            texts.append(0)
        tokens, most = (row_tokens, row_texts) if b < whole else (row_tokens // parts, row_texts // parts)
        bin_[text], start[text], slot[text] = b, tokens - left, texts[b]
        texts[b] += 1
        left -= length
        if left and texts[b] < most:
            open_bins[left].append(b)
            free |= 1 << left
    short_rows = -(-(len(texts) - whole) // parts)
    row, part = np.divmod(bin_ - whole, parts)
    in_part, in_row = bin_ >= whole, (bin_ >= 0) & (bin_ < whole)
    row = np.where(in_part, row, np.where(in_row, short_rows + bin_, -1)).astype(np.int32)
    start[in_part] += part[in_part] * (row_tokens // parts)
    slot[in_part] += part[in_part] * (row_texts // parts)
    return Packing(row, start, slot, lengths, short_rows + whole, short_rows)


@dataclasses.dataclass(frozen=True)
class RowShape:
    """Shape of the packed rows."""

    chunk_rows: int  # M
    row_tokens: int  # T
    row_texts: int = 64  # X, the most texts of a row
    group_chunks: int = 1  # that are on the devices together
    parts: int = 1  # that rows are split into whose texts fit one

    def pack(self, lengths: Sequence[int] | np.ndarray) -> Packing:
        """`pack` for rows of this shape."""
        return pack(lengths, self.row_tokens, self.row_texts, self.parts)

    def short_chunks(self, packing: Packing) -> int:
        """How many chunks, from the first, have no text across the bounds of their rows' parts."""
        whole = packing.rows == packing.short_rows  # then the last may have fewer rows than others
        return max(1, -(-packing.rows // self.chunk_rows)) if whole else packing.short_rows // self.chunk_rows


def lay_out(
    packing: Packing,
    shape: RowShape,
    read: Callable[[np.ndarray], list[np.ndarray]],
    chunks: int | None = None,
    local_rows: Bool[np.ndarray, " M"] | None = None,
) -> PackedTexts:
    """The packed arrays on the host.

    Args:
      packing: from `shape.pack`.
      shape: of the rows.
      read: token ids (int32, as long as planned) of the texts whose numbers it is given.
      chunks: C; by default as many as are in use. Arrays of C > in use have the same shape whatever the texts, so one
        compiled program serves them all; pages of memory without texts are never touched.
      local_rows: the rows of a chunk to fill in; all by default. Elsewhere everything is padding.
    """
    M, T, X = shape.chunk_rows, shape.row_tokens, shape.row_texts
    used = max(1, -(-packing.rows // M))
    rows = (used if chunks is None else chunks) * M
    token_ids, positions, segment_ids = (np.zeros((rows, T), np.int32) for _ in range(3))
    last, text = np.zeros((rows, X), np.int32), np.full((rows, X), len(packing.lengths), np.int32)
    here = packing.row >= 0
    if local_rows is not None:
        here &= local_rows[packing.row % M]
    here = np.flatnonzero(here)
    row, start, slot, length = packing.row[here], packing.start[here], packing.slot[here], packing.lengths[here]
    last[row, slot], text[row, slot] = start + length - 1, here
    within = (np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)).astype(np.int32)
    flat = np.repeat(row.astype(np.int64) * T + start, length) + within
    if len(here):
        token_ids.reshape(-1)[flat] = np.concatenate(read(here))
    positions.reshape(-1)[flat] = within
    segment_ids.reshape(-1)[flat] = np.repeat(slot + 1, length)
    token_ids, positions, segment_ids, last, text = (a.reshape(-1, M, a.shape[-1]) for a in (token_ids, positions, segment_ids, last, text))
    counts = np.int32(used), np.int32(shape.short_chunks(packing))
    return PackedTexts(token_ids, positions, segment_ids, last, text, *counts, shape.group_chunks, shape.parts)
