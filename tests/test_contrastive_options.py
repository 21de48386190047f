"""Guide, hardness, focal weighting, query and document negatives: each against float64 torch, pair by pair, and sentence-transformers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_samples import DIMS, B, D, N, masks, of, random_embeddings
from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss, MatryoshkaLoss, MultipleNegativesRankingLoss

from f2llm_jax import sharding
from f2llm_jax.configs import common
from f2llm_jax.errors import UserError
from f2llm_jax.model.sizes import SIZES
from f2llm_jax.objectives import ContrastiveConfig, Embeddings, Objective, candidates, matryoshka_weights, total
from f2llm_jax.objectives.contrastive import contrastive
from f2llm_jax.training import program

pytestmark = pytest.mark.usefixtures("quick_compilation")
TAU = 0.05
OPTIONS = {
    "guide": {"guide": "absolute"},
    "guide, margin": {"guide": "absolute", "guide_margin": 0.1},
    "guide, relative margin": {"guide": "relative", "guide_margin": 0.3},
    "guide, everybody's negatives": {"guide": "relative", "in_batch_pool": "positives_and_negatives", "guide_margin": -0.2},
    "hardness": {"hardness": 5.0, "in_batch_pool": "positives_and_negatives"},
    "focal": {"focal": 0.5},
    "focal of 2": {"focal": 2.0},
    "queries": {"query_negatives": True},
    "positives masked": {"positives": "masked"},
    "positives joint": {"positives": "joint", "in_batch_pool": "positives_and_negatives", "query_negatives": True},
    "documents": {"document_negatives": True, "in_batch_pool": "positives_and_negatives"},
    "all": {
        "guide": "absolute",
        "hardness": 2.0,
        "focal": 1.0,
        "query_negatives": True,
        "document_negatives": True,
        "mask_false_negatives": True,
        "false_negative_margin": 0.2,
        "in_batch_pool": "positives_and_negatives",
    },
}
QUERIES = [0, 1, 0, 3, 4, 3, 1, 3]  # rows 1 and 6 are of one query, and 0 and 2, and 3, 5 and 7; 2 and 7 are absent
# One document is the positive of two samples, and a negative of a third.
IDS = {"passage_ids": [0, 0, 2, 3, 4, 5, 6, 7], "negative_ids": np.arange(B, B + B * N).reshape(B, N).tolist()}
IDS["negative_ids"][3][1] = 0
FAST = "guide, relative margin", "all"  # the others compile a program each


def of_samples(here, there):
    return dataclasses.replace(of(here, there, **IDS), query_ids=jnp.asarray(QUERIES))


compiled = jax.jit(jax.value_and_grad(contrastive, has_aux=True), static_argnums=2)


def in_torch(embeddings):
    return Embeddings(*(torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True) for x in embeddings))


def oracle(e, guide, samples, config):
    """`(in_batch, hard)`, pair by pair with lists of what exists instead of masks."""
    here = [b for b in range(B) if samples.sample_mask[b]]
    there = [(b, i) for b in here for i in range(N) if samples.negative_mask[b, i]]
    unit = lambda x: F.normalize(x, dim=-1)  # noqa: E731
    whole, guides = Embeddings(*map(unit, e)), Embeddings(*(unit(torch.tensor(np.asarray(x), dtype=torch.float64)) for x in guide))
    text = {("p", b): int(samples.passage_ids[b]) for b in here} | {("q", b): int(samples.passage_ids[b]) for b in here}
    text |= {("n", *at): int(samples.negative_ids[at]) for at in there}

    def vector(x, name):
        return {"q": x.query, "p": x.passage, "n": x.negatives}[name[0]][name[1:]]

    def cosine(x, pair):
        return vector(x, pair[0]) @ vector(x, pair[1])

    def kept(b, pair):
        positive = ("q", b), ("p", b)
        if config.mask_false_negatives and text[pair[1]] == text["p", b]:
            return False
        if cosine(whole, pair) > cosine(whole, positive) + config.false_negative_margin:
            return False
        own = cosine(guides, positive)
        margin = config.guide_margin * (abs(own) if config.guide == "relative" else 1)
        return not config.guide or cosine(guides, pair) <= own - margin

    def pool(b):
        siblings = [c for c in here if c != b and QUERIES[c] == QUERIES[b]]
        left_out = siblings if config.positives != "own" else []
        positives = [("p", c) for c in here if c != b and c not in left_out]
        everybody = config.in_batch_pool == "positives_and_negatives"
        pairs = [(("q", b), name) for name in positives + [("n", *at) for at in there if everybody]]
        pairs += [(("q", b), ("q", c)) for c in here if c != b and config.query_negatives and c not in siblings]
        documents = positives + [("n", *at) for at in there if everybody and at[0] != b]
        return pairs + [(("p", b), name) for name in documents if config.document_negatives]

    terms = torch.zeros(2, dtype=torch.float64)
    for rank, width in enumerate(sorted(config.dims or (D,), reverse=True), start=1):
        narrow = Embeddings(*(unit(x[..., :width]) for x in e))
        for b in here:
            for term, pairs in enumerate((pool(b), [(("q", b), ("n", b, i)) for i in range(N) if (b, i) in there])):
                logits = [cosine(narrow, (("q", b), ("p", b))) / TAU]
                for pair in filter(lambda pair, b=b: kept(b, pair), pairs):
                    own_negative = pair[1][:2] == ("n", b) and pair[0][0] == "q"
                    found = cosine(narrow, pair)
                    logits.append(found / TAU + own_negative * config.hardness * found.detach())
                right = logits[:1]
                if config.positives == "joint" and term == 0:
                    more = [cosine(narrow, (("q", b), ("p", c))) / TAU for c in here if c != b and QUERIES[c] == QUERIES[b]]
                    right, logits = right + more, logits + more
                loss = torch.logsumexp(torch.stack(logits), 0) - torch.logsumexp(torch.stack(right), 0)
                weight = (1 - torch.exp(-loss)) ** config.focal if config.focal and len(logits) > 1 else 1
                share = 1 / (rank * math.sqrt((config.dims or (D,))[-1] / width)) / len(here)
                terms = terms + torch.eye(2, dtype=torch.float64)[term] * weight * loss * share
    return terms


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in OPTIONS])
def test_value_and_gradient(name):
    options = OPTIONS[name]
    e, guide, samples = random_embeddings(0), random_embeddings(1, width=D + 8), of_samples(*masks())
    config = ContrastiveConfig(dims=(8, D), **options)
    (_, parts), gradients = compiled(e, samples, config, guide)
    there = in_torch(e)
    want = oracle(there, guide, samples, config)
    want.sum().backward()
    np.testing.assert_allclose([parts["in_batch"].value, parts["hard"].value], want.detach(), rtol=5e-6)
    for got, x in zip(gradients, there, strict=True):
        np.testing.assert_allclose(got, x.grad, atol=2e-5 * x.grad.abs().max().item(), rtol=0)
    plain = contrastive(e, samples, ContrastiveConfig(dims=(8, D), in_batch_pool=config.in_batch_pool))[1]
    terms = ("hard",) if options.keys() == {"hardness"} else ("in_batch",)
    assert all(abs(plain[name].value - parts[name].value) > 1e-4 for name in terms)  # the option does something here


def test_a_guide_gets_no_gradient_and_is_not_read_without_the_option():
    e, samples = random_embeddings(2), of(*masks())
    guided = lambda guide: contrastive(e, samples, ContrastiveConfig(guide="absolute"), guide)[0]  # noqa: E731
    assert not any(np.asarray(gradient).any() for gradient in jax.grad(guided)(random_embeddings(3)))
    broken = Embeddings(*(jnp.full_like(x, jnp.nan) for x in e))
    assert contrastive(e, samples, ContrastiveConfig(), broken)[0] == contrastive(e, samples, ContrastiveConfig())[0]
    assert contrastive(e, samples, ContrastiveConfig(guide="absolute"))[0] == contrastive(e, samples, ContrastiveConfig())[0]


def test_what_is_left_out_is_counted():
    """Sample 0's guide holds one other positive and one own negative to be nearer than the positive."""
    e, guide, samples = random_embeddings(4), random_embeddings(5), of(np.ones(B, np.float32), np.ones((B, N), np.float32))
    query = jnp.eye(B, D)
    guide = Embeddings(query, 0.9 * query + 0.4 * jnp.eye(B, D, k=B), -jnp.ones((B, N, D)))
    guide = guide._replace(passage=guide.passage.at[5].set(query[0]), negatives=guide.negatives.at[0, 2].set(query[0]))
    _, parts = contrastive(e, samples, ContrastiveConfig(guide="absolute"), guide)
    # Sample 5's own positive is orthogonal to its query: the six others that are orthogonal too are no nearer, and stay.
    assert (parts["masked_negatives"].sum, parts["masked_negatives"].count) == (1, B * (B - 1))
    assert (parts["masked_hard_negatives"].sum, parts["masked_hard_negatives"].count) == (1, B * N)


