"""The importance spectrum as a picture: how much would go at every width, and how much each layer does."""

import io

import numpy as np
from matplotlib.figure import Figure

from f2llm_jax.pruning.prune import Pruned


def spectrum(pruned: Pruned) -> bytes:
    """A PNG: scores of hidden channels and of every MLP's channels from largest to smallest, what stays left of the line; influence."""
    choice = pruned.choice
    figure = Figure(figsize=(13, 4), dpi=120, layout="constrained")
    hidden, ffn, layers = figure.subplots(1, 3)
    _draw_spectrum(hidden, choice.hidden_scores[None], len(choice.hidden), f"hidden channels by {pruned.method.hidden_by}")
    _draw_spectrum(ffn, choice.ffn_scores, choice.ffn.shape[1], f"MLP channels by {pruned.method.ffn_by}, a line a layer")
    stays = np.isin(np.arange(len(choice.influence)), choice.layers)
    layers.bar(np.arange(len(stays)), choice.influence, color=np.where(stays, "tab:blue", "lightgray"))
    layers.set(title=f"block influence; layers by {pruned.method.layers_by}, blue stay", xlabel="layer")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def _draw_spectrum(axes, scores: np.ndarray, stays: int, title: str) -> None:
    for i, line in enumerate(scores):
        axes.plot(np.sort(line)[::-1], color=str(0.7 * i / len(scores)) if len(scores) > 1 else "tab:blue", linewidth=0.8)
    axes.axvline(stays - 0.5, color="tab:red", linewidth=0.8)
    axes.set(title=title, xlabel="rank", yscale="log")
