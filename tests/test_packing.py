"""Packing: nothing lost, nothing overlapping, limits kept, and no worse than first-fit decreasing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from f2llm_jax.data.packing import RowShape, lay_out, pack

SHAPES = st.builds(RowShape, chunk_rows=st.integers(1, 4), row_tokens=st.integers(1, 20), row_texts=st.integers(1, 5))


@st.composite
def shapes_with_parts(draw):
    parts, tokens, texts = (draw(st.integers(low, high)) for low, high in ((2, 3), (1, 8), (1, 3)))
    return RowShape(draw(st.integers(1, 3)), parts * tokens, parts * texts, draw(st.integers(1, 3)), parts)


@st.composite
def cases(draw, shapes=SHAPES):
    """A shape and lengths that fit it, some 0 for texts that do not exist."""
    shape = draw(shapes)
    return shape, draw(st.lists(st.integers(0, shape.row_tokens), max_size=30))


def texts_of(lengths):
    """Texts whose every token is unlike all others, starting above 0, which is padding."""
    ends = np.cumsum(lengths)
    return [np.arange(end - length + 1, end + 1, dtype=np.int32) for length, end in zip(lengths, ends, strict=True)]


def lay(shape, lengths, **options):
    values, packing = texts_of(lengths), shape.pack(lengths)
    return values, packing, lay_out(packing, shape, lambda wanted: [values[i] for i in wanted], **options)


def flat(packed):
    return {
        name: getattr(packed, name).reshape(-1, getattr(packed, name).shape[-1])
        for name in ("token_ids", "positions", "segment_ids", "last", "text")
    }


@given(cases(st.one_of(SHAPES, shapes_with_parts())))
@settings(max_examples=150, deadline=None)
def test_every_text_is_read_back_from_its_slot(case):
    shape, lengths = case
    values, packing, packed = lay(shape, lengths)
    rows = flat(packed)
    found = {}
    for r in range(len(rows["text"])):
        for x in np.flatnonzero(rows["text"][r] < len(lengths)):
            segment = rows["segment_ids"][r] == x + 1
            (here,) = np.nonzero(segment)
            assert here[-1] == rows["last"][r, x]
            assert (np.diff(here) == 1).all()
            assert rows["positions"][r, here].tolist() == list(range(len(here)))
            assert int(rows["text"][r, x]) not in found
            found[int(rows["text"][r, x])] = rows["token_ids"][r, here]
    assert set(found) == {i for i, length in enumerate(lengths) if length}
    for i, ids in found.items():
        np.testing.assert_array_equal(ids, values[i])
    # Everything else is padding, so no two texts overlap and nothing was written twice.
    assert (rows["segment_ids"] > 0).sum() == sum(lengths)
    outside = rows["segment_ids"] == 0
    assert not rows["token_ids"][outside].any() and not rows["positions"][outside].any()
    unused = rows["text"] == len(lengths)
    assert (rows["last"][unused] == 0).all()
    assert packed.chunks == max(1, -(-packing.rows // shape.chunk_rows))
    assert len(packed.token_ids) == packed.chunks


@given(cases())
@settings(max_examples=100, deadline=None)
def test_rows_keep_their_limits(case):
    shape, lengths = case
    packing = shape.pack(lengths)
    absent = np.array(lengths, int) == 0
    assert (packing.row[absent] == -1).all()
    assert set(packing.row[~absent]) == set(range(packing.rows))  # no row in use is empty
    for row in range(packing.rows):
        mine = np.flatnonzero(packing.row == row)
        assert packing.lengths[mine].sum() <= shape.row_tokens and len(mine) <= shape.row_texts
        assert sorted(packing.slot[mine]) == list(range(len(mine)))
        order = mine[np.argsort(packing.slot[mine])]
        assert packing.start[order].tolist() == [0, *np.cumsum(packing.lengths[order])[:-1]]  # no gaps


@given(cases(), st.integers(0, 3), st.data())
@settings(max_examples=50, deadline=None)
def test_hosts_fill_in_their_rows_and_together_all_of_them(case, more, data):
    """Each host's arrays are the whole ones in its rows and padding elsewhere; it reads no text of another's."""
    shape, lengths = case
    values, packing, whole = lay(shape, lengths)
    chunks = int(whole.chunks) + more
    owner = np.array(data.draw(st.lists(st.integers(0, 1), min_size=shape.chunk_rows, max_size=shape.chunk_rows)))
    read = []
    for host in (0, 1):
        mine = owner == host

        def get(wanted, mine=mine):
            read.extend(wanted)
            assert mine[packing.row[wanted] % shape.chunk_rows].all()
            return [values[i] for i in wanted]

        part = lay_out(packing, shape, get, chunks=chunks, local_rows=mine)
        assert part.chunks == whole.chunks and part.token_ids.shape == (chunks, shape.chunk_rows, shape.row_tokens)
        for name, empty in (("token_ids", 0), ("positions", 0), ("segment_ids", 0), ("last", 0), ("text", len(lengths))):
            got = getattr(part, name)
            np.testing.assert_array_equal(got[: whole.chunks][:, mine], getattr(whole, name)[:, mine])
            assert (got[:, ~mine] == empty).all() and (got[whole.chunks :] == empty).all()
    assert sorted(read) == [i for i, length in enumerate(lengths) if length]


def first_fit_decreasing(lengths, row_tokens, row_texts):
    rows = []
    for length in sorted((length for length in lengths if length), reverse=True):
        for row in rows:
            if sum(row) + length <= row_tokens and len(row) < row_texts:
                row.append(length)
                break
        else:
            rows.append([length])
    return len(rows)


@pytest.mark.parametrize("row_texts", [8, 64])
@pytest.mark.parametrize("seed", range(5))
def test_no_more_rows_than_first_fit_decreasing(seed, row_texts):
    """On lengths as they are: many short texts, some of the longest."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(4.0, 1.1, 400), 2, 512).astype(int)
    rows = pack(lengths, 512, row_texts).rows
    assert rows <= first_fit_decreasing(lengths.tolist(), 512, row_texts)
    assert rows >= max(-(-lengths.sum() // 512), -(-400 // row_texts))


def test_a_text_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="a text of 9 tokens does not fit a row of 8"):
        pack([3, 9], 8, 4)


def test_no_texts_at_all_are_one_chunk_of_padding():
    _, packing, packed = lay(RowShape(chunk_rows=2, row_tokens=4, row_texts=3), [0, 0])
    assert packing.rows == 0 and packed.chunks == 1
    assert packed.token_ids.shape == (1, 2, 4) and not packed.segment_ids.any() and (packed.text == 2).all()


@given(cases(shapes_with_parts()))
@settings(max_examples=150, deadline=None)
def test_no_text_of_a_short_chunk_crosses_a_part_and_none_is_lost_to_it(case):
    """Rows of short chunks hold texts within parts, in the slots of their part; a text that fits no part is in none of them."""
    shape, lengths = case
    _, packing, packed = lay(shape, lengths)
    part_tokens, part_texts = shape.row_tokens // shape.parts, shape.row_texts // shape.parts
    first = int(packed.short_chunks)
    assert first <= packed.chunks and min(first * shape.chunk_rows, packing.rows) <= packing.short_rows
    assert packing.short_rows - first * shape.chunk_rows < shape.chunk_rows
    texts, last = packed.text[:first].reshape(-1, shape.row_texts), packed.last[:first].reshape(-1, shape.row_texts)
    for row, slot in np.argwhere(texts < len(lengths)):
        length = lengths[texts[row, slot]]
        assert length <= part_tokens
        assert last[row, slot] // part_tokens == (last[row, slot] - length + 1) // part_tokens == slot // part_texts
