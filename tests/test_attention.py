"""The attention kernels against each other: values, gradients, packed segments, grouped heads, with a mesh and without."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from f2llm_jax import sharding
from f2llm_jax.model import attention
from f2llm_jax.model.decoder import REMAT_POLICIES

R, T, H, K, E = 4, 256, 4, 2, 128
LENGTHS = ((256,), (100, 31, 119), (1, 127, 1, 127), (130,))  # of the texts of a row; the rest is padding


@pytest.fixture(scope="module", autouse=True)
def splash_in_interpret_mode():
    with pytest.MonkeyPatch.context() as patch:
        made = functools.partial(splash_attention_kernel.make_splash_mha, interpret=True)
        patch.setattr(splash_attention_kernel, "make_splash_mha", made)
        yield


def segment_ids():
    ids = np.zeros((R, T), np.int32)
    for row, lengths in enumerate(LENGTHS):
        ends = np.cumsum(lengths)
        for number, (end, length) in enumerate(zip(ends, lengths, strict=True), 1):
            ids[row, end - length : end] = number
    return ids


def values_and_gradients(kernel, dtype, mesh=None):
    """Of attention to a random direction, for real positions; numpy fp32."""
    rng = np.random.default_rng(0)
    q, k, v, direction = (rng.normal(size=(heads, R, T, E)).astype(np.float32) for heads in (H, K, K, H))
    direction = direction.swapaxes(0, 1)
    ids = segment_ids()
    direction = direction * (ids > 0)[:, None, :, None]
    arrays = [jnp.asarray(jnp.asarray(x, jnp.bfloat16), dtype) for x in (q, k, v, direction)]  # bfloat16 has all of these values
    if mesh:
        specs = [sharding.HEADS_RTE] * 3 + [sharding.ROWS_HTE]
        arrays = [sharding.shard(x, spec) for x, spec in zip(arrays, specs, strict=True)]
        ids = sharding.shard(jnp.asarray(ids), sharding.ROWS_T)

    @functools.partial(jax.jit, static_argnums=5)
    def run(q, k, v, direction, ids, kernel):
        mixed, backward = jax.vjp(lambda q, k, v: attention.attention(q, k, v, ids, kernel), q, k, v)
        return mixed * (direction != 0), *backward(direction)

    return [np.asarray(x, np.float32) for x in run(*arrays, ids, kernel)]


@pytest.mark.parametrize("shape", [None, (2, 2, 2), (1, 4, 2)])
def test_splash_is_xla_in_fp32(shape):
    mesh = shape and sharding.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    wanted = values_and_gradients("xla", jnp.float32)
    if mesh:
        with jax.set_mesh(mesh):
            found = values_and_gradients("splash", jnp.float32, mesh)
    else:
        found = values_and_gradients("splash", jnp.float32)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("kernel", ["splash", pytest.param("cudnn", marks=pytest.mark.gpu)])
def test_a_fused_kernel_is_xla_in_bfloat16(kernel):
    """Mean difference below 2e-3, and about as near to the fp32 result as the plain path in bfloat16 is."""
    with jax.default_matmul_precision("highest"):  # a GPU would round fp32 factors to 10 bits
        exact = values_and_gradients("xla", jnp.float32)
    plain, fused = (values_and_gradients(name, jnp.bfloat16) for name in ("xla", kernel))
    for truth, one, other in zip(exact, plain, fused, strict=True):
        assert np.abs(one - other).mean() < 2e-3
        assert np.linalg.norm(other - truth) < 2.5 * np.linalg.norm(one - truth)  # scaled queries are rounded once more


def test_cudnn_lowers_for_a_gpu_that_is_not_here(monkeypatch):
    """To its two kernels, causal, each once although layers are recomputed; that their library is installed is all that is left out."""
    for check in ("check_cudnn_version", "check_compute_capability", "is_cuda_compute_capability_equal"):
        monkeypatch.setattr(f"jax._src.cudnn.fused_attention_stablehlo.{check}", lambda *_: 0)
    q, k = (jax.ShapeDtypeStruct((heads, R, T, E), jnp.bfloat16) for heads in (H, K))

    @functools.partial(jax.checkpoint, policy=REMAT_POLICIES["dots"])
    def attend(q, k, v):
        return jnp.sin(attention.attention(jnp.sin(q), k, v, jnp.asarray(segment_ids()), "cudnn"))

    step = jax.jit(jax.grad(lambda *arrays: attend(*arrays).astype(jnp.float32).sum(), (0, 1, 2)))
    text = step.trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text()
    for name in ("fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward"):
        (call,) = (line for line in text.splitlines() if f"@__cudnn${name}(" in line)
        assert "CAUSAL" in call


def test_auto_takes_the_best_that_serves():
    choose = attention.choose_kernel
    assert choose("auto", "tpu", jnp.bfloat16, 1024, 128) == "splash"
    assert choose("auto", "tpu", jnp.float32, 1024, 128) == "xla"
    assert choose("auto", "tpu", jnp.bfloat16, 64, 128) == choose("auto", "tpu", jnp.bfloat16, 1024, 64) == "xla"
    assert choose("auto", "cpu", jnp.float32, 1024, 128) == choose("auto", "gpu", jnp.bfloat16, 1024, 128) == "xla"
    assert choose("cudnn", "gpu", jnp.bfloat16, 1024, 128) == "cudnn"


@pytest.mark.parametrize(
    ("wanted", "platform", "message"), [("flash", "tpu", "no attention kernel"), ("splash", "cpu", "TPU"), ("cudnn", "tpu", "NVIDIA")]
)
def test_a_kernel_that_cannot_serve_is_refused(wanted, platform, message):
    with pytest.raises(ValueError, match=message):
        attention.choose_kernel(wanted, platform, jnp.bfloat16, 1024, 128)
