"""What goes beyond the recipe: false negatives, a larger pool, streaming, other distillations, spread-out; each against numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from random_samples import DIMS, B, D, N, masks, of, random_embeddings
from scipy.special import log_softmax, logsumexp

from f2llm_jax.objectives import ContrastiveConfig, Embeddings, Objective, candidates, total
from f2llm_jax.objectives.contrastive import contrastive as contrastive_loss
from f2llm_jax.objectives.distillation import distillation
from f2llm_jax.objectives.spread_out import spread_out

pytestmark = pytest.mark.usefixtures("quick_compilation")
TAU = 0.05


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def oracle(e, samples, config):
    """`(in_batch, hard)` at full width, one query at a time."""
    q, p, n = (unit(x) for x in e)
    here, there = np.asarray(samples.sample_mask) > 0, np.asarray(samples.negative_mask) > 0
    in_batch, hard = [], []
    for b in np.flatnonzero(here):
        own = q[b] @ p[b]

        def kept(cosine, document, b=b, own=own):
            same = config.mask_false_negatives and document == samples.passage_ids[b]
            return not same and cosine <= own + config.false_negative_margin

        pool = [(q[b] @ p[c], samples.passage_ids[c]) for c in np.flatnonzero(here) if c != b]
        if config.in_batch_pool == "positives_and_negatives":
            pool += [(q[b] @ n[c, i], samples.negative_ids[c, i]) for c, i in zip(*np.nonzero(there), strict=True)]
        mine = [(q[b] @ n[b, i], samples.negative_ids[b, i]) for i in np.flatnonzero(there[b])]
        for losses, others in ((in_batch, pool), (hard, mine)):
            losses.append(logsumexp([own / TAU, *(c / TAU for c, d in others if kept(c, d))]) - own / TAU)
    return np.mean(in_batch), np.mean(hard)


def with_twins():
    """Sample 1 has sample 0's document, negative (3, 1) is sample 4's, negative (5, 0) is its own positive; vectors agree."""
    samples = of(*masks(), passage_ids=[0, 0, 2, 3, 4, 5, 6, 7])
    ids = np.array(samples.negative_ids)
    ids[3, 1], ids[5, 0] = 4, 5
    e = random_embeddings(20)
    negatives = e.negatives.at[3, 1].set(e.passage[4]).at[5, 0].set(e.passage[5])
    return Embeddings(e.query, e.passage.at[1].set(e.passage[0]), negatives), dataclasses.replace(samples, negative_ids=jnp.asarray(ids))


OPTIONS = {
    "as published": {},
    "same text masked": {"mask_false_negatives": True},
    "margin": {"false_negative_margin": 0.1},
    "negative margin": {"false_negative_margin": -0.05},
    "everybody's negatives": {"in_batch_pool": "positives_and_negatives"},
    "all of them": {"mask_false_negatives": True, "false_negative_margin": 0.1, "in_batch_pool": "positives_and_negatives"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_false_negatives_and_pool(options):
    e, samples = with_twins()
    config = ContrastiveConfig(**options)
    _, parts = contrastive_loss(e, samples, config)
    in_batch, hard = oracle(e, samples, config)
    np.testing.assert_allclose(parts["in_batch"].value, in_batch, rtol=2e-6)
    np.testing.assert_allclose(parts["hard"].value, hard, rtol=2e-6)


def test_losses_in_bfloat16_are_those_of_torch_on_bfloat16_tensors():
    """The published trainer's own lines, on tensors as its model gives them. What is logged of accuracy keeps its meaning."""
    e, samples = random_embeddings(3), of(np.ones(B), np.ones((B, N)))
    dims = (8, D)
    config = ContrastiveConfig(dims=dims, loss_dtype="bfloat16")
    query, passage, negatives = (torch.tensor(np.asarray(x)).bfloat16() for x in e)
    weights = {D: 1.0, 8: 1 / (2 * np.sqrt(D / 8))}
    unit = lambda x: torch.nn.functional.normalize(x, p=2, dim=-1)  # noqa: E731
    in_batch, hard = 0.0, 0.0
    for dim, weight in weights.items():
        q = unit(query[:, :dim])
        logits = q @ unit(passage[:, :dim]).t() / TAU
        in_batch += weight * float(torch.nn.functional.cross_entropy(logits.float(), torch.arange(B)))
        candidates = torch.cat([passage[:, None], negatives], 1)[..., :dim]
        logits = (q.unsqueeze(1) * unit(candidates)).sum(-1) / TAU
        hard += weight * float(torch.nn.functional.cross_entropy(logits.float(), torch.zeros(B, dtype=torch.long)))
    _, parts = contrastive_loss(e, samples, config)
    _, exact = contrastive_loss(e, samples, ContrastiveConfig(dims=dims))
    np.testing.assert_allclose(
        parts["in_batch"].value, in_batch, rtol=2e-3
    )  # one sum of products in another order is one unit of a logit's last place
    np.testing.assert_allclose(parts["hard"].value, hard, rtol=5e-3)  # torch rounds each product too
    assert parts["in_batch"].value != exact["in_batch"].value and parts["hard"].value != exact["hard"].value
    assert {parts[name].value.dtype for name in ("in_batch", "hard", "in_batch_accuracy")} == {jnp.dtype("float32")}
    gradient = jax.grad(lambda query: contrastive_loss(e._replace(query=query), samples, config)[0])(e.query)
    assert np.isfinite(gradient).all() and gradient.dtype == jnp.float32


