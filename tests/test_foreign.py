"""Models that come in: Qwen3-Embedding's form from import to release, tokenizers of every family, and folders that are refused by name."""

import json
import shutil

import foreign
import gcs
import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
import sentence_transformers
import tiny
import torch
import transformers
from etils import epath
from flax import nnx
from safetensors.torch import load_file, save_file
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from f2llm_jax import convert, embed
from f2llm_jax.errors import UserError
from f2llm_jax.inference.encode import load_encoder, truncate_and_normalize
from f2llm_jax.model.decoder import abstract_decoder
from f2llm_jax.release import hf_folder
from f2llm_jax.text import load_tokenizer
from f2llm_jax.weights import hf_fetch
from f2llm_jax.weights.digest import model_digest
from f2llm_jax.weights.models import find_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
TEXTS = [*tiny.TEXTS, "a <|im_end|> b <|endoftext|>", "LONG the cat " * 200]
SAME = 0.99999


@pytest.fixture(scope="module")
def embedding(tmp_path_factory):
    return foreign.qwen3_embedding(tmp_path_factory.mktemp("foreign") / "model")


def ours(folder, queries=False):
    model = find_model(str(folder))
    raw = load_encoder(model).encode(TEXTS, model.embedding.query_prompt if queries else "")
    return truncate_and_normalize(raw, model.width)


def theirs(folder, queries=False):
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    vectors = model.encode(TEXTS, prompt_name="query" if queries else None)
    return truncate_and_normalize(vectors, vectors.shape[1])


def worst(one, other):
    assert one.shape == other.shape
    return float((one * other).sum(1).min())


def test_qwen3_embedding_gives_sentence_transformers_vectors(embedding):
    model = find_model(str(embedding))
    assert model.tokenizer.decode([model.tokenizer.end_id]) == "<|endoftext|>"
    assert model.embedding.query_prompt == foreign.QWEN3_EMBEDDING_PROMPT and model.text_limit == 512
    assert worst(ours(embedding), theirs(embedding)) >= SAME
    assert worst(ours(embedding, queries=True), theirs(embedding, queries=True)) >= SAME
    assert worst(ours(embedding), ours(embedding, queries=True)) < 0.999