@pytest.mark.slow
def test_focal_is_finite_where_nothing_is_left():
    """A sample without negatives has p = 1; the slope of `(1 - p) ** 0.5` there is not finite."""
    e, samples = random_embeddings(6), of(*masks())
    value, gradients = jax.value_and_grad(lambda e: contrastive(e, samples, ContrastiveConfig(focal=0.5))[0])(e)
    assert np.isfinite(value) and all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.slow
def test_blocks_and_devices_change_nothing(monkeypatch):
    e, guide, (here, there) = random_embeddings(7), random_embeddings(8, width=D + 8), masks()
    config = ContrastiveConfig(dims=DIMS, **OPTIONS["all"], positives="joint")

    def loss(e, guide, here, there):
        return contrastive(e, of_samples(here, there), config, guide)

    step = jax.value_and_grad(loss, has_aux=True)
    want = jax.jit(step)(e, guide, here, there)
    monkeypatch.setattr(candidates, "BLOCK", 3)
    mesh = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        everywhere = jax.tree.map(lambda x: sharding.to_global(np.asarray(x), mesh, sharding.P()), (e, guide))
        split = (sharding.to_global(np.asarray(m), mesh, sharding.P(sharding.BATCH)) for m in (here, there))
        got = jax.jit(step)(*everywhere, *split)
    for one, many in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(many, one, rtol=2e-5, atol=2e-6)


