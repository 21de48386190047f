"""Each term against float64 torch written from the paper, and against sentence-transformers; masks, gradients, weights."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_samples import DIMS, B, D, N, masks, of, random_embeddings
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

from f2llm_jax import objectives, sharding
from f2llm_jax.objectives import ContrastiveConfig, Embeddings, Mean, Objective, matryoshka_dims, matryoshka_weights
from f2llm_jax.objectives.contrastive import contrastive
from f2llm_jax.objectives.distillation import distillation
from f2llm_jax.objectives.matryoshka import check_dims

pytestmark = pytest.mark.usefixtures("quick_compilation")


def mse(student, teacher, *masks):
    return distillation(student, teacher, of(*masks), "mse", 0.05)


def in_torch(embeddings):
    return Embeddings(*(torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True) for x in embeddings))


def oracle(e, sample_mask, negative_mask, dims, temperature=0.05, detach_passages=False):
    """`(in_batch, hard)`, sample by sample with lists of what exists instead of masks."""
    present = [b for b in range(B) if sample_mask[b]]
    in_batch = hard = torch.zeros((), dtype=torch.float64)
    for rank, d in enumerate(sorted(dims, reverse=True), start=1):
        weight = 1 / (rank * math.sqrt(max(dims) / d))
        q, p, n = (F.normalize(x[..., :d], dim=-1) for x in e)
        for row, b in enumerate(present):
            pool = torch.stack([p[c].detach() if detach_passages else p[c] for c in present])
            in_batch = in_batch + weight * F.cross_entropy((pool @ q[b] / temperature)[None], torch.tensor([row])) / len(present)
            own = torch.stack([p[b], *(n[b, i] for i in range(N) if negative_mask[b, i])])
            hard = hard + weight * F.cross_entropy((own @ q[b] / temperature)[None], torch.tensor([0])) / len(present)
    return in_batch, hard


def assert_same_gradients(ours, torch_embeddings, tolerance=2e-5):
    for role, got, e in zip(Embeddings._fields, ours, torch_embeddings, strict=True):
        want = np.zeros(e.shape) if e.grad is None else e.grad.numpy()
        np.testing.assert_allclose(got, want, atol=tolerance * max(np.abs(want).max(), 1e-3), rtol=0, err_msg=role)


# Compiled once a configuration, whatever exists.
contrastive_and_gradients = jax.jit(jax.value_and_grad(contrastive, has_aux=True), static_argnums=2)


@pytest.mark.parametrize("weight", [1.0, 0.0])
@pytest.mark.parametrize("full", [True, False], ids=["all present", "some absent"])
@pytest.mark.parametrize(
    ("dims", "temperature", "passage_grad"), [((), 0.05, "full"), (DIMS, 0.05, "full"), (DIMS, 0.05, "none"), ((8, 20), 0.3, "full")]
)
def test_contrastive_is_the_published_one(dims, temperature, passage_grad, full, weight):
    embeddings, (samples, negatives) = random_embeddings(0), masks(full)
    objective = ContrastiveConfig(temperature=temperature, dims=dims, in_batch_passage_grad=passage_grad)
    (got, parts), gradients = contrastive_and_gradients(embeddings, of(samples, negatives, weight), objective)
    e = in_torch(embeddings)
    in_batch, hard = oracle(e, samples, negatives, dims or (D,), temperature, passage_grad == "none")
    want = weight * in_batch + hard
    want.backward()
    np.testing.assert_allclose(got, want.item(), rtol=2e-6)
    np.testing.assert_allclose(parts["hard"].value, hard.item(), rtol=2e-6)
    np.testing.assert_allclose(parts["in_batch"].value, weight * in_batch.item(), rtol=2e-6)
    assert (parts["hard"].count, parts["in_batch"].count) == (sum(samples), weight * sum(samples))
    assert_same_gradients(gradients, e)


def test_passages_get_no_in_batch_gradient_with_none():
    """The two settings differ in the gradient of passages by exactly the in-batch term, and in no value."""
    embeddings, (samples, negatives) = random_embeddings(1), masks()
    results = {}
    for passage_grad in ("full", "none"):
        objective = ContrastiveConfig(dims=DIMS, in_batch_passage_grad=passage_grad)
        (value, _), gradients = contrastive_and_gradients(embeddings, of(samples, negatives), objective)
        results[passage_grad] = value, gradients
    assert results["full"][0] == results["none"][0]
    np.testing.assert_array_equal(results["full"][1].query, results["none"][1].query)
    np.testing.assert_array_equal(results["full"][1].negatives, results["none"][1].negatives)
    e = in_torch(embeddings)
    oracle(e, samples, negatives, DIMS)[0].backward()
    difference = results["full"][1].passage - results["none"][1].passage
    np.testing.assert_allclose(difference, e.passage.grad, atol=1e-5)
    assert np.abs(difference).max() > 0.01


@pytest.mark.parametrize("filler", [0.0, 1e4])
def test_what_does_not_exist_counts_for_nothing(filler):
    """Whatever its embedding: no value changes, its own gradient is 0, and nothing becomes NaN at zero vectors."""
    embeddings, (samples, negatives) = random_embeddings(2), masks()
    blank = Embeddings(
        *(jnp.where(mask[..., None] > 0, x, filler) for x, mask in zip(embeddings, (samples, samples, negatives), strict=True))
    )

    @jax.jit
    @jax.value_and_grad
    def step(e):
        total, _ = contrastive(e, of(samples, negatives), ContrastiveConfig(dims=DIMS))
        return total + mse(e, random_embeddings(3), samples, negatives).value

    (want, want_gradients), (got, gradients) = step(embeddings), step(blank)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for role, mask in zip(Embeddings._fields, (samples, samples, negatives), strict=True):
        gradient = getattr(gradients, role)
        np.testing.assert_array_equal(gradient[mask == 0], 0)
        np.testing.assert_allclose(gradient, getattr(want_gradients, role), rtol=1e-5, atol=1e-6)


def test_a_batch_of_nothing_has_loss_0():
    embeddings, nothing = random_embeddings(4), (jnp.zeros(B), jnp.zeros((B, N)))
    total, _ = contrastive(embeddings, of(*nothing), ContrastiveConfig())
    assert total == 0 == mse(embeddings, random_embeddings(5), *nothing).value


class Given(torch.nn.Module):
    """What sentence-transformers' losses take for a model: embeddings go in and come out."""

    def forward(self, features):
        return {"sentence_embedding": features["embedding"]}

    def get_embedding_dimension(self):
        return D


