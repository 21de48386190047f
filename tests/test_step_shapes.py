"""What ahead-of-time figures assume of a run's steps, and the compiler's estimate read from a program's text."""

import numpy as np
import pytest

from f2llm_jax.compilation.estimate import estimated_cycles
from f2llm_jax.compilation.lengths import loop_trips, steps_of, stored_lengths
from f2llm_jax.configs import common, stage1
from f2llm_jax.data.pipeline import BatchConfig
from f2llm_jax.errors import UserError
from f2llm_jax.training import program

DEVICES = {"v5e:2x4": 8, "v5e:4x4": 16, "v5e:8x8": 64, "v6e:8x8": 64, "v5p:4x4x4": 64}


def batch_of(size, **fields):
    return BatchConfig(**stage1.get_config(f"size={size}").batch.to_dict() | fields)


@pytest.mark.parametrize("size", common.SLICE)
def test_nine_of_ten_computed_tokens_are_real_on_the_recommended_slice(size):
    batch = batch_of(size)
    steps = steps_of(batch.rows(DEVICES[common.SLICE[size]]), 512 * 9, batch.max_length)
    assert len({step.rows for step in steps}) == len(stored_lengths()) == 8
    assert sum(step.work.tokens for step in steps) >= 0.9 * sum(step.computed for step in steps)


def test_a_step_of_equal_texts_fills_its_rows():
    (step,) = steps_of(batch_of("0.6b").rows(8), texts=4608, max_length=1024, tokens_per_text=128)
    assert (step.rows, step.chunks, step.computed) == (576, 18, 576 * 1024)
    assert (step.work.tokens, step.work.squares) == (4608 * 128, 4608 * 128**2)


@pytest.mark.parametrize(
    ("microbatch", "chunk", "shards", "rows", "group"),
    [(64, 8, 8, 8, 8), (64, 8, 16, 16, 4), (288, 32, 8, 32, 9), (96, 0, 1, 96, 1), (16, 64, 8, 16, 1), (6, 4, 1, 3, 2), (7, 4, 1, 1, 7)],
)
def test_a_chunk_is_the_largest_that_divides_a_group_on_this_mesh(microbatch, chunk, shards, rows, group):
    shape = batch_of("0.6b", microbatch_rows=microbatch, chunk_rows=chunk).rows(shards)
    assert (shape.chunk_rows, shape.group_chunks) == (rows, group)


def test_rows_that_cannot_be_split_are_refused():
    with pytest.raises(UserError, match="microbatch_rows=12 must be a multiple of the 8 shards"):
        batch_of("0.6b", microbatch_rows=12).rows(8)


@pytest.mark.parametrize("group_chunks", [1, 3, 7, 1000])
@pytest.mark.parametrize("size", ["0.6b", "14b"])
def test_loops_over_groups_visit_every_chunk_as_often_as_the_step_encodes_it(size, group_chunks):
    batch = batch_of(size)
    steps = steps_of(batch.rows(DEVICES[common.SLICE[size]]), 512 * 9, batch.max_length)
    chunks = np.mean([step.chunks for step in steps])

    def visits(phase):
        """Chunks that a step's loops visit; only the last group is in no loop over groups."""
        groups = 1 if phase == "last_group" else loop_trips(steps, group_chunks, f"{phase}/while")
        every, short, long = (
            groups * loop_trips(steps, group_chunks, f"{phase}/while/body/x/{kind}/while") for kind in ("chunks", "short", "long")
        )
        assert every == pytest.approx(short + long)
        return every

    assert visits("teacher") == pytest.approx(chunks)
    assert visits("encode") == visits("gradients") == pytest.approx(chunks - visits("last_group"))
    assert 0 < visits("last_group") <= group_chunks


PROGRAM = """HloModule jit_step

%condition (s: (s32[])) -> pred[] {
  %five = s32[] constant(5)
}

%layers (s: (s32[])) -> (s32[]) {
  %fusion.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"10"}
}

%traced (s: (s32[])) -> pred[] {
  %c = pred[] compare(%i, %n), direction=LT
}

%chunks (s: (s32[])) -> (s32[]) {
  %while.1 = (s32[]) while(%t), condition=%condition, body=%layers, metadata={op_name="jit(step)/encode/while"}
  %copy.1 = f32[8]{0} copy(%y), backend_config={"estimated_cycles":"1"}
}

%yes (p: f32[8]) -> f32[8] {
  %copy.2 = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"1000"}
}

%no (p: f32[8]) -> f32[8] {
  %copy.3 = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"2000"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %while.2 = (s32[]) while(%t), condition=%traced, body=%chunks, metadata={op_name="jit(step)/encode/long/while"}
  %conditional.1 = f32[8]{0} conditional(%p, %x, %x), branch_computations={%no, %yes}, metadata={op_name="jit(step)/last_group/cond"}
  %fusion.2 = f32[8]{0} fusion(%z), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"100000"}
}
"""


def test_estimated_cycles_are_counted_as_often_as_loops_run():
    trips = {"encode/long/while": 2.5}
    assert estimated_cycles(PROGRAM, trips.__getitem__) == 2.5 * (5 * 10 + 1) + 3_000 + 100_000


def test_the_chips_whose_collectives_would_block_get_compiler_options():
    for kind in ("TPU v6 lite", "TPU7x"):
        assert program.compiler_options(kind)["xla_tpu_enable_sparse_core_collective_offload_all_gather"] == "true"
    assert program.compiler_options("TPU v5")["xla_tpu_enable_async_collective_fusion_fuse_all_gather"] == "true"
    assert program.compiler_options("cpu") == program.compiler_options("TPU v5 lite") == {}


def test_stored_lengths_are_those_of_eight_sources():
    means = sorted(np.mean(lengths) for lengths in stored_lengths())
    assert 10 < means[0] < 15 and 250 < means[-1] < 300 and max(map(max, stored_lengths())) == 512
