"""Pruning against numpy and transformers: the identity, masked channels, permuted channels, measures, targets, refusals."""

import contextlib
import dataclasses
import json

import jax
import numpy as np
import pytest
import sentence_transformers
import tiny
import torch
import transformers
from safetensors.numpy import load_file

from f2llm_jax import prune as command
from f2llm_jax import sharding
from f2llm_jax.data import records
from f2llm_jax.errors import UserError
from f2llm_jax.model.decoder import count_parameters, init_decoder
from f2llm_jax.model.sizes import SIZES
from f2llm_jax.pruning.calibration import draw_texts, measure
from f2llm_jax.pruning.choice import Method, choose_kept
from f2llm_jax.pruning.cut import cut
from f2llm_jax.pruning.prune import prune
from f2llm_jax.pruning.target import parse_target
from f2llm_jax.release import hf_folder
from f2llm_jax.text import load_tokenizer
from f2llm_jax.weights.checkpoint_reader import flatten
from f2llm_jax.weights.embedding_config import EmbeddingConfig
from f2llm_jax.weights.models import ModelSource, find_model

CONFIG = tiny.CONFIG
PARTS = {"hidden": 40, "ffn": 56, "layers": 2}
TARGET = ",".join(f"{name}={value}" for name, value in PARTS.items())
ROWS = 24
# (our axes of a layer's parameter that are hidden channels, and MLP channels)
HIDDEN_AXIS = {"embedding": 1, "norm": 0, "attention_norm": 0, "mlp_norm": 0, "query": 0, "key": 0, "value": 0, "output": 0}
HIDDEN_AXIS |= {"gate": 0, "up": 0, "down": 0}


@pytest.fixture(scope="module")
def dataset(small_dataset):
    return small_dataset


@pytest.fixture(scope="module")
def arrays():
    """Random weights by readable path, norms included and channels of very different strength."""
    rng = np.random.default_rng(0)
    strength = np.exp(rng.normal(size=CONFIG.hidden_size))
    found = {}
    for path, leaf in flatten(init_decoder(CONFIG, 0)).items():
        value = np.asarray(rng.normal(size=leaf.shape) * (0.3 if leaf.ndim > 2 else 1.0), np.float32)
        found[path] = np.asarray(value * strength, np.float32) if path == "embedding" else value
    return found


def source_of(arrays, folder, config=CONFIG, **facts):
    embedding = EmbeddingConfig(max_length=96, **facts)
    tokenizer = load_tokenizer(tiny.write_tokenizer(folder))
    opened = lambda: contextlib.nullcontext(tiny.MemoryParameters(arrays))  # noqa: E731
    return ModelSource(name="tiny", config=config, open_params=opened, tokenizer=tokenizer, embedding=embedding)


@pytest.fixture(scope="module")
def source(arrays, tmp_path_factory):
    return source_of(arrays, tmp_path_factory.mktemp("tokenizer"), matryoshka_dims=(16, 32, 64))


@pytest.fixture(scope="module")
def texts(dataset):
    return draw_texts(dataset, ROWS, 0, 96)


@pytest.fixture(scope="module")
def activations(source, texts):
    return measure(source, texts, None, lambda done, total: None)


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    """The unpruned model as a release."""
    out = tmp_path_factory.mktemp("release") / "model"
    hf_folder.export(source, out, hf_folder.ReleaseForm(golden=False))
    return out


def run(folder, dataset, out, *flags, target=TARGET, rows=ROWS):
    flags = [
        "--model",
        folder,
        "--target",
        target,
        "--data",
        dataset.folder,
        "--calibration-rows",
        rows,
        "--out",
        out,
        "--no-golden",
        *flags,
    ]
    return command.main(list(map(str, flags)))


def torch_model(folder):
    return transformers.AutoModel.from_pretrained(folder, dtype=torch.float64).eval()


def hidden_states(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids)).last_hidden_state.numpy()


