"""A release as sentence-transformers and transformers read it, its files, and every refusal."""

import dataclasses
import json
import shutil

import huggingface_hub
import jax
import numpy as np
import pytest
import sentence_transformers
import tiny
import torch
import transformers

from f2llm_jax import convert, text
from f2llm_jax.errors import UserError
from f2llm_jax.inference.encode import load_encoder, truncate_and_normalize
from f2llm_jax.release import hf_folder
from f2llm_jax.release.verify import compare
from f2llm_jax.storage.files import write_json
from f2llm_jax.weights import chunks
from f2llm_jax.weights.hf_mapping import TABLE
from f2llm_jax.weights.models import find_model

LIMIT = 96
PROMPT = text.query_prompt(text.DEFAULT_QUERY_INSTRUCTION)


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    return tiny.origin(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def folder(origin, tmp_path_factory):
    return export(origin, tmp_path_factory.mktemp("release") / "model")


@pytest.fixture(scope="module")
def encoder(origin):
    return load_encoder(origin)


@pytest.fixture(scope="module")
def sentences(folder):
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu")


def export(origin, out, dtype="float32", overwrite=False):
    hf_folder.export(origin, out, hf_folder.ReleaseForm(dtype=dtype), overwrite=overwrite)
    return out


def read(path):
    return json.loads(path.read_text())


def worst_cosine(ours, theirs, dim=64):
    return (truncate_and_normalize(ours, dim) * truncate_and_normalize(theirs, dim)).sum(1).min()


def test_sentence_transformers_gives_our_vectors(encoder, sentences):
    assert sentences.max_seq_length == LIMIT and sentences.get_embedding_dimension() == 64
    assert sentences.default_prompt_name is None and sentences.similarity_fn_name == "cosine"
    documents, queries = encoder.encode(tiny.TEXTS), encoder.encode(tiny.TEXTS, PROMPT)
    batched = sentences.encode(tiny.TEXTS)
    assert worst_cosine(documents, batched) >= 0.99999
    np.testing.assert_allclose(np.linalg.norm(batched, axis=1), 1, atol=1e-5)  # without a 2_Normalize folder
    assert worst_cosine(documents, np.stack([sentences.encode(t) for t in tiny.TEXTS])) >= 0.99999
    assert worst_cosine(documents, sentences.encode(tiny.TEXTS, prompt_name="document")) >= 0.99999
    assert worst_cosine(queries, sentences.encode(tiny.TEXTS, prompt_name="query")) >= 0.99999
    assert worst_cosine(queries, sentences.encode_query(tiny.TEXTS)) >= 0.99999
    assert worst_cosine(documents, queries) < 0.999  # the prompt matters, so the lines above mean something


def test_sentence_transformers_truncates_widths_and_texts(encoder, origin, folder, sentences):
    narrow = sentence_transformers.SentenceTransformer(str(folder), device="cpu", truncate_dim=16).encode(tiny.TEXTS)
    assert narrow.shape == (len(tiny.TEXTS), 16)
    assert worst_cosine(encoder.encode(tiny.TEXTS), narrow, 16) >= 0.99999
    sentences.max_seq_length = 7
    try:
        assert worst_cosine(load_encoder(origin, max_length=7).encode(tiny.TEXTS), sentences.encode(tiny.TEXTS)) >= 0.99999
    finally:
        sentences.max_seq_length = LIMIT


def test_transformers_gives_our_vectors_on_either_padding_side(encoder, folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder)
    assert type(model) is transformers.Qwen3Model and model.dtype == torch.float32
    assert tokenizer.padding_side == "right" and tokenizer.model_max_length == LIMIT
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    for side in ("right", "left"):
        tokenizer.padding_side = side
        inputs = tokenizer(tiny.TEXTS, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state
        last = inputs.attention_mask.shape[1] - 1 - inputs.attention_mask.flip(1).argmax(1)
        rows = torch.arange(len(last))
        assert (inputs.input_ids[rows, last] == tokenizer.eos_token_id).all()  # also of the text that was cut
        assert worst_cosine(encoder.encode(tiny.TEXTS), hidden[rows, last].numpy()) >= 0.99999
        family_last = inputs.attention_mask.sum(1) - 1 if side == "right" else torch.full_like(last, -1)  # as cards write it
        assert torch.equal(hidden[rows, family_last], hidden[rows, last])


def test_config_is_of_this_model(folder, origin):
    config = read(folder / "config.json")
    assert config["architectures"] == ["Qwen3Model"] and config["model_type"] == "qwen3"
    assert config["layer_types"] == ["full_attention"] * 3 and config["max_window_layers"] == config["num_hidden_layers"] == 3
    assert config["vocab_size"] == 320 and config["max_position_embeddings"] == 512
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6
    assert config["tie_word_embeddings"] is True and config["use_cache"] is False
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["is_matryoshka"] is True and config["matryoshka_dimensions"] == [16, 32, 64]
    again = find_model(str(folder))
    assert (again.config, again.embedding.matryoshka_dims, again.embedding.max_length) == (origin.config, (16, 32, 64), LIMIT)


def test_the_neighbouring_files(folder):
    assert [m["type"] for m in read(folder / "modules.json")] == [
        f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "Normalize")
    ]
    pooling = read(folder / "1_Pooling/config.json")
    assert pooling["word_embedding_dimension"] == 64 and pooling["include_prompt"] is True
    assert [mode for mode, on in pooling.items() if mode.startswith("pooling_mode_") and on] == ["pooling_mode_lasttoken"]
    assert pooling["pooling_mode_cls_token"] is False and pooling["pooling_mode_mean_tokens"] is False  # TEI has no default
    assert read(folder / "sentence_bert_config.json") == {"max_seq_length": LIMIT, "do_lower_case": False}
    assert read(folder / "config_sentence_transformers.json")["prompts"] == {"query": PROMPT, "document": ""}
    assert read(folder / "special_tokens_map.json") == {"eos_token": tiny.EOS, "pad_token": tiny.PAD}
    assert read(folder / "added_tokens.json") == {tiny.PAD: 0, tiny.EOS: 1}
    tokenizer = text.load_tokenizer(folder)
    assert len(read(folder / "vocab.json")) == tokenizer.vocab_size
    merges = (folder / "merges.txt").read_text().splitlines()
    assert merges[0] == "#version: 0.2" and len(merges) - 1 == tokenizer.vocab_size - 258
    assert text.load_tokenizer(folder).fingerprint == find_model(str(folder)).tokenizer.fingerprint
    assert (folder / "README.md").read_text().startswith("---\nlibrary_name: sentence-transformers\n")


def test_text_limit_stays_below_the_positions(tmp_path):
    unknown = tiny.origin(tmp_path, max_length=None, matryoshka_dims=())
    assert unknown.text_limit == 512
    assert dataclasses.replace(unknown, config=dataclasses.replace(unknown.config, max_position_embeddings=40960)).text_limit == 8192
    assert "is_matryoshka" not in read(export(unknown, tmp_path / "out") / "config.json")


def test_bytes_do_not_depend_on_the_run(origin, folder, tmp_path):
    again = export(origin, tmp_path / "again")
    for file in (f for f in folder.rglob("*") if f.is_file()):
        assert (again / file.relative_to(folder)).read_bytes() == file.read_bytes(), file.name


def test_verify_holds(origin, tmp_path, capsys):
    """In float16; test_release_schemas.py compares the other dtypes."""
    folder = export(origin, tmp_path / "out", "float16")
    (tmp_path / "more.txt").write_text("one more\nund noch einer\n")
    assert convert.main(["verify", str(folder), "--texts", str(tmp_path / "more.txt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 14 and all(line.endswith("ok") for line in lines)


def test_verify_sees_a_wrong_prompt_and_a_lost_eos(origin, tmp_path, capsys):
    folder = export(origin, tmp_path / "out")
    prompts = folder / "config_sentence_transformers.json"
    prompts.write_text(prompts.read_text().replace("Query: ", "Query:"))
    failed = {(a.peer, a.case) for a in compare(str(folder)) if not a.holds}
    assert failed == {("sentence-transformers", "golden, one by one")}  # whose prompts are of the release as it was written
    tokenizer = read(folder / "tokenizer.json") | {"post_processor": None}  # ours puts the EOS back, others do not
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert convert.main(["verify", str(folder)]) == 1
    assert capsys.readouterr().out.count("FAILED") == 12  # all but this project's own golden vectors


def test_convert_both_ways(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # relative paths, which Orbax takes none of
    assert convert.main(["from-hf", str(folder), "run"]) == 0
    assert convert.main(["to-hf", "run", "out", "--max-shard-size", "5GB"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "released run to out in float32"
    for file in (f for f in folder.rglob("*") if f.is_file() and not f.name.startswith(".")):
        assert (tmp_path / "out" / file.relative_to(folder)).read_bytes() == file.read_bytes(), file.name


def test_refusals_are_one_line_and_touch_nothing(folder, tmp_path, capsys):
    def refused(*arguments):
        assert convert.main([str(a) for a in arguments]) == 1
        error = capsys.readouterr().err.strip()
        assert error.startswith("convert: error: ") and len(error.splitlines()) == 1
        return error

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("dear")
    assert "has no .made_by_f2llm_jax.json" in refused("to-hf", folder, tmp_path / "mine", "--overwrite")
    assert "has no .made_by_f2llm_jax.json" in refused("from-hf", folder, tmp_path / "mine", "--overwrite")
    assert (tmp_path / "mine/thesis.txt").read_text() == "dear"
    assert "is read from there" in refused("to-hf", folder, folder)
    assert "is a file" in refused("to-hf", folder, tmp_path / "mine/thesis.txt")
    assert "no local folder" in refused("to-hf", tmp_path / "absent", tmp_path / "out")
    assert "neither a workdir" in refused("to-hf", tmp_path / "absent/7", tmp_path / "out")
    assert "is not a folder" in refused("verify", tmp_path / "absent")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]
    with pytest.raises(SystemExit):
        convert.main(["to-hf", str(folder), "out", "--max-shard-size", "5 parsecs"])


def test_unfit_tokenizers_are_refused(origin, tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        export(dataclasses.replace(origin, tokenizer=None), tmp_path / "out")
    with pytest.raises(UserError, match="only 256 embedding rows"):
        export(dataclasses.replace(origin, config=dataclasses.replace(origin.config, vocab_size=256)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_the_older_release(origin, tmp_path, tmp_path_factory):
    """Weights that overflow float16 are found in the middle of writing."""
    out = export(origin, tmp_path / "out")
    before = (out / "model.safetensors").read_bytes()
    huge = tiny.origin(tmp_path_factory.mktemp("t"), load=lambda mesh: jax.tree.map(lambda x: x * 1e6, origin.load(mesh)))
    with pytest.raises(UserError, match=r"embed_tokens\.weight holds values that are not finite in float16"):
        export(huge, out, "float16", overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_every_step_of_a_run(folder, tmp_path, capsys):
    assert convert.main(["from-hf", str(folder), str(tmp_path / "run")]) == 0
    checkpoints = tmp_path / "run/checkpoints"
    shutil.copytree(checkpoints / "0", checkpoints / "7")
    assert convert.main(["to-hf", str(tmp_path / "run"), str(tmp_path / "out"), "--all-steps"]) == 0
    for step in (0, 7):
        assert (tmp_path / f"out/step-{step}/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert "Weights after 7 updates" in (tmp_path / "out/step-7/README.md").read_text()
    shutil.rmtree(tmp_path / "out/step-0")
    assert convert.main(["to-hf", str(tmp_path / "run"), str(tmp_path / "out"), "--all-steps"]) == 1  # step-7 stands
    assert "pass --overwrite" in capsys.readouterr().err and not (tmp_path / "out/step-0").exists()


def test_a_checkpoint_whose_description_was_changed_is_refused(folder, tmp_path, capsys):
    assert convert.main(["from-hf", str(folder), str(tmp_path / "run")]) == 0
    description = tmp_path / "run/checkpoints/0/_CHECKPOINT_METADATA"
    right = description.read_text()
    description.write_text(right.replace('"intermediate_size": 96', '"intermediate_size": 128'))
    assert convert.main(["to-hf", str(tmp_path / "run"), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "_CHECKPOINT_METADATA is damaged" in error
    description.write_text(right.replace('"decoder"', '"encoder"'))
    assert convert.main(["to-hf", str(tmp_path / "run"), str(tmp_path / "out")]) == 1
    assert "_CHECKPOINT_METADATA is damaged" in capsys.readouterr().err
    description.write_text(right)
    (tmp_path / "run/tokenizer/tokenizer.json").unlink()
    assert convert.main(["to-hf", str(tmp_path / "run"), str(tmp_path / "out")]) == 1
    assert "tokenizer.json does not exist" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_width_that_was_not_trained_is_refused(origin, tmp_path):
    with pytest.raises(UserError, match="not trained for 24 dimensions, only for 16, 32, 64"):
        hf_folder.export(origin, tmp_path / "out", hf_folder.ReleaseForm(truncate_dim=24))


def test_push_sends_nothing_unless_told(folder, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert convert.main(["push", str(folder), "owner/name"]) == 0
    shown = capsys.readouterr().out
    assert "model.safetensors" in shown and "nothing was sent" in shown
    assert convert.main(["push", str(folder), "owner/name", "--yes"]) == 1
    assert "set HF_TOKEN" in capsys.readouterr().err


def test_push_hands_the_token_to_the_client_only(folder, capsys, monkeypatch):
    calls = []

    class Hub:
        def __init__(self, token):
            calls.append(token)

        def create_repo(self, repo_id, private, exist_ok):
            return f"https://hub/{repo_id}"

        def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
            calls.append((repo_id, folder_path, allow_patterns))

    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert convert.main(["push", str(folder), "owner/name", "--yes"]) == 0
    assert calls[:1] == ["secret"] and calls[1][:2] == ("owner/name", str(folder))
    assert "config.json" in calls[1][2] and not [name for name in calls[1][2] if name.startswith(".")]
    assert "secret" not in "".join(capsys.readouterr())


def test_the_card_tells_what_the_run_recorded(folder, tmp_path):
    assert convert.main(["from-hf", str(folder), str(tmp_path / "run")]) == 0
    run = tmp_path / "run"
    shutil.move(run / "checkpoints/0", run / "checkpoints/2")
    source = {
        "name": "pairs",
        "kind": "retrieval",
        "languages": ["de", "no", "sr_Latn"],
        "rows": {"train": 1234},
        "documents": 99,
        "negatives": 3,
    }
    write_json(run / "dataset.json", {"sources": [source]}, sealed=True)
    write_json(run / "config.json", {"init": "/home/me/base", "optimizer": {"learning_rate": 1e-5}}, sealed=True)
    write_json(run / "environment.json", {"jax": "0.10.2", "commit": "abc", "hosts": None}, sealed=True)
    lines = [{"step": 0, "validation/loss": 4.0}, {"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "validation/loss": 1.5}]
    accuracies = {"validation/accuracy": 0.75, "validation/accuracy/dim/16": 0.5, "validation/accuracy/dim/64": 0.75}
    lines = [line | (accuracies | {"validation/accuracy/language/de": 0.6} if "validation/loss" in line else {}) for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 3, "loss": 9.0}]))
    out = tmp_path / "out"
    assert convert.main(["to-hf", str(run), str(out), "--base-model", "owner/base", "--license", "mit"]) == 0
    card = huggingface_hub.ModelCard.load(out / "README.md")
    assert card.data.language == ["de", "no", "sr"] and card.data.license == "mit" and card.data.base_model == "owner/base"
    for part in (
        "| pairs | retrieval | 1,234 | 99 | 3 |",
        "| `optimizer.learning_rate` | `1e-05` |",
        "| commit | abc |",
        "| loss | 4.0000 | 1.5000 |",
    ):
        assert part in card.text
    assert "/home/me" not in card.text and "hosts" not in card.text
    assert "| accuracy | 0.7500 | 0.7500 |" in card.text and "| 16 | 0.5000 |" in card.text and "language/de" not in card.text
    assert (out / "matryoshka_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "training_curve.png").read_bytes().startswith(b"\x89PNG")


def test_an_import_is_in_chunks_of_a_mebibyte(folder, tmp_path):
    """What is read at once bounds the memory of a later release; layers of less than a MiB are stored together."""
    assert convert.main(["from-hf", str(folder), str(tmp_path / "run")]) == 0
    config = find_model(str(folder)).config
    with find_model(str(tmp_path / "run")).open_params() as parameters:
        assert {parameters.unit(entry) for entry in TABLE if entry.stacked} == {config.num_hidden_layers}
    wide = {"layers/gate": (4, 512, 512), "embedding": (151_669, 128)}
    assert [chunks.chunk_rows(shape, shape, stacked="layers" in name) for name, shape in wide.items()] == [1, 21_667]