class Given(torch.nn.Module):
    """What sentence-transformers' losses take for a model: embeddings go in and come out."""

    def __init__(self, name="embedding"):
        super().__init__()
        self.name = name

    def forward(self, features):
        return {"sentence_embedding": features[self.name]}

    def get_embedding_dimension(self):
        return D


def assert_same(loss, columns, config, e, samples, guide=None, hard=0.0):
    """Our in-batch term and its gradient are the peer's loss, at all widths."""
    given = MatryoshkaLoss(loss.model, loss, config.dims, matryoshka_weights(config.dims))
    want = given(columns, torch.empty(0))
    want.backward()
    (got, _), gradients = jax.value_and_grad(lambda e: (contrastive(e, samples, config, guide)[1]["in_batch"].value, 0), has_aux=True)(e)
    np.testing.assert_allclose(got, want.item(), rtol=5e-6)
    tensors = [column["embedding"].grad for column in columns]
    theirs = [*tensors[:2], torch.stack(tensors[2:], 1) if len(tensors) > 2 else torch.zeros(B, N, D)]
    for ours, x in zip(gradients, theirs, strict=True):
        np.testing.assert_allclose(ours, x, atol=2e-5 * max(x.abs().max().item(), 1e-3), rtol=0)


def columns_of(e, guide=None, negatives=0):
    def tensors(x):
        return [x.query, x.passage, *(x.negatives[:, i] for i in range(negatives))]

    found = [{"embedding": torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True)} for x in tensors(e)]
    for column, x in zip(found, tensors(guide) if guide else (), strict=bool(guide)):
        column["guide"] = torch.tensor(np.asarray(x), dtype=torch.float64)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("negatives", [False, True])