@pytest.mark.parametrize("hard_weight", [0.0, 0.3])
def test_a_pool_with_all_negatives_and_no_softmax_of_their_own_is_the_ranking_loss_with_negatives(hard_weight):
    """Of retrieval. Kinds without in-batch negatives keep the hard softmax, whole, as all that they learn from."""
    embeddings, (samples, negatives) = random_embeddings(6), masks(full=True)
    config = ContrastiveConfig(dims=(D,), in_batch_pool="positives_and_negatives", hard_weight=hard_weight)
    e = in_torch(embeddings)
    columns = [e.query, e.passage, *e.negatives.unbind(1)]
    want = MultipleNegativesRankingLoss(Given(), scale=20.0)([{"embedding": column} for column in columns], torch.empty(0))
    for b in range(B):
        own = torch.stack([e.passage[b], *e.negatives[b]])
        logits = 20.0 * torch.nn.functional.cosine_similarity(e.query[b][None], own)
        want = want + hard_weight / B * torch.nn.functional.cross_entropy(logits, torch.tensor(0))
    want.backward()

    (total, _), gradients = contrastive_and_gradients(embeddings, of(samples, negatives), config)
    np.testing.assert_allclose(total, want.item(), rtol=2e-6)
    assert_same_gradients(gradients, e)
    others = dataclasses.replace(of(samples, negatives), in_batch_weight=jnp.float32(0))
    total, parts = contrastive(embeddings, others, config)
    assert total == parts["hard"].value > 0


@pytest.mark.parametrize("dims", [(D,), DIMS])
def test_terms_are_those_of_sentence_transformers(dims):
    """The in-batch term is its ranking loss at scale 20; the hard one is the same loss on one sample and its negatives."""
    embeddings, (samples, negatives) = random_embeddings(6), masks(full=True)
    given = Given()
    peer = MatryoshkaLoss(given, MultipleNegativesRankingLoss(given, scale=20.0), dims, matryoshka_weights(dims))
    columns = lambda *tensors: [{"embedding": t} for t in tensors]  # noqa: E731
    e = in_torch(embeddings)
    in_batch = peer(columns(e.query, e.passage), torch.empty(0))
    hard = sum(
        peer(columns(e.query[b : b + 1], e.passage[b : b + 1], *e.negatives[b].split(1)), torch.empty(0)) for b in range(B)
    )  # fmt: skip
    (in_batch + hard / B).backward()

    (_, parts), gradients = contrastive_and_gradients(embeddings, of(samples, negatives), ContrastiveConfig(dims=dims))
    np.testing.assert_allclose(parts["in_batch"].value, in_batch.item(), rtol=2e-6)
    np.testing.assert_allclose(parts["hard"].value, hard.item() / B, rtol=2e-6)
    assert_same_gradients(gradients, e)


