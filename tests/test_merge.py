"""Merges against numpy, from every kind of input; and the refusals."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from f2llm_jax import merge as command
from f2llm_jax.errors import UserError
from f2llm_jax.model.decoder import init_decoder
from f2llm_jax.release import hf_folder, workdir
from f2llm_jax.release.merge import merge

FORM = hf_folder.ReleaseForm(golden=False)


@pytest.fixture(scope="module")
def origins(tmp_path_factory):
    """Three models of random weights, norms included."""
    return [origin(seed, tmp_path_factory.mktemp("tokenizer")) for seed in range(3)]


def origin(seed, folder, config=tiny.CONFIG):
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: np.asarray(rng.normal(size=x.shape), np.float32), init_decoder(config, 0))
    return tiny.origin(folder, config, load=lambda mesh: params)


def tensors(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def released(source, out, form=FORM):
    hf_folder.export(source, out, form, overwrite=True)
    return tensors(out)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_equal_models_merge_to_themselves(origins, tmp_path, count):
    want = released(origins[0], tmp_path / "one")
    got = released(merge([origins[0]] * count, range(1, count + 1)), tmp_path / "merged")
    for name, tensor in want.items():
        np.testing.assert_array_equal(got[name], tensor)


@pytest.mark.parametrize("weights", [None, (1, 2, 5), (0.5, -0.25, 1.0)])
def test_linear_is_numpys_average(origins, tmp_path, weights):
    parts = [released(origin, tmp_path / str(i)) for i, origin in enumerate(origins)]
    got = released(merge(origins, weights), tmp_path / "merged")
    for name, tensor in got.items():
        want = np.average(np.stack([part[name] for part in parts]).astype(np.float64), axis=0, weights=weights)
        np.testing.assert_allclose(tensor, want.astype(np.float32), rtol=2e-7, atol=1e-9)


def test_any_form_of_input_gives_the_same_merge(origins, tmp_path):
    """Sharded and whole folders and a workdir, named on the command line."""
    want = released(merge(origins[:2]), tmp_path / "want")
    for i, form in enumerate((hf_folder.ReleaseForm(max_shard_bytes=50_000, golden=False), FORM)):
        hf_folder.export(origins[i], tmp_path / f"folder{i}", form)
        workdir.write_workdir(origins[i], tmp_path / f"run{i}", overwrite=False)
    for kinds in (("folder0", "folder1"), ("run0", "folder1"), ("folder0", "run1"), ("run0/checkpoints/0", "run1")):
        out = tmp_path / "out"
        names = [str(tmp_path / kind) for kind in kinds]
        assert command.main(["--out", str(out), *names, "--max-shard-size", "100KB", "--no-golden", "--overwrite"]) == 0
        got = tensors(out)
        assert all((got[name] == tensor).all() for name, tensor in want.items()) and got.keys() == want.keys()
    assert "linear merge of" in (out / "README.md").read_text() and str(tmp_path) not in (out / "README.md").read_text()


def test_half_precision_inputs_merge_in_float32(origins, tmp_path):
    for i in (0, 1):
        hf_folder.export(origins[i], tmp_path / str(i), hf_folder.ReleaseForm(dtype="bfloat16", golden=False))
    assert command.main(["--out", str(tmp_path / "out"), str(tmp_path / "0"), str(tmp_path / "1"), "--no-golden"]) == 0
    parts = [tensors(tmp_path / name) for name in "01"]
    for name, tensor in tensors(tmp_path / "out").items():
        np.testing.assert_array_equal(tensor, (parts[0][name].astype(np.float32) + parts[1][name].astype(np.float32)) / 2)


def test_a_merge_claims_what_all_of_its_models_were_trained_for(origins):
    """A width or depth that one of them was not trained for is none of the average's."""
    taught = {"matryoshka_dims": (8, 16, 64), "depths": (1, 2, 3), "table_ranks": (4, 8), "max_length": 96}
    less = {"matryoshka_dims": (16, 32, 64), "depths": (2, 3), "table_ranks": (), "max_length": 40}
    told = lambda more: dataclasses.replace(origins[0], embedding=dataclasses.replace(origins[0].embedding, **more))  # noqa: E731
    first, second = told(taught), told(less)
    for pair in ((first, second), (second, first)):
        found = merge(pair).embedding
        assert (found.matryoshka_dims, found.depths, found.table_ranks, found.max_length) == ((16, 64), (2, 3), (), 40)
    unknown = told(less | {"max_length": None})
    assert merge([unknown, first]).embedding.max_length == 96
    assert merge([first, first]).embedding == first.embedding


def test_what_does_not_belong_together_is_refused(origins, tmp_path, capsys):
    wide = origin(0, tmp_path / "t", dataclasses.replace(tiny.CONFIG, intermediate_size=128))
    with pytest.raises(UserError, match="not of the architecture"):
        merge([origins[0], wide])
    with pytest.raises(UserError, match="2 weights for 3 models"):
        merge(origins, (1, 2))
    for weights in ((1, -1), (float("nan"), 1), (float("inf"), 1)):
        with pytest.raises(UserError, match="must be finite, and their sum positive"):
            merge(origins[:2], weights)
    narrow = dataclasses.replace(origins[1], embedding=dataclasses.replace(origins[1].embedding, truncate_dim=16))
    with pytest.raises(UserError, match="serves 16 dimensions, tiny serves 64"):
        merge([origins[0], narrow])
    tokenizer = json.loads(origins[1].tokenizer.backend.to_str())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    other = dataclasses.replace(origins[1].tokenizer, backend=type(origins[1].tokenizer.backend).from_str(json.dumps(tokenizer)))
    with pytest.raises(UserError, match="different tokenizers"):
        merge([origins[0], dataclasses.replace(origins[1], tokenizer=other)])
    workdir.write_workdir(origins[0], tmp_path / "run", overwrite=False)
    assert command.main(["--out", str(tmp_path / "out"), str(tmp_path / "run")]) == 1
    assert "at least two models" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert command.main(["--out", str(tmp_path / "out"), str(tmp_path / "run"), str(tmp_path / "run"), "--last", "2"]) == 1
    assert "--last 2 goes with one workdir" in capsys.readouterr().err
    for last in ("0", "-1"):  # of a list, the last 0 are all
        with pytest.raises(SystemExit):
            command.main(["--out", str(tmp_path / "out"), str(tmp_path / "run"), f"--last={last}"])