def test_query_and_document_negatives_are_those_of_sentence_transformers(negatives):
    """Its joint softmax of three directions; with negatives, everybody's are in the pool and the documents of a query spare each other."""
    e, samples = random_embeddings(9), of(np.ones(B, np.float32), np.ones((B, N), np.float32))
    directions = ("query_to_doc", "query_to_query", "doc_to_doc")
    loss = MultipleNegativesRankingLoss(Given(), scale=1 / TAU, directions=directions)
    pool = "positives_and_negatives" if negatives else "positives"
    config = ContrastiveConfig(dims=DIMS, in_batch_pool=pool, query_negatives=True, document_negatives=True)
    assert_same(loss, columns_of(e, negatives=N * negatives), config, e, samples)


@pytest.mark.slow
def test_hardness_is_that_of_sentence_transformers():
    e, samples = random_embeddings(10), of(np.ones(B, np.float32), np.ones((B, N), np.float32))
    loss = MultipleNegativesRankingLoss(Given(), scale=1 / TAU, hardness_mode="hard_negatives", hardness_strength=5.0)
    config = ContrastiveConfig(dims=DIMS, in_batch_pool="positives_and_negatives", hardness=5.0)
    assert_same(loss, columns_of(e, negatives=N), config, e, samples)


@pytest.mark.parametrize("strategy", [pytest.param("absolute", marks=pytest.mark.slow), "relative"])
def test_the_guide_is_that_of_sentence_transformers(strategy):
    """GISTEmbedLoss on pairs, its queries and documents contrasted too; its tokenizer plays no part in what it computes."""
    e, guide, samples = random_embeddings(11), random_embeddings(12), of(np.ones(B, np.float32), np.ones((B, N), np.float32))
    loss = GISTEmbedLoss.__new__(GISTEmbedLoss)
    torch.nn.Module.__init__(loss)
    loss.model, loss.guide, loss.must_retokenize = Given(), Given("guide"), False
    loss.temperature, loss.margin_strategy, loss.margin = TAU, strategy, 0.1
    loss.contrast_anchors = loss.contrast_positives = True
    loss.gather_across_devices, loss.similarity_fct, loss.cross_entropy_loss = (
        False,
        torch.nn.CosineSimilarity(dim=-1),
        torch.nn.CrossEntropyLoss(),
    )
    config = ContrastiveConfig(dims=(8, D), guide=strategy, guide_margin=0.1, query_negatives=True, document_negatives=True)
    assert_same(loss, columns_of(e, guide), config, e, samples, guide)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"guide": "teacher"}, "guide='teacher' must be one of '', 'absolute', 'relative'"),
        ({"guide_margin": 0.1}, "guide_margin=0.1 has no effect without a guide"),
        ({"guide": "absolute", "guide_margin": float("nan")}, "guide_margin=nan must be finite"),
        ({"hardness": -1.0}, "hardness=-1.0 must be a number from 0"),
        ({"focal": float("inf")}, "focal=inf must be a number from 0"),
    ],
)
def test_an_option_out_of_range_is_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        ContrastiveConfig(**wrong)


def test_a_guide_without_a_model_and_equal_queries_without_ids_are_refused():
    config = common.base("80m", runlocal=True, stage=1)
    config.objective.guide = "absolute"
    with pytest.raises(UserError, match=r"guide='absolute' needs a model that guides: set config\.teacher or config\.teacher_cache"):
        program.build(config, SIZES["toy"], 10, "cpu")
    assert program.build(config, SIZES["toy"], 10, "cpu", cached=True)
    with pytest.raises(UserError, match="prepare it again with --overwrite, or set it to 'own'"):
        total(random_embeddings(0), of(*masks()), Objective(contrastive=ContrastiveConfig(positives="joint")))
