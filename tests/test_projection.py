"""Teachers of another width: the projection and the widths that follow, against float64 torch; on chunks, on devices, in a run."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import made_vectors
import numpy as np
import pytest
import small_batches
import small_data
import tiny
import torch
import torch.nn.functional as F
from random_samples import DIMS, D, masks, of, random_embeddings
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from small_runs import OVERRIDES, assert_same_weights, metrics

from f2llm_jax import convert, objectives, sharding
from f2llm_jax.batch import Batch
from f2llm_jax.configs import stage2
from f2llm_jax.errors import UserError
from f2llm_jax.model.decoder import init_decoder
from f2llm_jax.model.encoder import encode
from f2llm_jax.objectives import ContrastiveConfig, Embeddings, Objective, matryoshka_weights
from f2llm_jax.objectives.distillation import distillation
from f2llm_jax.release import hf_folder
from f2llm_jax.training.optimizer import OptimizerConfig
from f2llm_jax.training.program import fresh_state
from f2llm_jax.training.run import run
from f2llm_jax.training.start import StartError
from f2llm_jax.training.step import by_role, make_train_step
from f2llm_jax.weights.checkpoint_reader import find_checkpoint

pytestmark = pytest.mark.usefixtures("quick_compilation")
TAU = 0.05
WIDTHS = (13, 30)  # of two teachers, narrower and wider than the student


def in_torch(x):
    return torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True)


def projection_of(seed, width):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(D, width)), jnp.float32)


def close(got, want, tolerance=2e-5):
    want = np.asarray(want)
    np.testing.assert_allclose(got, want, atol=tolerance * max(np.abs(want).max(), 1e-3), rtol=0)


def torch_terms(student, teacher, sample_mask, negative_mask, kind, dims, weights, projection=None):
    """The term at each width, vector by vector that exists."""
    value = torch.zeros((), dtype=torch.float64)
    masks = [torch.tensor(np.asarray(mask)) > 0 for mask in (sample_mask, sample_mask, negative_mask)]
    for d, weight in zip(dims, weights, strict=True):
        if kind == "scores":
            logs = []
            for e, width in ((teacher, None), (student, d)):
                q, p, n = (F.normalize(x[..., :width], dim=-1) for x in e)
                pool = torch.cat([p[masks[0]], n[masks[2]]])
                logs.append(F.log_softmax(q[masks[0]] @ pool.T / TAU, dim=-1))
            value = value + weight * F.kl_div(logs[1], logs[0].detach(), log_target=True, reduction="batchmean")
            continue
        for x, t, mask in zip(student, teacher, masks, strict=True):
            mapped, target = x[mask][:, :d], t[mask].detach()
            if projection is None:
                target = target[:, :d]
            else:
                mapped = F.normalize(mapped, dim=-1) @ projection[:d]
            loss = F.mse_loss(mapped, target) if kind == "mse" else (1 - F.cosine_similarity(mapped, target, dim=-1)).mean()
            value = value + weight * loss
    return value


@pytest.mark.parametrize("dims", [(D,), DIMS], ids=["full width", "matryoshka"])
@pytest.mark.parametrize(("kind", "width"), [("mse", 13), ("mse", 30), ("cosine", 13), ("cosine", 30), ("cosine", None), ("scores", 13)])
def test_value_and_gradients_are_torchs(kind, width, dims):
    """Of student and projection. Without one (None), "cosine" compares first components; "scores" needs none at any width."""
    student, (samples, negatives) = random_embeddings(1), masks()
    teacher = random_embeddings(2, width=width or D + 7)
    projection = projection_of(3, width) if width and kind != "scores" else None
    weights = matryoshka_weights(dims)

    def loss(student, projection):
        return distillation(student, teacher, of(samples, negatives), kind, TAU, dims=dims, weights=weights, projection=projection).value

    got, (to_student, to_projection) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(student, projection)
    s, t = Embeddings(*map(in_torch, student)), Embeddings(*map(in_torch, teacher))
    p = None if projection is None else in_torch(projection)
    want = torch_terms(s, t, samples, negatives, kind, dims, weights, p)
    want.backward()
    np.testing.assert_allclose(got, want.item(), rtol=3e-6)
    for one, other in zip(to_student, s, strict=True):
        close(one, other.grad)
    if p is not None:
        close(to_projection, p.grad)


SEVERAL = Objective(
    contrastive=ContrastiveConfig(dims=DIMS),
    distillation="cosine",
    distillation_weight=2.0,
    distillation_matryoshka=True,
    projection=True,
    teacher_widths=WIDTHS,
    teacher_weights=(0.25, 1.5),
)


def several():
    """A student, two teachers with their vectors one after another, and a projection to each."""
    teachers = [random_embeddings(5 + i, width=width) for i, width in enumerate(WIDTHS)]
    together = Embeddings(*(jnp.concatenate(parts, axis=-1) for parts in zip(*teachers, strict=True)))
    return random_embeddings(4), teachers, together, tuple(projection_of(7 + i, width) for i, width in enumerate(WIDTHS))


def test_several_teachers_are_a_weighted_sum():
    student, teachers, together, projections = several()
    samples, negatives = masks()
    _, metrics = objectives.total(student, of(samples, negatives), SEVERAL, together, projections=projections)
    weights = matryoshka_weights(DIMS)
    terms = [
        torch_terms(*(Embeddings(*map(in_torch, e)) for e in (student, teacher)), samples, negatives, "cosine", DIMS, weights, in_torch(p))
        for teacher, p in zip(teachers, projections, strict=True)
    ]
    np.testing.assert_allclose([metrics[f"distillation/{i}"].value for i in (0, 1)], [term.item() for term in terms], rtol=1e-5)
    np.testing.assert_allclose(metrics["distillation"].value, 0.25 * terms[0].item() + 1.5 * terms[1].item(), rtol=1e-5)
    np.testing.assert_allclose(metrics["weighted/distillation"].value, 2 * metrics["distillation"].value, rtol=1e-6)
    equal = dataclasses.replace(SEVERAL, teacher_weights=())
    _, metrics = objectives.total(student, of(samples, negatives), equal, together, projections=projections)
    np.testing.assert_allclose(metrics["distillation"].value, (terms[0].item() + terms[1].item()) / 2, rtol=1e-5)


def test_eight_devices_compute_what_one_does():
    """The projections split over fsdp, as a run holds them; their gradients arrive split alike."""
    student, _, together, projections = several()
    samples, negatives = masks()

    def loss(student, projections, samples, negatives, together):
        return objectives.total(student, of(samples, negatives), SEVERAL, together, projections=projections)[0]

    step = jax.value_and_grad(loss, argnums=(0, 1))
    want = jax.jit(step)(student, projections, samples, negatives, together)
    mesh = sharding.make_mesh(2, 2, 2)

    def place(spec):
        return lambda x: sharding.to_global(np.asarray(x), mesh, spec)

    split = sharding.PARAMETER_SPECS["DW"]
    with jax.set_mesh(mesh):
        held = jax.tree.map(place(split), projections)
        arrays = [jax.tree.map(place(sharding.P()), student), held, *map(place(sharding.P(sharding.BATCH)), (samples, negatives))]
        got = jax.jit(step)(*arrays, jax.tree.map(place(sharding.P(sharding.BATCH)), together))
    for one, many in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-6)
    assert all(gradient.sharding.spec == split for gradient in got[1][1])


def present_samples():
    """Those of `small_batches`, whose text 3 is absent."""
    samples, negatives = small_batches.B, small_batches.N
    ids = jnp.arange(samples * negatives).reshape(samples, negatives)
    return objectives.Samples(jnp.ones(samples).at[3].set(0), jnp.ones((samples, negatives)), jnp.float32(1), jnp.arange(samples), ids)


@pytest.mark.slow
def test_chunks_change_nothing():
    """An update of decoder and projection is the same however its texts are spread over chunks."""
    samples, negatives, width = small_batches.B, small_batches.N, 24
    rng = np.random.default_rng(0)
    teacher = jnp.asarray(rng.normal(size=(samples, 2 + negatives, width)), jnp.float32)
    present = present_samples()
    objective = Objective(
        contrastive=ContrastiveConfig(dims=(16, 64)),
        distillation="mse",
        distillation_weight=9.0,
        distillation_matryoshka=True,
        projection=True,
        teacher_widths=(width,),
    )
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, total_steps=9, clip_norm=1e9, epsilon=1e-3)
    step = jax.jit(make_train_step(small_batches.encode_chunk(), objective, optimizer))
    found = []
    for shape in ("one by one", "groups of two, rows in halves"):
        projection = jnp.linspace(-1, 1, 64 * width, dtype=jnp.float32).reshape(64, width)
        state = fresh_state(init_decoder(tiny.CONFIG, 0, None), optimizer, (projection,))
        after, metrics = step(state, None, Batch(small_batches.packed(2, small_batches.SHAPES[shape]), present, teacher))
        assert float(jnp.abs(after.projections[0] - projection).max()) > 1e-4
        found.append((after.params, after.projections, {name: mean.value for name, mean in metrics.items()}))
    for other in found[1:]:
        for got, want in zip(jax.tree.leaves(other), jax.tree.leaves(found[0]), strict=True):
            np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cosine", "scores"])
def test_each_depth_follows_the_whole_cached_teacher(kind):
    """Through the one projection, or by its scores."""
    samples, negatives, width, depths = small_batches.B, small_batches.N, 24, (1, 3)
    rng = np.random.default_rng(1)
    teacher = jnp.asarray(rng.normal(size=(samples, 2 + negatives, width)), jnp.float32)
    present = present_samples()
    projections = (jnp.asarray(rng.normal(size=(64, width)), jnp.float32),) * (kind != "scores")
    objective = Objective(distillation=kind, distillation_weight=3.0, projection=kind != "scores", teacher_widths=(width,))
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, total_steps=9)
    params, texts = init_decoder(tiny.CONFIG, 0, None), small_batches.packed(1)
    step = jax.jit(make_train_step(small_batches.encode_chunk(layers=depths), objective, optimizer))
    _, metrics = step(fresh_state(params, optimizer, projections), None, Batch(texts, present, teacher))
    followed = Embeddings(teacher[:, 0], teacher[:, 1], teacher[:, 2:])
    embeddings = encode(small_batches.encode_chunk(layers=depths), params, texts, small_batches.TEXTS)
    roles = [by_role(embeddings[:, i], present.negative_mask) for i in range(len(depths))]
    want = [objectives.total(e, present, objective, followed, projections=projections)[0] for e in roles]
    np.testing.assert_allclose(metrics["loss"].value, np.mean(want), rtol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"distillation": "scores", "projection": True}, "needs no projection"),
        ({"distillation_matryoshka": True}, "shorter widths add nothing"),
        ({"distillation": "cosine", "distillation_matryoshka": True}, "none is trained"),
        ({"teacher_widths": (3, 4), "teacher_weights": (1.0,)}, "1 teacher_weights for 2 teachers"),
        ({"teacher_weights": (1.0, 1.0)}, "2 teacher_weights for 1 teachers"),
        ({"teacher_widths": (3, 4), "teacher_weights": (1.0, -1.0)}, "must be numbers from 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        Objective(**wrong)


# Runs


@pytest.fixture(scope="module")
def caches(tmp_path_factory, small_dataset):
    folder = tmp_path_factory.mktemp("caches")
    for width in (6, 40):
        made_vectors.fill(made_vectors.Model(width), small_dataset, folder / str(width), small_data.MAX_LENGTH)
    return folder


SHORT = {"steps": 4, "checkpoint.every": 2, "eval.batches": 0, "batch.size": 16, "log_every": 2, "mesh.fsdp": 4, "mesh.tensor": 2}
TWO = {"objective.distillation": "cosine", "objective.projection": True, "objective.distillation_matryoshka": True}


def train(data, workdir, **more):
    config = stage2.get_config("runlocal")
    config.update_from_flattened_dict({**OVERRIDES, **SHORT, "data.folder": str(data), **more})
    run(config, workdir)


def check_kept_projections(workdir, release):
    """sentence-transformers appends one, and gives what the distillation compares with the teacher's vectors."""
    assert convert.main(["to-hf", str(workdir), str(release), "--no-golden", "--projections"]) == 0
    plain = SentenceTransformer(str(release), device="cpu")
    vectors = plain.encode(["a cat", "the dog sat"])
    assert vectors.shape == (2, 128)
    for number, projection in enumerate(find_checkpoint(workdir).load_projections()):
        mapped = SentenceTransformer(modules=[*plain, Dense.load(str(release / "projections" / str(number)))], device="cpu")
        np.testing.assert_allclose(mapped.encode(["a cat", "the dog sat"]), vectors @ projection, atol=1e-6)


