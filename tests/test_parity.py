"""The parity referee: the published recipe's float64 trajectories, replayed through our own encode, objective and update code."""

import contextlib
import json

import jax
import parity
import pytest

from f2llm_jax import sharding
from f2llm_jax.data.packing import RowShape

# The amount of work at once differs from one to the next (many chunks, two sizes of few, a single one) and so does the
# device count: none of it may show in the figures.
REPLAYS = {
    "mrl=False kd=0.0 passage_grad=full": (RowShape(chunk_rows=2, row_tokens=96), None),
    "mrl=True kd=0.0 passage_grad=full": (RowShape(chunk_rows=32, row_tokens=64), None),
    "mrl=True kd=0.0 passage_grad=none": (RowShape(chunk_rows=5, row_tokens=48, row_texts=3), None),
    "mrl=True kd=1.0 passage_grad=full": (RowShape(chunk_rows=8, row_tokens=64), (2, 2, 2)),
}


def test_the_kit_has_the_trajectories_that_are_replayed(parity_kit):
    assert set(json.loads((parity_kit / "expected.json").read_text())["trajectories"]) == set(REPLAYS)


@pytest.mark.parametrize("name", REPLAYS)
def test_a_trajectory_is_the_published_recipes(parity_kit, name):
    shape, axes = REPLAYS[name]
    mesh = sharding.make_mesh(*axes) if axes else None
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        figures = parity.Kit(parity_kit, shape, mesh).replay(name)
    assert set(figures) == {"max_rel_loss", "max_rel_grad_norm", "max_rel_param_norm", "max_rel_embedding"}
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