def test_qwen3_embedding_is_imported_and_released_again(embedding, tmp_path, capsys):
    assert convert.main(["from-hf", str(embedding), str(tmp_path / "run")]) == 0
    assert convert.main(["to-hf", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    for queries in (False, True):
        assert worst(ours(embedding, queries), theirs(tmp_path / "out", queries)) >= SAME
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("a")["input_ids"][-1] == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    shown = capsys.readouterr().err
    assert "end token       <|endoftext|>" in shown and foreign.QWEN3_EMBEDDING_PROMPT.splitlines()[0] in shown


@pytest.mark.parametrize(("dtype", "shards"), [(torch.bfloat16, "60KB"), (torch.float16, "1GB")])
def test_it_is_read_sharded_and_in_any_dtype(tmp_path, dtype, shards):
    folder = foreign.qwen3_embedding(tmp_path / "model", max_shard_size=shards, dtype=dtype)
    stored = transformers.AutoModel.from_pretrained(folder, dtype=dtype).float().save_pretrained(tmp_path / "wide")
    assert stored is None and (len(list(folder.glob("*.safetensors"))) > 1) == (shards == "60KB")
    wide = load_file(tmp_path / "wide/model.safetensors")["embed_tokens.weight"].numpy()
    np.testing.assert_array_equal(np.asarray(find_model(str(folder)).load(None)["embedding"].get_value()), wide)


def test_a_folder_in_a_bucket_is_the_folder_on_disk(embedding, monkeypatch, tmp_path):
    monkeypatch.setattr("f2llm_jax.weights.hf_fetch.CACHE", tmp_path / "cache")
    with gcs.emulator() as bucket:
        for file in (file for file in embedding.rglob("*") if file.is_file()):
            target = epath.Path(f"{bucket}/model") / str(file.relative_to(embedding))
            target.write_bytes(file.read_bytes())
        assert worst(ours(embedding), ours(f"{bucket}/model")) >= SAME
        (epath.Path(f"{bucket}/model") / "1_Pooling/config.json").write_text('{"pooling_mode": "mean", "embedding_dimension": 64}')
        with pytest.raises(UserError, match="pooling_mode"):  # no stale copy
            find_model(f"{bucket}/model")


def test_a_hub_model_is_downloaded_once_for_all_processes(embedding, monkeypatch, tmp_path):
    """The Hub is huggingface_hub's own cache, offline, of which nothing is left once the first process has shared the model."""
    snapshot = tmp_path / "hub/models--owner--name/snapshots" / ("0" * 40)
    shutil.copytree(embedding, snapshot)
    (tmp_path / "hub/models--owner--name/refs").mkdir()
    (tmp_path / "hub/models--owner--name/refs/main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hf_fetch.share("owner/name", tmp_path / "run")
    shutil.rmtree(tmp_path / "hub")
    hf_fetch.share("owner/name", tmp_path / "run")
    hf_fetch.share(str(embedding), tmp_path / "run")  # which is a folder
    assert [path.name for path in (tmp_path / "run/downloads").iterdir()] == ["owner--name"]
    model = find_model("owner/name", shared=tmp_path / "run")
    assert model.embedding.query_prompt == foreign.QWEN3_EMBEDDING_PROMPT
    np.testing.assert_array_equal(model.load(None)["norm"].get_value(), find_model(str(embedding)).load(None)["norm"].get_value())
    with pytest.raises(UserError, match="could not be downloaded"):
        find_model("owner/name")


# Round trips


def test_saved_again_by_sentence_transformers(embedding, tmp_path):
    """Version 6 writes the limit to tokenizer_config.json and the pooling in a new form."""
    assert convert.main(["from-hf", str(embedding), str(tmp_path / "run")]) == 0
    assert convert.main(["to-hf", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    limited = json.loads((tmp_path / "out/sentence_bert_config.json").read_text()) | {"max_seq_length": 64}
    (tmp_path / "out/sentence_bert_config.json").write_text(json.dumps(limited))
    sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu").save_pretrained(str(tmp_path / "again"))
    model = find_model(str(tmp_path / "again"))
    assert model.text_limit == 64 and model.embedding.query_prompt == foreign.QWEN3_EMBEDDING_PROMPT
    assert "max_seq_length" not in (tmp_path / "again/sentence_bert_config.json").read_text()
    for queries in (False, True):
        assert worst(ours(tmp_path / "out", queries), ours(tmp_path / "again", queries)) >= SAME
        assert worst(ours(tmp_path / "again", queries), theirs(tmp_path / "again", queries)) >= SAME


def test_trained_by_sentence_transformers_and_released_again(tmp_path):
    """The widths, the limit and the prompts of a model that was truncated for good, five steps of their trainer later."""
    hf_folder.export(tiny.origin(tmp_path / "t"), tmp_path / "out", hf_folder.ReleaseForm(truncate_dim=32, query_instruction="Find it."))
    model = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    model[2].requires_grad_(False)  # the layer that truncates
    pairs = [sentence_transformers.InputExample(texts=[f"the cat {i}", f"die Katze {i}"]) for i in range(20)]
    loss = MultipleNegativesRankingLoss(model)
    loader = torch.utils.data.DataLoader(pairs, batch_size=4)
    model.old_fit([(loader, loss)], steps_per_epoch=5, warmup_steps=0, optimizer_params={"lr": 1e-3}, show_progress_bar=False)
    model.save_pretrained(str(tmp_path / "trained"))
    assert worst(theirs(tmp_path / "out"), theirs(tmp_path / "trained")) < 0.9999  # it did train
    assert convert.main(["from-hf", str(tmp_path / "trained"), str(tmp_path / "run")]) == 0
    assert convert.main(["to-hf", str(tmp_path / "run"), str(tmp_path / "again")]) == 0
    found = find_model(str(tmp_path / "again"))
    assert (found.width, found.embedding.matryoshka_dims, found.text_limit) == (32, (16, 32), 96)
    assert found.embedding.prompts == {"query": "Instruct: Find it.\nQuery: ", "document": ""}
    for queries in (False, True):
        assert worst(ours(tmp_path / "trained", queries), theirs(tmp_path / "trained", queries)) >= SAME
        assert worst(theirs(tmp_path / "trained", queries), theirs(tmp_path / "again", queries)) >= SAME


# Tokenizers


@pytest.mark.parametrize(
    ("single", "bos", "ends"),
    [
        ("$A <|endoftext|>", None, "<|endoftext|>"),  # Qwen3-Embedding
        ("<|endoftext|> $A", "<|endoftext|>", "<|im_end|>"),  # Llama, Llama 3, Gemma: a BOS, no end token
        ("<|endoftext|> $A <|im_end|>", "<|endoftext|>", "<|im_end|>"),
        ("$A", None, "<|im_end|>"),  # a template that adds nothing
    ],
)
def test_a_text_ends_in_what_the_post_processor_appends_else_in_eos(tmp_path, single, bos, ends):
    folder = foreign.with_template(tmp_path / "tokenizer", single, bos)
    tokenizer = load_tokenizer(folder)
    tokenizer.save(tmp_path / "saved")
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    first = peer.convert_tokens_to_ids(bos) if bos else None
    for text in ("", "a", "the cat sat on the mat", "the dog " * 40, f"a {ends} b", f"{ends}{ends}", " \n"):
        for limit in (4, 8, 10_000):
            (ids,) = tokenizer.encode([text], limit)
            assert ids[-1] == peer.convert_tokens_to_ids(ends) and len(ids) <= limit
            assert first is None or ids[0] == first
            assert ids.tolist() == peer(text, truncation=True, max_length=limit)["input_ids"]
    assert load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("single", "message"),
    [
        ("<|im_end|> $A", "which also ends it"),  # OPT: its BOS is its EOS
        ("<|im_end|> $A <|im_end|>", "which also ends it"),
        ("$A <|im_end|> <|im_end|>", "in 2 tokens"),
        ("$A <|endoftext|> <|im_end|>", "in 2 tokens"),
    ],
)
def test_tokenizers_without_one_end_token_are_refused(tmp_path, single, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer(foreign.with_template(tmp_path / "tokenizer", single, "<|im_end|>" if single[0] == "<" else None))


def with_hole(folder, number):
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    moved = max(vocabulary, key=vocabulary.get)
    vocabulary[moved] = number
    foreign.write(folder / "tokenizer.json", content)
    return moved


def test_ids_are_bounded_by_the_largest_and_not_by_their_number(embedding, tmp_path):
    shutil.copytree(embedding, tmp_path / "model")
    moved = with_hole(tmp_path / "model", 319)
    tokenizer = load_tokenizer(tmp_path / "model")
    assert tokenizer.vocab_size == 320 and tokenizer.backend.get_vocab_size() < 320
    assert worst(ours(tmp_path / "model"), theirs(tmp_path / "model")) >= SAME
    with_hole(tmp_path / "model", 320)
    with pytest.raises(UserError, match="ids up to 320, but there are only 320 embedding rows"):
        load_encoder(find_model(str(tmp_path / "model")))
    assert moved


def test_no_gather_clamps(embedding):
    model = find_model(str(embedding))
    encoder = load_encoder(model)
    with pytest.raises(ValueError, match="320"):
        encoder.encode_ids([np.array([5, 320, 0], np.int32)])
    graphdef, _ = abstract_decoder(model.config)
    rows = jnp.array([[5, 320, 0]]), jnp.arange(3)[None], jnp.ones((1, 3), jnp.int32)
    hidden = nnx.merge(graphdef, model.load(None))(*rows)
    assert np.isnan(hidden[0, 1:]).all()  # the text that holds the id; the default gather would take the table's last row


# Folders that are refused by name


def test_a_tensor_that_is_there_twice(embedding, tmp_path):
    shutil.copytree(embedding, tmp_path / "files")
    save_file({"norm.weight": torch.ones(64)}, tmp_path / "files/model-00001-of-00002.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"norm\.weight twice.*model-00001-of-00002\.safetensors.*model\.safetensors"):
        find_model(str(tmp_path / "files")).load(None)
    shutil.copytree(embedding, tmp_path / "prefix")
    tensors = load_file(embedding / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.zeros(64)}, tmp_path / "prefix/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"norm\.weight twice"):
        find_model(str(tmp_path / "prefix")).load(None)


def test_an_adapter_is_called_one(embedding, tmp_path):
    (tmp_path / "lora").mkdir()
    foreign.write(tmp_path / "lora/adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen3-0.6B"})
    with pytest.raises(UserError, match=r"adapter.*merge"):
        find_model(str(tmp_path / "lora"))
    shutil.copytree(embedding, tmp_path / "mixed")
    save_file(
        {"base_model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 64)}, tmp_path / "mixed/extra.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match="adapter"):
        find_model(str(tmp_path / "mixed")).load(None)


def test_transformers_4_does_not_take_the_tokenizer_for_a_broken_one(tmp_path):
    """transformers 4.57 asks config.json for a version before it warns of a regular expression that only Mistral has."""
    hf_folder.export(tiny.origin(tmp_path / "t"), tmp_path / "out", hf_folder.ReleaseForm(golden=False))
    version = json.loads((tmp_path / "out/config.json").read_text())["transformers_version"]
    assert tuple(map(int, version.split("."))) > (4, 57, 2)


def test_inspect_names_what_is_taken_and_what_is_ignored(embedding, tmp_path, capsys):
    shutil.copytree(embedding, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    foreign.write(tmp_path / "model/config.json", config | {"my_own_note": 1})
    assert convert.main(["inspect", str(tmp_path / "model")]) == 0
    shown = capsys.readouterr().out
    for line in (
        "layers          3",
        "end token       <|endoftext|> (0)",
        "text limit      512 tokens",
        "prompt query    'Instruct: Given a web",
    ):
        assert line in shown
    assert "my_own_note (unknown" in shown and "torch_dtype" in shown
    foreign.write(tmp_path / "model/config.json", config | {"is_causal": False})
    assert convert.main(["inspect", str(tmp_path / "model")]) == 1
    assert "is_causal is False, must be True" in capsys.readouterr().err


def test_an_instruction_of_the_users_takes_the_form_of_the_models_prompt(embedding, tmp_path):
    (tmp_path / "in.txt").write_text("how do plants make food\n")
    flags = [
        "--model",
        str(embedding),
        "--input",
        str(tmp_path / "in.txt"),
        "--output",
        str(tmp_path / "out.npy"),
        "--instruction",
        "Find it.",
    ]
    assert embed.main(flags) == 0
    peer = sentence_transformers.SentenceTransformer(str(embedding), device="cpu")
    want = peer.encode(["how do plants make food"], prompt="Instruct: Find it.\nQuery:")
    assert (np.load(tmp_path / "out.npy") * want).sum() >= SAME
    assert (np.load(tmp_path / "out.npy") * peer.encode(["how do plants make food"], prompt="Instruct: Find it.\nQuery: ")).sum() < 0.9999


def test_a_prompt_without_a_place_for_an_instruction_is_not_replaced_by_one(embedding, tmp_path):
    from f2llm_jax.evaluation.mteb_encoder import model_meta

    shutil.copytree(embedding, tmp_path / "model")
    path = tmp_path / "model/config_sentence_transformers.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prompts": {"query": "query: "}}))
    assert worst(ours(tmp_path / "model", queries=True), theirs(tmp_path / "model", queries=True)) >= SAME
    with pytest.raises(UserError, match=r"queries of .* begin with 'query: ', where a task's instruction has no place"):
        model_meta(find_model(str(tmp_path / "model")), "0" * 64)
    assert model_meta(find_model(str(embedding)), "0" * 64).loader_kwargs["instruction_template"] == "Instruct: {instruction}\nQuery:"


def test_every_command_serves_the_width_of_a_release(tmp_path):
    """The vectors of the encoder, their digest and what `embed` writes are those of the truncated model."""
    origin = tiny.origin(tmp_path / "t")
    hf_folder.export(origin, tmp_path / "whole", hf_folder.ReleaseForm(golden=False))
    hf_folder.export(origin, tmp_path / "narrow", hf_folder.ReleaseForm(truncate_dim=16, golden=False))
    whole, narrow = find_model(str(tmp_path / "whole")), find_model(str(tmp_path / "narrow"))
    assert (whole.width, narrow.width) == (64, 16) and model_digest(whole) != model_digest(narrow)
    np.testing.assert_array_equal(load_encoder(narrow).encode(TEXTS), load_encoder(whole).encode(TEXTS)[:, :16])
    assert worst(ours(tmp_path / "narrow"), theirs(tmp_path / "narrow")) >= SAME
