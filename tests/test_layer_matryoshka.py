"""Every depth is the model that ends there, and the loss is the mean over depths."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from small_batches import TEXTS, B, N, packed, shallow

from f2llm_jax import sharding
from f2llm_jax.batch import Batch, Samples
from f2llm_jax.errors import UserError
from f2llm_jax.model.chunk_encoder import ChunkEncoder, layer_matryoshka
from f2llm_jax.model.decoder import init_decoder
from f2llm_jax.model.encoder import encode
from f2llm_jax.objectives import ContrastiveConfig, Objective
from f2llm_jax.training import program
from f2llm_jax.training.optimizer import OptimizerConfig, make_optimizer
from f2llm_jax.training.step import Teacher, TrainState, by_depth, make_train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")
DEPTHS = (1, 2, 3)


def encoder(config, layers=()):
    return ChunkEncoder(config, jnp.float32, "full", layers)


@pytest.fixture(scope="module")
def params():
    return init_decoder(tiny.CONFIG, 0)


def test_each_depth_is_the_shallower_model(params):
    texts = packed(2)
    deep = jax.jit(lambda p, t: encode(encoder(tiny.CONFIG, DEPTHS), p, t, TEXTS))(params, texts)
    assert deep.shape == (TEXTS, len(DEPTHS), tiny.CONFIG.hidden_size)
    for j, depth in enumerate(DEPTHS):
        config, cut = shallow(params, depth)
        alone = jax.jit(lambda p, t, config=config: encode(encoder(config), p, t, TEXTS))(cut, texts)
        np.testing.assert_allclose(deep[:, j], alone, atol=2e-6)


def test_the_loss_is_the_mean_over_depths(params):
    ids = jnp.arange(B), jnp.arange(B, B + B * N).reshape(B, N)
    batch = Batch(packed(2), Samples(jnp.ones(B).at[3].set(0), jnp.ones((B, N)).at[3].set(0), jnp.float32(1), *ids))
    objective = Objective(contrastive=ContrastiveConfig(dims=(8, 64)))
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, total_steps=9)

    def step(config, weights, layers=()):
        state = TrainState(jnp.int32(0), weights, make_optimizer(optimizer).init(weights))
        return jax.jit(make_train_step(encoder(config, layers), objective, optimizer))(state, None, batch)[1]

    got = step(tiny.CONFIG, params, DEPTHS)
    alone = [step(*shallow(params, depth)) for depth in DEPTHS]
    np.testing.assert_allclose(got["loss"].value, np.mean([m["loss"].value for m in alone]), rtol=1e-6)
    np.testing.assert_allclose(got["hard"].value, alone[-1]["hard"].value, rtol=1e-6)


def torch_losses(student, teacher, there, weight):
    """ML-Embed `utils.py` in float64: the two softmaxes and the three means of squared errors, for one depth of each."""
    query, passage, negatives = (torch.tensor(np.asarray(e, np.float64)) for e in student)
    target = [torch.tensor(np.asarray(e, np.float64))[..., : query.shape[-1]] for e in teacher]
    unit = lambda x: torch.nn.functional.normalize(x, dim=-1)  # noqa: E731
    query, passage, negatives, *target = (x[there] for x in (query, passage, negatives, *target))
    in_batch = torch.nn.functional.cross_entropy(unit(query) @ unit(passage).T / 0.05, torch.arange(len(query)))
    candidates = torch.cat([passage[:, None], negatives], 1)
    logits = torch.einsum("bd,bnd->bn", unit(query), unit(candidates)) / 0.05
    hard = torch.nn.functional.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))
    followed = sum(torch.nn.functional.mse_loss(s, t) for s, t in zip((query, passage, negatives), target, strict=True))
    return in_batch + hard + weight * followed


def test_each_depth_follows_the_teachers_of_its_place(params):
    """Against float64 torch: a teacher of five layers, half as wide again, has depths 1, 2, 4, 5; the last three are followed."""
    large = dataclasses.replace(tiny.CONFIG, hidden_size=96, num_hidden_layers=5)
    teacher_params = init_decoder(large, 7)
    ids = jnp.arange(B), jnp.arange(B, B + B * N).reshape(B, N)
    there = np.arange(B) != 3
    batch = Batch(packed(2), Samples(jnp.asarray(there, jnp.float32), jnp.ones((B, N)).at[3].set(0), jnp.float32(1), *ids))
    objective = Objective(contrastive=ContrastiveConfig(), distillation_weight=0.5)
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, total_steps=9)
    followed = program.followed_depths(DEPTHS, large)
    assert followed == (2, 4, 5)
    step = make_train_step(encoder(tiny.CONFIG, DEPTHS), objective, optimizer, Teacher(encoder(large, followed)))
    state = TrainState(jnp.int32(0), params, make_optimizer(optimizer).init(params))
    got = jax.jit(step)(state, teacher_params, batch)[1]["loss"].value
    of = lambda config, weights, layers: by_depth(  # noqa: E731
        jax.jit(lambda p, t: encode(encoder(config, layers), p, t, TEXTS))(weights, packed(2)), batch.samples.negative_mask
    )
    student, teacher = of(tiny.CONFIG, params, DEPTHS), of(large, teacher_params, followed)
    want = np.mean([float(torch_losses(s, t, there, 0.5)) for s, t in zip(student, teacher, strict=True)])
    np.testing.assert_allclose(got, want, rtol=1e-5)
    last = np.mean([float(torch_losses(s, teacher[-1], there, 0.5)) for s in student])
    assert abs(last / want - 1) > 1e-3  # every depth following the last is another loss


def test_a_teacher_with_too_few_depths_is_refused():
    with pytest.raises(UserError, match=r"the student trains 3 depths .* and the teacher has 2 to follow"):
        program.followed_depths(DEPTHS, dataclasses.replace(tiny.CONFIG, num_hidden_layers=2))


@pytest.mark.slow
def test_on_a_mesh_a_step_is_that_of_one_device():
    ids = np.arange(B, dtype=np.int32), np.arange(B, B + B * N, dtype=np.int32).reshape(B, N)
    batch = Batch(packed(2), Samples(np.ones(B, np.float32), np.ones((B, N), np.float32), np.float32(1), *ids))
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, total_steps=9)
    step = make_train_step(encoder(tiny.CONFIG, DEPTHS), Objective(contrastive=ContrastiveConfig(dims=(8, 64))), optimizer)

    def metrics(mesh):
        weights = init_decoder(tiny.CONFIG, 0, mesh)
        state = TrainState(jnp.int32(0), weights, make_optimizer(optimizer).init(weights))
        return jax.jit(step)(state, None, sharding.batch_to_devices(batch, mesh))[1]

    alone, mesh = metrics(None), sharding.make_mesh(2, 1, 2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        together = metrics(mesh)
    for name in ("loss", "hard", "grad_norm"):
        np.testing.assert_allclose(together[name].value, alone[name].value, rtol=1e-5)


def test_published_depths():
    assert layer_matryoshka(28) == (1, 2, 4, 8, 16, 24, 28)
    assert layer_matryoshka(36) == (1, 2, 4, 8, 16, 24, 32, 36)
    assert layer_matryoshka(1) == (1,) and layer_matryoshka(8) == (1, 2, 4, 8)
