"""What a step is compiled to, counted: operations, memory, collectives. With libtpu installed also the program of a TPU slice.

`python tests/test_compilation.py` writes the list of the step's collectives anew.
"""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from f2llm_jax import sharding
from f2llm_jax.compilation import check, topology
from f2llm_jax.compilation.collectives import collectives
from f2llm_jax.compilation.cost import trace
from f2llm_jax.compilation.lengths import StepRows, loop_trips
from f2llm_jax.configs import stage2
from f2llm_jax.model.attention import attention
from f2llm_jax.model.flops import Work, training_flops
from f2llm_jax.training import program

GOLDEN = pathlib.Path(__file__).with_name("fixtures") / "step_collectives.txt"
TEACHER = dataclasses.replace(tiny.CONFIG, hidden_size=128)
# Two whole groups of two chunks.
STEP = StepRows(chunks=4, short=4, rows=64, computed=2048, work=Work(2048, 65536))
GROUP = 2


def small_config():
    config = stage2.get_config("size=0.6b,runlocal")
    config.batch.update({"size": 16, "max_length": 32, "row_tokens": 32, "row_texts": 4, "microbatch_rows": 32, "chunk_rows": 16})
    return config


def compiled_step(mesh):
    config = small_config()
    with jax.set_mesh(mesh):
        steps = program.build(config, tiny.CONFIG, 100, "cpu", TEACHER)
        arguments = check.abstract_arguments(config, tiny.CONFIG, steps, TEACHER, mesh)
        return steps.train_step.lower(*arguments).compile()


REASONS = """\
# The collectives of a training step on a (data, fsdp, tensor) = (2, 2, 2) mesh of CPU devices, and why they are there:
# teacher, encode, last_group, gradients
#   all-gather of weights, times = layers x groups: over fsdp, before the chunks of a group enter a layer; TPUs take it with each chunk
#   all-gather s32[positions] and all-to-all: token ids go to the columns of the table, rows of the table come back
#   all-gather f32[positions, D/fsdp]: those rows, over tensor
#   all-reduce f32[positions, D], one or more at a time: partial sums of attention's output and of the MLP, over tensor
# gradients, last_group
#   all-reduce of weights over fsdp, times = layers x groups: a reduce-scatter on TPUs; of a query and key norm over tensor too
#   all-reduce of everything, times = 1: the one sum over data
# objective
#   all-reduce [S, D] of student and teacher: all embeddings go to every device, once; all-reduce f32[]: sums of losses
#   all-gather [B, D], [B, N, D] and of their ids and masks: the candidates of all samples
# update
#   all-reduce f32[]: the norm of the gradient
"""


def step_collectives():
    """Phase, kind, shapes on a device, devices together, times a step; one a line."""
    mesh = sharding.make_mesh(2, 2, 2, devices=jax.devices()[:8])
    for one in collectives(compiled_step(mesh).as_text(), functools.partial(loop_trips, [STEP], GROUP)):
        shapes = " ".join(sorted(one.shapes)).replace("f32[] ", "f32[]")
        yield f"{one.phase.split('/')[0].strip('('):<12}{one.kind:<20}devices={one.devices} times={one.times:<3g}{shapes}"


def test_a_step_has_the_collectives_that_the_design_names_and_no_others():
    assert sorted(step_collectives()) == [line for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]


@pytest.fixture
def ring():
    mesh = jax.make_mesh((8,), ("x",), devices=jax.devices()[:8])
    with jax.set_mesh(mesh):
        yield mesh


