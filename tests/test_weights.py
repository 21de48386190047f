"""Weights in from every form a Qwen3 folder takes, and out again to the bit."""

import json

import jax
import numpy as np
import pytest
import tiny
import torch
import transformers
from jax.sharding import NamedSharding
from safetensors.torch import load_file, save_file

from f2llm_jax import sharding
from f2llm_jax.errors import UserError
from f2llm_jax.release import hf_folder, workdir
from f2llm_jax.weights.models import find_model

EVERYTHING = 10**9


def qwen3_config():
    c = tiny.CONFIG
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "max_position_embeddings", "rms_norm_eps",
    )  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    return transformers.Qwen3Config(
        **{name: getattr(c, name) for name in names}, rope_parameters=rope, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None
    )


def write_peer(folder, model_class, dtype, max_shard_size="1GB"):
    """A folder that transformers wrote; returns its tensors by `Qwen3Model` name."""
    torch.manual_seed(0)
    model = model_class(qwen3_config()).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()  # norms too, which start at one
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny.write_tokenizer(folder)
    return {name.removeprefix("model."): tensor.detach() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def tensors(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_bits(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(got[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize(
    ("model_class", "dtype", "shard_size"),
    [
        (transformers.Qwen3Model, "float32", "1GB"),
        (transformers.Qwen3Model, "bfloat16", "60KB"),
        (transformers.Qwen3ForCausalLM, "bfloat16", "1GB"),
        (transformers.Qwen3ForCausalLM, "float32", "120KB"),
        (transformers.Qwen3Model, "float16", "1GB"),
    ],
)
def test_hf_to_ours_to_hf_is_exact(tmp_path, model_class, dtype, shard_size):
    want = write_peer(tmp_path / "in", model_class, getattr(torch, dtype), shard_size)
    assert len(list((tmp_path / "in").glob("*.safetensors"))) == 1 or shard_size != "1GB"
    origin = find_model(str(tmp_path / "in"))
    assert origin.config.rope_theta == 10_000
    hf_folder.export(origin, tmp_path / "one", hf_folder.ReleaseForm(dtype=dtype, max_shard_bytes=EVERYTHING), overwrite=False)
    hf_folder.export(origin, tmp_path / "many", hf_folder.ReleaseForm(dtype=dtype, max_shard_bytes=50_000), overwrite=False)
    assert_same_bits(tensors(tmp_path / "one"), want)
    assert_same_bits(tensors(tmp_path / "many"), want)
    assert_same_bits(dict(transformers.AutoModel.from_pretrained(tmp_path / "many").state_dict()), want)


def test_causal_names_without_prefix_are_read(tmp_path):
    """Qwen3-Embedding's form: the head's architecture, the bare model's names."""
    want = write_peer(tmp_path / "in", transformers.Qwen3ForCausalLM, torch.float32)
    save_file({name: tensor.clone() for name, tensor in want.items()}, tmp_path / "in/model.safetensors", {"format": "pt"})
    hf_folder.export(
        find_model(str(tmp_path / "in")),
        tmp_path / "out",
        hf_folder.ReleaseForm(dtype="float32", max_shard_bytes=EVERYTHING),
        overwrite=False,
    )
    assert_same_bits(tensors(tmp_path / "out"), want)


def test_a_workdir_between_changes_nothing(tmp_path):
    want = write_peer(tmp_path / "in", transformers.Qwen3Model, torch.bfloat16)
    workdir.write_workdir(find_model(str(tmp_path / "in")), tmp_path / "run", overwrite=False)
    for name in ("run", "run/checkpoints/0"):
        origin = find_model(str(tmp_path / name))
        assert (origin.embedding.matryoshka_dims, origin.embedding.max_length) == ((), 512)
        hf_folder.export(origin, tmp_path / "out", hf_folder.ReleaseForm(dtype="bfloat16", max_shard_bytes=EVERYTHING), overwrite=True)
        assert_same_bits(tensors(tmp_path / "out"), want)


def test_shards_respect_their_limit_and_the_index(tmp_path):
    limit = 50_000
    hf_folder.export(
        tiny.origin(tmp_path / "t"), tmp_path / "out", hf_folder.ReleaseForm(dtype="float32", max_shard_bytes=limit), overwrite=False
    )
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    sizes = {file.name: {name: t.numel() * 4 for name, t in load_file(file).items()} for file in files}
    assert index["weight_map"] == {name: file for file, held in sizes.items() for name in held}
    assert index["metadata"]["total_size"] == sum(sum(held.values()) for held in sizes.values())
    assert all(sum(held.values()) <= limit or len(held) == 1 for held in sizes.values())


def test_a_sharded_import_equals_an_unsharded_one(tmp_path):
    write_peer(tmp_path / "in", transformers.Qwen3Model, torch.bfloat16, "60KB")
    origin = find_model(str(tmp_path / "in"))
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    whole, sharded = origin.load(None), origin.load(mesh)
    for one, many in zip(jax.tree.leaves(whole), jax.tree.leaves(sharded), strict=True):
        assert isinstance(many.sharding, NamedSharding) and many.sharding.mesh == mesh
        np.testing.assert_array_equal(np.asarray(one), np.asarray(many))
    assert sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(sharded)) == 8  # all but the norms


def test_everything_wrong_with_the_tensors_is_one_error(tmp_path):
    held = write_peer(tmp_path, transformers.Qwen3Model, torch.float32)
    held = {name: tensor.clone() for name, tensor in held.items()}
    held["extra.weight"] = torch.zeros(2)
    del held["layers.1.mlp.up_proj.weight"]
    held["norm.weight"] = torch.zeros(63)
    held["layers.2.self_attn.k_norm.weight"] = torch.zeros(32, dtype=torch.int32)
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError) as raised:
        find_model(str(tmp_path)).load(None)
    for problem in (
        "unknown extra.weight [2]",
        "missing layers.1.mlp.up_proj.weight [96, 64]",
        "norm.weight is [63], must be [64]",
        "layers.2.self_attn.k_norm.weight is stored as I32",
    ):
        assert problem in str(raised.value)
    assert len(str(raised.value).splitlines()) == 5


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), "not readable as JSON"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 20), "not a readable safetensors file"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no *.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
    ],
)
def test_a_damaged_folder_is_a_clear_error(tmp_path, damage, message):
    write_peer(tmp_path, transformers.Qwen3Model, torch.float32)
    damage(tmp_path)
    with pytest.raises(UserError) as raised:
        find_model(str(tmp_path)).load(None)
    assert message in str(raised.value)
