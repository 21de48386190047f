"""The parity referee: the published recipe's float64 trajectories, replayed through our own encode, objective and update code."""

import contextlib
import json

import jax
import parity
import pytest

from f2llm_jax import sharding
from f2llm_jax.data.packing import RowShape

# Chunks that the longest batch takes -> rows. How many pass a layer or the decoder together, on how many devices, and where the
# teacher's vectors come from may not show in the figures.
SHAPES = {
    1: RowShape(chunk_rows=32, row_tokens=64),
    2: RowShape(chunk_rows=8, row_tokens=96, group_chunks=2),
    5: RowShape(chunk_rows=8, row_tokens=48, row_texts=3, group_chunks=3),
}
# Chunks, mesh, cached teacher.
REPLAYS = {
    "mrl=False kd=0.0 passage_grad=full": (5, None, False),
    "mrl=True kd=0.0 passage_grad=full": (1, None, False),
    "mrl=True kd=0.0 passage_grad=none": (2, None, False),
    "mrl=True kd=1.0 passage_grad=full": (2, (2, 2, 2), True),
}
DISTILLED = "mrl=True kd=1.0 passage_grad=full"


def test_the_kit_has_the_trajectories_that_are_replayed(parity_kit):
    assert set(json.loads((parity_kit / "expected.json").read_text())["trajectories"]) == set(REPLAYS)


def in_make_test(name):
    """Of four trajectories the one with every term; the slow matrix below has them all."""
    return name if name == DISTILLED else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [in_make_test(name) for name in REPLAYS])
def test_a_trajectory_is_the_published_recipes(parity_kit, name):
    check(parity_kit, name, *REPLAYS[name])


@pytest.mark.slow
@pytest.mark.parametrize("axes", [None, (2, 2, 2), (1, 8, 1)], ids=["1 device", "2x2x2", "1x8x1"])
@pytest.mark.parametrize("chunks", SHAPES)
@pytest.mark.parametrize(("name", "cached"), [*((name, False) for name in REPLAYS), (DISTILLED, True)])
def test_every_trajectory_in_any_number_of_chunks_on_any_mesh(parity_kit, name, chunks, axes, cached):
    check(parity_kit, name, chunks, axes, cached)


def check(folder, name, chunks, axes, cached):
    mesh = sharding.make_mesh(*axes) if axes else None
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        kit = parity.Kit(folder, SHAPES[chunks], mesh, cached)
        assert kit.chunks() == chunks
        figures = kit.replay(name)
    assert set(figures) == {"max_rel_loss", "max_rel_grad_norm", "max_rel_param_norm", "max_rel_embedding"}
    print(name, f"{chunks} chunks", axes, "cached" if cached else "", figures)
    assert max(figures.values()) <= 1e-4, figures


def test_the_command_prints_one_line_a_trajectory_and_fails_beyond_the_tolerance(parity_kit, monkeypatch, capsys):
    figures = {"max_rel_loss": 1e-5, "max_rel_grad_norm": 1e-5, "max_rel_param_norm": 1e-5, "max_rel_embedding": 1e-5}
    monkeypatch.setattr(parity.Kit, "replay", lambda kit, name: figures)
    assert parity.main(["parity.py", str(parity_kit)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"trajectory": name, **figures} for name in REPLAYS]
    for figure in figures:
        monkeypatch.setattr(parity.Kit, "replay", lambda kit, name, figure=figure: figures | {figure: 1.1e-4})
        assert parity.main(["parity.py", str(parity_kit)]) == 1