@pytest.mark.parametrize("full", [True, False], ids=["all present", "some absent"])
def test_distillation_is_the_mean_squared_error_of_raw_embeddings(full):
    """One mean each for queries, positives and negatives; a wider teacher is cut to the student's width and gets no gradient."""
    student, teacher, (samples, negatives) = random_embeddings(7), random_embeddings(8, width=D + 12), masks(full)
    got, (gradients, to_teacher) = jax.value_and_grad(lambda s, t: mse(s, t, samples, negatives).value, argnums=(0, 1))(student, teacher)
    s, t = in_torch(student), in_torch(teacher)
    present = [torch.tensor(np.asarray(mask)) > 0 for mask in (samples, samples, negatives)]
    want = sum(F.mse_loss(a[mask], b[..., :D][mask].detach()) for a, b, mask in zip(s, t, present, strict=True))
    want.backward()
    np.testing.assert_allclose(got, want.item(), rtol=1e-6)
    assert_same_gradients(gradients, s)
    assert all((np.asarray(g) == 0).all() for g in to_teacher)


def test_eight_devices_compute_what_one_does():
    embeddings, teacher, (samples, negatives) = random_embeddings(9), random_embeddings(10), masks()
    margin = ContrastiveConfig(dims=DIMS, in_batch_pool="positives_and_negatives", mask_false_negatives=True, false_negative_margin=0.2)

    def loss(e, samples, negatives):
        everything = [
            objectives.total(
                e, of(samples, negatives), Objective(contrastive=c, distillation=d, distillation_weight=2, spread_out_weight=3), teacher
            )
            for c, d in ((ContrastiveConfig(dims=DIMS), "mse"), (margin, "scores"), (ContrastiveConfig(), "cosine"))
        ]
        return sum(total for total, _ in everything), [parts for _, parts in everything]

    step = jax.value_and_grad(loss, has_aux=True)
    want = jax.jit(step)(embeddings, samples, negatives)
    mesh = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        everywhere = jax.tree.map(lambda x: sharding.to_global(np.asarray(x), mesh, sharding.P()), embeddings)
        split = (sharding.to_global(np.asarray(m), mesh, sharding.P(sharding.BATCH)) for m in (samples, negatives))
        got = jax.jit(step)(everywhere, *split)
    for one, many in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-6)


def test_a_mean_is_taken_once():
    assert Mean(jnp.float32(6), jnp.float32(4)).value == 1.5
    assert Mean(jnp.float32(0), jnp.float32(0)).value == 0


# Sums and columns, largest width first, that the reference worked out by hand from the published code.
SUMS = {320: 1.893, 640: 1.907, 896: 1.767, 1024: 1.717, 2048: 1.724, 2560: 1.921, 4096: 1.728, 5120: 1.925}
COLUMNS = {
    320: [1, 0.4472, 0.2108, 0.1118, 0.0632, 0.0373, 0.0226],
    896: [1, 0.3780, 0.1782, 0.0945, 0.0535, 0.0315, 0.0191, 0.0118],
    1024: [1, 0.3536, 0.1667, 0.0884, 0.0500, 0.0295, 0.0179, 0.0110],
}


@pytest.mark.parametrize("width", SUMS)
def test_matryoshka_weights_are_the_published_ones(width):
    dims = matryoshka_dims(width)
    weights = matryoshka_weights(dims)
    assert dims == (*(d for d in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096) if d < width), width)
    np.testing.assert_allclose(sum(weights), SUMS[width], atol=6e-4)
    np.testing.assert_allclose(weights[::-1], COLUMNS.get(width, weights[::-1]), atol=6e-5)


def test_matryoshka_widths_have_edges():
    assert matryoshka_dims(64, minimum=16) == (16, 32, 64)
    assert matryoshka_dims(8) == (8,) and matryoshka_dims(5) == (5,)
    assert matryoshka_weights((7,)) == (1.0,)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"in_batch_passage_grad": "half"}, "'half' must be one of 'full', 'none'"),
        ({"in_batch_pool": "all"}, "'all' must be one of 'positives'"),
        ({"hard_weight": -1.0}, "hard_weight=-1.0 must be a number from 0"),
        ({"hard_weight": 0.0}, "hard_weight=0 leaves the hard negatives of retrieval out of every loss; set in_batch_pool"),
        ({"dims": (8, 16), "weights": (1.0,)}, "1 matryoshka weights for 2 dims"),
    ],
)
def test_an_objective_out_of_range_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveConfig(**wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"distillation": "kl"}, "'kl' must be one of 'mse', 'cosine', 'scores'"),
        ({"distillation_weight": -1.0}, "distillation_weight=-1.0 must not be negative"),
        ({"spread_out_weight": float("nan")}, "spread_out_weight=nan must not be negative"),
    ],
)
def test_a_term_out_of_range_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Objective(**wrong)


@pytest.mark.parametrize("dims", [(8, 4), (4, 4), (0, 8), (8, D + 1)])
def test_widths_that_do_not_ascend_within_the_embedding_are_refused(dims):
    with pytest.raises(ValueError, match="must ascend without repeats"):
        check_dims(dims, D)