def test_to_its_own_width_and_depth_is_the_identity(folder, dataset, tmp_path):
    assert run(folder, dataset, tmp_path / "out", target="hidden=64,ffn=96,layers=3") == 0
    released = tmp_path / "out" / "model"
    want, got = load_file(folder / "model.safetensors"), load_file(released / "model.safetensors")
    assert got.keys() == want.keys() and all(got[name].tobytes() == want[name].tobytes() for name in want)
    assert json.loads((released / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    loaded = flatten(find_model(str(tmp_path / "out")).load(None))
    for path, leaf in flatten(find_model(str(folder)).load(None)).items():
        np.testing.assert_array_equal(loaded[path], leaf)


class MaskedNorm(torch.nn.Module):
    """Qwen3RMSNorm over the channels that stay; the others are zero before and after."""

    def __init__(self, norm, kept):
        super().__init__()
        self.scale, self.eps, self.kept = norm.weight, norm.variance_epsilon, kept

    def forward(self, x):
        mean = (x * x * self.kept).sum(-1, keepdim=True) / self.kept.sum()
        return self.scale * x * self.kept * torch.rsqrt(mean + self.eps)


@pytest.mark.parametrize("layers_by", ["first", "influence"])
def test_the_pruned_model_is_the_larger_one_with_channels_masked(folder, source, dataset, texts, tmp_path, layers_by):
    """transformers runs both in float64: the pruned release, and the whole one with removed channels held at zero."""
    assert run(folder, dataset, tmp_path / "out", "--layers-by", layers_by) == 0
    kept = np.load(tmp_path / "out" / "pruning.npz")
    masked = torch_model(folder)
    mask = torch.zeros(CONFIG.hidden_size, dtype=torch.float64)
    mask[kept["hidden"]] = 1
    masked.layers = torch.nn.ModuleList([masked.layers[i] for i in kept["layers"]])
    masked.config.num_hidden_layers = len(kept["layers"])
    for layer, ffn in zip(masked.layers, kept["ffn"], strict=True):
        gone = np.setdiff1d(np.arange(CONFIG.intermediate_size), ffn)
        with torch.no_grad():
            layer.mlp.down_proj.weight[:, gone] = 0
        layer.input_layernorm = MaskedNorm(layer.input_layernorm, mask)
        layer.post_attention_layernorm = MaskedNorm(layer.post_attention_layernorm, mask)
    masked.norm = MaskedNorm(masked.norm, mask)
    pruned = torch_model(tmp_path / "out" / "model")
    assert (pruned.config.hidden_size, pruned.config.intermediate_size, pruned.config.num_hidden_layers) == tuple(PARTS.values())
    for ids in texts[:4]:
        want, got = hidden_states(masked, ids[None])[..., kept["hidden"]], hidden_states(pruned, ids[None])
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("by", ["l2", "mean-abs"])
def test_permuted_channels_change_the_choice_and_not_the_model(arrays, source, texts, activations, tmp_path, by):
    rng = np.random.default_rng(1)
    hidden, ffn = rng.permutation(CONFIG.hidden_size), rng.permutation(CONFIG.intermediate_size)
    shuffled = {}
    for path, value in arrays.items():
        name, stacked = path.split("/")[-1], path.startswith("layers/")
        if name in HIDDEN_AXIS:
            value = np.take(value, hidden, axis=HIDDEN_AXIS[name] + stacked)
        if name in ("gate", "up", "down"):
            value = np.take(value, ffn, axis=2)
        shuffled[path] = value
    other = source_of(shuffled, tmp_path / "tokenizer")
    target, method = parse_target(TARGET, CONFIG), Method(hidden_by=by, ffn_by=by)
    choice = choose_kept(activations, target, method)
    moved = choose_kept(measure(other, texts, None, lambda done, total: None), target, method)
    assert set(hidden[moved.hidden]) == set(choice.hidden) and set(choice.hidden) != set(range(PARTS["hidden"]))
    for mine, theirs in zip(choice.ffn, moved.ffn, strict=True):
        assert set(ffn[theirs]) == set(mine)
    outputs = {}
    for name, model, chosen in (("one", source, choice), ("other", other, moved)):
        hf_folder.export(cut(model, target, chosen), tmp_path / name, hf_folder.ReleaseForm(golden=False))
        outputs[name] = hidden_states(torch_model(tmp_path / name), texts[0][None])
    orders = {"one": np.argsort(choice.hidden), "other": np.argsort(hidden[moved.hidden])}
    one, other = (outputs[name][..., order] for name, order in orders.items())
    np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


def test_measures_are_those_of_transformers(folder, source, texts, activations):
    """Hooks on every norm and on what down_proj reads, float64, over all tokens of all texts."""
    model, seen = torch_model(folder), {}

    def keep(name, value):
        seen.setdefault(name, []).append(value.detach().numpy()[0])

    for i, layer in enumerate(model.layers):
        layer.input_layernorm.register_forward_hook(lambda module, args, out, i=i: keep(("stream", i, 0), out))
        layer.post_attention_layernorm.register_forward_hook(lambda module, args, out, i=i: keep(("stream", i, 1), out))
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, args, i=i: keep(("ffn", i), args[0]))
        layer.register_forward_hook(lambda module, args, out, i=i: keep(("out", i), out))
        layer.register_forward_pre_hook(lambda module, args, i=i: keep(("in", i), args[0]))
    for ids in texts:
        hidden_states(model, ids[None])
    assert activations.tokens == sum(map(len, texts))
    lift = {"l2": lambda x: np.sqrt((x**2).mean(0)), "mean-abs": lambda x: np.abs(x).mean(0)}
    joined = {name: np.concatenate(parts) for name, parts in seen.items()}
    scale = load_file(folder / "model.safetensors")["norm.weight"]
    for i in range(CONFIG.num_hidden_layers):
        x, y = joined["in", i], joined["out", i]
        cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
        np.testing.assert_allclose(activations.influence[i], 1 - cosine.mean(), rtol=1e-4)
        final = scale * y / np.sqrt((y * y).mean(-1, keepdims=True) + CONFIG.rms_norm_eps)
        for measured, of in lift.items():
            for site in (0, 1):
                np.testing.assert_allclose(activations.stream[measured][i, site], of(joined["stream", i, site]), rtol=1e-4)
            np.testing.assert_allclose(activations.ffn[measured][i], of(joined["ffn", i]), rtol=1e-4)
            np.testing.assert_allclose(activations.final[measured][i], of(final), rtol=1e-4)


def test_a_mesh_measures_the_same(source, texts, activations):
    split = measure(source, texts, sharding.make_mesh(data=2, fsdp=2, tensor=2), lambda done, total: None)
    for one, other in zip(jax.tree.leaves(dataclasses.asdict(activations)), jax.tree.leaves(dataclasses.asdict(split)), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4)


def test_scores_decide(activations):
    """The kept are the largest of the named sums; ties and `first` go by index."""
    target = parse_target(TARGET, CONFIG)
    choice = choose_kept(activations, target, Method(hidden_by="l2", ffn_by="mean-abs", layers_by="influence"))
    layers = np.sort(np.argsort(activations.influence)[-PARTS["layers"] :])
    hidden = sum(activations.stream["l2"][i, site] for i in layers for site in (0, 1)) + activations.final["l2"][layers[-1]]
    np.testing.assert_array_equal(choice.layers, layers)
    assert set(choice.hidden) == set(np.argsort(hidden)[-PARTS["hidden"] :])
    assert all((place == channel) == (channel < PARTS["hidden"]) for place, channel in enumerate(choice.hidden))
    for i, kept in zip(layers, choice.ffn, strict=True):
        assert set(kept) == set(np.argsort(activations.ffn["mean-abs"][i])[-PARTS["ffn"] :])
    first = choose_kept(activations, target, Method(hidden_by="first", ffn_by="first"))
    for kept, name in ((first.hidden, "hidden"), (first.layers, "layers"), *((row, "ffn") for row in first.ffn)):
        np.testing.assert_array_equal(kept, np.arange(PARTS[name]))


def test_widths_that_stay_in_place_are_still_declared(source, activations):
    target = parse_target(TARGET, CONFIG)
    assert cut(source, target, choose_kept(activations, target, Method(hidden_by="first"))).embedding.matryoshka_dims == (16, 32)
    assert cut(source, target, choose_kept(activations, target, Method())).embedding.matryoshka_dims == ()


def test_what_is_written(folder, dataset, tmp_path, monkeypatch):
    """The workdir and the release are one model, which sentence-transformers loads at the right width; the choice is beside it."""
    monkeypatch.chdir(tmp_path)
    assert run(folder, dataset, "out", "--hidden-by", "mean-abs") == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        ".made_by_f2llm_jax.json",
        "checkpoints",
        "model",
        "pruning.json",
        "pruning.npz",
        "pruning.png",
        "tokenizer",
    ]
    facts, kept = json.loads((out / "pruning.json").read_text()), np.load(out / "pruning.npz")
    assert facts["hidden_size"] == [64, 40] and facts["hidden_by"] == "mean-abs" and facts["calibration_rows"] == ROWS
    assert kept["hidden"].shape == (40,) and kept["ffn"].shape == (2, 56) and kept["hidden_scores"].shape == (64,)
    config = json.loads((out / "model" / "config.json").read_text())
    assert config["layer_types"] == ["full_attention"] * 2 and config["max_window_layers"] == 2
    assert json.loads((out / "model" / "1_Pooling" / "config.json").read_text())["word_embedding_dimension"] == 40
    sentences = sentence_transformers.SentenceTransformer(str(out / "model"), device="cpu")
    assert sentences.encode(["the cat"]).shape == (1, 40)
    stored, released = (flatten(find_model(str(place)).load(None)) for place in (out, out / "model"))
    for path in stored:
        np.testing.assert_array_equal(stored[path], released[path])
    assert "pruned from" in (out / "model" / "README.md").read_text() and str(tmp_path) not in (out / "model" / "README.md").read_text()


