"""Model FLOPs against a count of the matrix products that JAX traces."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.extend import core

from f2llm_jax.model.chunk_encoder import ChunkEncoder
from f2llm_jax.model.decoder import count_parameters, init_decoder
from f2llm_jax.model.flops import PEAK_FLOPS, Work, forward_flops, layer_parameters, training_flops
from f2llm_jax.model.sizes import SIZES
from f2llm_jax.training import metrics

R, T = 3, 16


def traced_flops(jaxpr):
    """Of every `dot_general` with a contraction; a scan's as often as it runs. The scaling by norms contracts nothing."""
    total = 0
    for equation in jaxpr.eqns:
        inner = [value for value in equation.params.values() if isinstance(value, core.Jaxpr | core.ClosedJaxpr)]
        times = equation.params.get("length", 1)
        total += times * sum(traced_flops(one.jaxpr if isinstance(one, core.ClosedJaxpr) else one) for one in inner)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            over = np.prod([left[axis] for axis in contracted], dtype=float)
            total += 2 * np.prod(equation.outvars[0].aval.shape) * over if contracted else 0
    return total


@pytest.mark.parametrize("config", [tiny.CONFIG, dataclasses.replace(tiny.CONFIG, num_attention_heads=8, hidden_size=48)])
def test_forward_and_training_are_what_is_traced(config):
    """Full rows, one text each: the program computes the whole square of attention, of which the model needs half."""
    rows = [jnp.zeros((R, T), jnp.int32)] * 2 + [jnp.ones((R, T), jnp.int32), jnp.full((R, 1), T - 1)]
    params = init_decoder(config, 0)
    encode = ChunkEncoder(config, jnp.float32, "none")
    work = Work(R * T, R * T * T)
    half = config.num_hidden_layers * 2 * config.num_attention_heads * config.head_dim * work.squares
    heads = config.num_attention_heads + config.num_key_value_heads
    rotations = 2 * config.num_hidden_layers * heads * config.head_dim**2 * R * T  # an exchange of halves, which the model does not need
    assert traced_flops(jax.make_jaxpr(encode)(params, *rows).jaxpr) == forward_flops(config, work) + half + rotations
    gradient = jax.make_jaxpr(jax.grad(lambda p: encode(p, *rows).sum()))(params)
    scales = 2 * R * T * config.hidden_size  # gradients of norms' scales, sums that are written as products; small
    extra = traced_flops(gradient.jaxpr) - 3 * half - 2 * rotations - training_flops(config, work)
    assert 0 <= extra <= 20 * config.num_hidden_layers * scales


def test_a_text_costs_its_tokens_and_its_square():
    config = SIZES["0.6b"]
    one, two = forward_flops(config, Work(100, 100**2)), forward_flops(config, Work(200, 2 * 100**2))
    assert two == 2 * one < forward_flops(config, Work(200, 200**2))
    table_and_norms = config.vocab_size * config.hidden_size + config.hidden_size
    norms = 2 * config.hidden_size + 2 * config.head_dim
    assert count_parameters(config) == table_and_norms + config.num_hidden_layers * (layer_parameters(config) + norms)


def test_timings_know_model_flops_and_mfu(tmp_path, monkeypatch):
    kind = jax.devices()[0].device_kind
    monkeypatch.setitem(PEAK_FLOPS, kind, 1e9)
    clock = iter(np.arange(100.0))
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    means = {"skipped": metrics.Mean(np.float32(0), np.float32(1))}
    with metrics.Recorder(tmp_path, 0, 9, 1, 2) as recorder:
        for step in (1, 2, 3):
            recorder.step(step, means, {}, metrics.StepWork(tokens=10, padded_tokens=20, model_flops=4e9, input_wait=0.0))
    last = json.loads((tmp_path / "timings.jsonl").read_text().splitlines()[-1])
    assert last["tokens_per_second"] == 10 and last["token_efficiency"] == 0.5 and last["model_flops_per_second"] == 4e9
    assert last["mfu"] == 4 / jax.device_count()