@pytest.mark.slow
def test_a_run_with_two_teachers_resumes_to_the_bit_and_releases_its_decoder(tmp_path, small_dataset, caches):
    """Of other widths, each through a projection, which checkpoints hold and a release does not."""
    settings = {**TWO, "teacher_cache": f"{caches / '6'},{caches / '40'}", "objective.teacher_weights": (1.0, 2.0)}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(small_dataset.folder, whole, **settings)
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "4")
    train(small_dataset.folder, stopped, **settings)
    assert (stopped / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    saved = [find_checkpoint(workdir).load_projections() for workdir in (whole, stopped)]
    assert [projection.shape for projection in saved[0]] == [(128, 6), (128, 40)]
    jax.tree.map(np.testing.assert_array_equal, *saved)
    assert_same_weights(stopped, whole)
    lines = [line for line in metrics(whole) if "distillation" in line]
    for line in lines:
        np.testing.assert_allclose(line["distillation"], line["distillation/0"] + 2 * line["distillation/1"], rtol=1e-5)
    assert lines[-1]["distillation"] != lines[0]["distillation"]
    assert convert.main(["to-hf", str(stopped), str(tmp_path / "release"), "--no-golden"]) == 0
    assert not list((tmp_path / "release").glob("projection*"))
    check_kept_projections(stopped, tmp_path / "kept")
    assert convert.main(["to-hf", str(stopped), str(tmp_path / "cut"), "--projections", "--truncate-dim", "64"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mse", "scores"])
def test_a_live_teacher_of_another_width(tmp_path, small_dataset, kind):
    """Half as wide as the student, with its tokenizer."""
    hf_folder.export(tiny.origin(tmp_path / "tokenizer"), tmp_path / "teacher", hf_folder.ReleaseForm(golden=False))
    settings = {"teacher": str(tmp_path / "teacher"), "objective.distillation": kind, "steps": 2}
    if kind == "mse":
        with pytest.raises(StartError, match=r"has width 64, less than the student's 128.*objective\.projection=True"):
            train(small_dataset.folder, tmp_path / "run", **settings)
        settings["objective.projection"] = True
    train(small_dataset.folder, tmp_path / "run", **settings)
    assert all(np.isfinite(line["distillation"]) for line in metrics(tmp_path / "run") if "loss" in line)
    assert [p.shape for p in find_checkpoint(tmp_path / "run").load_projections()] == [(128, 64)] * (kind == "mse")


def test_what_does_not_fit_names_what_helps(tmp_path, small_dataset, caches):
    """A width that is not the student's, a projection without a teacher, weights that are not one a teacher."""
    cases = {
        ("keeps 6 dims, fewer than the student's 128", "objective.projection=True"): {"teacher_cache": str(caches / "6")},
        ("needs a teacher to project to",): {"objective.projection": True},
        ("needs a teacher to project to", "objective.projection"): {
            "teacher_cache": str(caches / "6"),
            "objective.projection": True,
            "objective.distillation_weight": 0.0,
        },
        ("1 teacher_weights for 2 teachers",): {
            **TWO,
            "teacher_cache": f"{caches / '6'},{caches / '40'}",
            "objective.teacher_weights": (1.0,),
        },
        ("no complete teacher cache",): {**TWO, "teacher_cache": f"{caches / '6'},{caches / 'none'}"},
    }
    for words, settings in cases.items():
        with pytest.raises(UserError) as refused:
            train(small_dataset.folder, tmp_path / "run", **settings)
        assert all(word in str(refused.value) for word in words), refused.value