@pytest.mark.parametrize(("size", "parameters"), [("330m", 334_349_184), ("160m", 159_185_024), ("80m", 80_084_288)])
def test_published_targets_have_the_published_counts(size, parameters):
    assert count_parameters(parse_target(size, SIZES["0.6b"])) == parameters


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("hidden=65", "more than the model has: hidden 65 of 64"),
        ("layers=4,ffn=97", "more than the model has: ffn 97 of 96, layers 4 of 3"),
        ("ffn=0", "ffn=0 must be a whole number of at least 1"),
        ("hidden=-3", "hidden=-3 must be a whole number"),
        ("hiden=40", "unknown 'hiden'; did you mean 'hidden'"),
        ("330n", "no size of that name; did you mean '330m'"),
        ("330m", "pruning leaves attention alone, but the model has num_attention_heads 4, not 16"),
    ],
)
def test_targets_that_cannot_be_are_refused_before_any_work(folder, dataset, tmp_path, capsys, target, message):
    assert run(folder, dataset, tmp_path / "out", target=target) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not list(tmp_path.iterdir())


def test_rows_data_and_place_are_checked_first(folder, dataset, tmp_path, capsys):
    total = sum(source.rows["train"] for source in dataset.sources.values())
    for rows in (0, 15, total + 1):
        assert run(folder, dataset, tmp_path / "out", rows=rows) == 1
        assert f"--calibration-rows {rows} must be between 16 and the {total} training rows" in capsys.readouterr().err
    assert run(folder, records.Dataset(**{**vars(dataset), "folder": tmp_path}), tmp_path / "out") == 1
    assert "has no dataset.json" in capsys.readouterr().err
    assert run(tmp_path / "absent", dataset, tmp_path / "out") == 1
    assert "is no local folder" in capsys.readouterr().err
    other = dataclasses.replace(dataset, tokenizer_fingerprint="0" * 64)
    with pytest.raises(UserError, match="another tokenizer"):
        prune(find_model(str(folder)), TARGET, other, ROWS, Method())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    assert run(folder, dataset, tmp_path / "full") == 1
    assert "is not empty" in capsys.readouterr().err