def test_collectives_are_counted_as_often_as_they_run(ring):
    """A gather in a scan of 5 in a loop of unknown length, in a scope, beside a sum."""

    def gathered(weight, x):
        return x @ jax.sharding.reshard(weight, P(None, None))

    def step(weights, x, times):
        with jax.named_scope("inside"):
            x = jax.lax.fori_loop(0, times, lambda _, x: jax.lax.scan(lambda x, w: (gathered(w, x), None), x, weights)[0], x)
        with jax.named_scope("outside"):
            return jax.sharding.reshard(jnp.einsum("bd,bd->", x, x, out_sharding=P()), P())

    mesh = ring
    shapes = [((5, 64, 64), P(None, "x", None)), ((8, 64), P("x", None))]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, spec)) for shape, spec in shapes]
    text = jax.jit(step).lower(*arguments, jax.ShapeDtypeStruct((), jnp.int32)).compile().as_text()
    found = {one.kind: one for one in collectives(text, lambda scope: 7)}
    gather, total = found["all-gather"], found["all-reduce"]
    assert len(found) == 2
    assert (gather.times, gather.devices, gather.phase.split("/")[0]) == (35, 8, "inside")
    assert gather.received == 64 * 64 * 4 * 7 / 8
    assert (total.times, total.phase.split("/")[0]) == (1, "outside")
    assert total.received == 2 * 4 * 7 / 8


@pytest.mark.parametrize(
    ("written", "group"),
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", (0, 4)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
        ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", (0, 4)),
    ],
)
def test_devices_of_a_collective_in_every_way_that_xla_writes_them(written, group):
    text = f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  %y = f32[8]{{0}} all-reduce(%x), channel_id=1, {written}, to_apply=%add\n}}\n"
    (found,) = collectives(text, lambda scope: 1)
    assert found.group == group


@pytest.mark.parametrize(("kind", "received"), [("ALL_REDUCE", 2 * 3 / 4 * 64), ("ALL_GATHER", 3 / 4 * 64), ("REDUCE_SCATTER", 3 * 64)])
def test_what_goes_between_slices_is_counted(kind, received):
    """As libtpu 0.0.42 writes it: a send and a receive by the hosts."""
    attributes = '_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,2,3,4}x{0:7}",'
    attributes += f'_xla_megascale_transfer_type="{kind}"'
    text = f"""ENTRY %main (x: f32[8]) -> f32[8] {{
  %send.1 = (f32[4,4]{{1,0}}, u32[], token[]) send(%x, %after-all.1), channel_id=2, frontend_attributes={{{attributes}}}
  %recv.1 = (f32[4,4]{{1,0}}, u32[], token[]) recv(%after-all.1), channel_id=1, frontend_attributes={{{attributes}}}
  %recv-done.1 = (f32[4,4]{{1,0}}, token[]) recv-done(%recv.1), channel_id=1, frontend_attributes={{{attributes}}}
}}
"""
    (found,) = collectives(text, lambda scope: 1)
    assert (found.kind, found.shapes, found.group) == (kind.lower().replace("_", "-"), ("f32[4,4]",), (0, 8, 16, 24))
    assert found.received == received
    with pytest.raises(ValueError, match="not understood"):
        collectives(text.replace(kind, "SOMETHING_NEW"), lambda scope: 1)


@pytest.mark.parametrize(("chunks", "group"), [(1, 1), (4, 1), (4, 2), (4, 8)])
def test_operations_are_those_of_the_model_and_of_what_is_encoded_twice(chunks, group):
    """Without rematerialisation: all groups but the last are encoded once more than the model needs; attention is a whole square."""
    config, mesh = small_config(), sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    config.remat, config.batch.microbatch_rows = "none", 16 * group
    request = check.Request(config, "none")
    with jax.set_mesh(mesh):
        steps = program.build(config, tiny.CONFIG, 100, "cpu")
        arguments = check.abstract_arguments(config, tiny.CONFIG, steps, None, mesh)
        cost, teacher = check.costs(request.config, tiny.CONFIG, steps, arguments, chunks, chunks, None)
    tokens = chunks * 16 * 32
    half = tiny.CONFIG.num_hidden_layers * 2 * tiny.CONFIG.num_attention_heads * tiny.CONFIG.head_dim * tokens * 32
    needed = training_flops(tiny.CONFIG, Work(tokens, tokens * 32)) + 3 * half
    heads = tiny.CONFIG.num_attention_heads + tiny.CONFIG.num_key_value_heads
    rotations = 2 * tiny.CONFIG.num_hidden_layers * heads * tiny.CONFIG.head_dim**2 * tokens  # of one pass, as products (see `rotate`)
    again = 1 - min(group, chunks) / chunks
    expected = needed * (1 + again / 3) + rotations * (2 + again)
    assert teacher.flops == 0
    assert expected <= cost.flops < 1.02 * expected  # the objective, and sums that are written as products