def test_options_change_the_loss():
    """No option is a no-op on these samples, so the oracle above really compares six different losses."""
    e, samples = with_twins()
    losses = [float(contrastive_loss(e, samples, ContrastiveConfig(**options))[0]) for options in OPTIONS.values()]
    assert len(set(losses)) == len(losses)


def test_masked_share_counts_pairs():
    e, samples = with_twins()
    _, parts = contrastive_loss(e, samples, ContrastiveConfig(mask_false_negatives=True))
    present = 6  # samples 2 and 7 are absent; of 6 * 5 ordered pairs, (0, 1) and (1, 0) share a document
    assert (parts["masked_negatives"].sum, parts["masked_negatives"].count) == (2, present * (present - 1))


@pytest.mark.parametrize("block", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_streaming_changes_nothing(monkeypatch, block):
    """Any block size, also one that does not divide the pool: same value, same gradient."""
    e, samples = with_twins()
    config = Objective(
        contrastive=ContrastiveConfig(dims=DIMS, in_batch_pool="positives_and_negatives"), distillation="scores", distillation_weight=1.0
    )
    teacher = random_embeddings(21, width=D + 4)
    step = jax.value_and_grad(lambda e: total(e, samples, config, teacher)[0])
    want = step(e)
    monkeypatch.setattr(candidates, "BLOCK", block)
    for one, other in zip(jax.tree.leaves(want), jax.tree.leaves(step(e)), strict=True):
        np.testing.assert_allclose(other, one, rtol=2e-5, atol=2e-6)


def test_diagnostics_are_what_they_say():
    e, samples = with_twins()
    _, parts = contrastive_loss(e, samples, ContrastiveConfig(dims=DIMS))
    q, p, n = (unit(x) for x in e)
    here = np.flatnonzero(np.asarray(samples.sample_mask))
    own = np.sum(q * p, -1)
    ids = np.asarray(samples.passage_ids)
    same = ids[:, None] == ids  # the twins' passages too: which of two equal cosines is larger is a matter of rounding
    cross = np.where(same, -np.inf, q @ p.T)[np.ix_(here, here)].max(-1)
    hard = np.where(np.asarray(samples.negative_mask) > 0, np.einsum("bd,bnd->bn", q, n), -np.inf)[here].max(-1)
    want = {
        "positive_cosine": own[here].mean(),
        "in_batch_negative_cosine": cross.mean(),
        "in_batch_accuracy": (own[here] > cross).mean(),
        "hard_negative_cosine": hard[np.isfinite(hard)].mean(),
        "embedding_norm": np.linalg.norm(np.asarray(e.query), axis=-1)[here].mean(),
    }
    for name, value in want.items():
        np.testing.assert_allclose(parts[name].value, value, rtol=1e-5, err_msg=name)


def test_own_weights_and_dims():
    """Two widths with weights of one's own are the weighted sum of two plain losses."""
    e, samples = random_embeddings(22), of(*masks())
    both, _ = contrastive_loss(e, samples, ContrastiveConfig(dims=(8, D), weights=(0.3, 2.0)))
    cut = Embeddings(*(x[..., :8] for x in e))
    parts = [contrastive_loss(x, samples, ContrastiveConfig())[0] for x in (cut, e)]
    np.testing.assert_allclose(both, 0.3 * parts[0] + 2.0 * parts[1], rtol=1e-5)


def test_cosine_distillation():
    student, teacher, (samples, negatives) = random_embeddings(23), random_embeddings(24, width=D + 6), masks()
    got = distillation(student, teacher, of(samples, negatives), "cosine", TAU).value
    want = 0.0
    for s, t, mask in zip(student, teacher, (samples, samples, negatives), strict=True):
        want += np.mean((1 - np.sum(unit(s) * unit(t[..., :D]), -1))[np.asarray(mask) > 0])
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_score_distillation_is_a_divergence_of_softmaxes():
    """Over the positives and negatives of the whole batch, teacher at full width; 0 and flat where both agree."""
    student, teacher, samples = random_embeddings(25), random_embeddings(26, width=D + 6), of(*masks())
    here, there = np.asarray(samples.sample_mask) > 0, np.asarray(samples.negative_mask) > 0

    def scores(e):
        pool = np.concatenate([unit(e.passage)[here], unit(e.negatives)[there]])
        return log_softmax(unit(e.query)[here] @ pool.T / TAU, axis=-1)

    t, s = scores(teacher), scores(student)
    got = distillation(student, teacher, samples, "scores", TAU).value
    np.testing.assert_allclose(got, np.mean(np.sum(np.exp(t) * (t - s), -1)), rtol=1e-4)
    same, gradient = jax.value_and_grad(lambda e: distillation(e, student, samples, "scores", TAU).value)(student)
    assert abs(same) < 1e-5 and all(np.abs(g).max() < 1e-5 for g in gradient)


def test_no_distillation_sends_a_gradient_to_the_teacher():
    student, teacher, samples = random_embeddings(27), random_embeddings(28), of(*masks())
    for kind in ("mse", "cosine", "scores"):
        gradients = jax.grad(lambda t, kind=kind: distillation(student, t, samples, kind, TAU).value)(teacher)
        assert all((np.asarray(g) == 0).all() for g in gradients), kind


def test_distillation_without_negatives():
    """Pairs alone: no negative exists, no NaN, and the other means still count."""
    student, teacher = random_embeddings(29), random_embeddings(30)
    for kind in ("mse", "cosine", "scores"):
        value, gradient = jax.value_and_grad(
            lambda e, kind=kind: distillation(e, teacher, of(jnp.ones(B), jnp.zeros((B, N))), kind, TAU).value
        )(student)
        assert value > 0 and all(np.isfinite(g).all() for g in gradient)


def test_spread_out_is_the_mean_squared_cosine_of_pairs():
    e, (samples, _) = random_embeddings(31), masks()
    here = np.flatnonzero(np.asarray(samples))
    want = 0.0
    for x in (unit(e.query)[here], unit(e.passage)[here]):
        cosines = x @ x.T
        want += np.mean(cosines[~np.eye(len(here), dtype=bool)] ** 2)
    got, gradients = jax.value_and_grad(lambda e: spread_out(e, samples).value)(e)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert np.abs(gradients.query[here]).max() > 0 and np.abs(gradients.negatives).max() == 0


def test_total_adds_weighted_terms():
    e, teacher, samples = random_embeddings(32), random_embeddings(33), of(*masks())
    loss, metrics = total(e, samples, Objective(distillation_weight=0.5, spread_out_weight=4.0), teacher)
    plain, _ = total(e, samples, Objective())
    np.testing.assert_allclose(loss, plain + 0.5 * metrics["distillation"].value + 4.0 * metrics["spread_out"].value, rtol=1e-6)
    np.testing.assert_allclose(metrics["weighted/spread_out"].value, 4.0 * metrics["spread_out"].value, rtol=1e-6)