def test_a_fused_kernel_is_counted_on_every_device_and_below_the_diagonal():
    R, T, H, K, E = 8, 1024, 4, 2, 128
    rows = [jax.ShapeDtypeStruct((heads, R, T, E), jnp.bfloat16) for heads in (H, K, K)] + [jax.ShapeDtypeStruct((R, T), jnp.int32)]
    alone = trace(functools.partial(attention, kernel="splash"), *rows)
    blocks = T // 512
    assert alone.flops == 2 * 2 * R * H * E * T * T * (blocks + 1) / (2 * blocks)
    mesh = sharding.make_mesh(2, 2, 2, devices=jax.devices()[:8])
    specs = [sharding.HEADS_RTE] * 3 + [sharding.ROWS_T]
    placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, s)) for x, s in zip(rows, specs, strict=True)]
    with jax.set_mesh(mesh):
        assert trace(functools.partial(attention, kernel="splash"), *placed).flops == alone.flops


def test_a_loop_of_unknown_length_is_not_counted_once():
    loop = lambda x, n: jax.lax.fori_loop(0, n, lambda _, x: x @ x, x)  # noqa: E731
    with pytest.raises(ValueError, match="static length"):
        trace(loop, jnp.ones((4, 4)), jnp.int32(3))
    assert trace(lambda x: loop(x, 3), jnp.ones((4, 4))).flops == 3 * 2 * 4**3


libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: make tpu-check, or pip install libtpu")


def compile_check(tmp_path, *flags):
    command = [sys.executable, "-m", "f2llm_jax.compile_check", "--json", tmp_path / "report.json", *flags]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


@libtpu
def test_a_small_size_fits_a_small_slice(tmp_path):
    done = compile_check(tmp_path, "--config", "configs/stage2.py:size=80m", "--topology", "v5e:2x2", "--config.batch.microbatch_rows=16")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["attention"] == "splash"
    assert 0.3 * 2**30 < report["hbm_used"] < report["hbm_capacity"] == 16 * 2**30
    assert {"all-gather", "all-to-all"} <= {moved["kind"] for moved in report["collectives"]}
    assert "memory of a device" in done.stdout


@libtpu
def test_gradients_and_embeddings_cross_slices_once_a_step(tmp_path):
    flags = ("--slices", "2", "--config.mesh.data=2", "--config.batch.microbatch_rows=16")
    done = compile_check(tmp_path, "--config", "configs/stage2.py:size=80m", "--topology", "v5e:2x2", *flags)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    across = sum(moved["received"] for moved in report["collectives"] if moved["crosses_slices"])
    gradients, embeddings = 4 * 80_084_288 / 4, 4 * 512 * 9 * 320  # bytes: of a device's share, and of all texts at most
    assert gradients < across < gradients + embeddings
    assert report["seconds"]["network"] == across / topology.CHIPS["TPU v5 lite"].dcn_bandwidth


@libtpu
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--topology", "v5e:3x5"), "there is no slice 'v5e:3x5'"),
        (("--topology", "v5e:2x2", "--config.batch.microbatch_rows=3"), "multiple of the 4 shards"),
        (("--topology", "v5e:2x2", "--slices", "2"), "set it to 2"),
    ],
)
def test_what_cannot_be_is_said(tmp_path, flags, message):
    done = compile_check(tmp_path, "--config", "configs/stage2.py:size=80m", *flags)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "report.json").exists()


def test_chips_have_what_a_roofline_needs():
    for chip in topology.CHIPS.values():
        balance = chip.flops / chip.hbm_bandwidth
        assert 100 < balance < 700
        assert chip.dcn_bandwidth < chip.ici_bandwidth < chip.hbm_bandwidth
    assert np.isclose(topology.CHIPS["TPU v5 lite"].flops, 197e12)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    GOLDEN.write_text(REASONS + "".join(f"{line}\n" for line in sorted(step_collectives())))
