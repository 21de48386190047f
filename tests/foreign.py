"""Models of other makers, on disk as they leave them."""

import json

import tiny
import torch
import transformers

QWEN3_EMBEDDING_PROMPT = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"


def qwen3_embedding(folder, tokenizer=None, max_shard_size="1GB", dtype=torch.float32, **shape):
    """Random weights in the form of Qwen/Qwen3-Embedding-0.6B: every file that it has, names and keys of its own.

    Args:
      folder: to write.
      tokenizer: a folder with a tokenizer that appends `<|endoftext|>`; None for a small one.
      max_shard_size: as `save_pretrained` takes it.
      dtype: of the weights.
      shape: fields of transformers' `Qwen3Config` in place of the small ones.
    """
    c = tiny.CONFIG
    settings = {
        "vocab_size": c.vocab_size, "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers, "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads, "head_dim": c.head_dim, "max_position_embeddings": 512, **shape,
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**settings, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, tie_word_embeddings=True)
    model = transformers.Qwen3Model(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(std=0.1)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    written = json.loads((folder / "config.json").read_text())
    layers = written["num_hidden_layers"]
    for newer in ("layer_types", "rope_parameters", "dtype"):
        written.pop(newer, None)
    written |= {
        "architectures": ["Qwen3ForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "max_window_layers": layers, "rope_scaling": None,
        "rope_theta": 1000000, "torch_dtype": str(dtype).removeprefix("torch."), "transformers_version": "4.51.3", "use_cache": True,
    }  # fmt: skip
    write(folder / "config.json", written)
    if tokenizer is None:
        tiny.write_tokenizer(folder, form="embedding")
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_text((tokenizer / name).read_text())
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"} for i, (path, kind) in enumerate(kinds)
    ]
    write(folder / "modules.json", modules)
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    pooling = {f"pooling_mode_{mode}": mode == "lasttoken" for mode in modes}
    (folder / "1_Pooling").mkdir()
    write(folder / "1_Pooling/config.json", {"word_embedding_dimension": settings["hidden_size"], **pooling, "include_prompt": True})
    prompts = {"query": QWEN3_EMBEDDING_PROMPT, "document": ""}
    write(folder / "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"})
    write(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0, "max_new_tokens": 2048})
    return folder


def write(path, content):
    path.write_text(json.dumps(content, indent=2))


def with_template(folder, single, bos=None):
    """The small tokenizer with a template such as "<s> $A" as its post-processor, in `folder`."""
    tiny.write_tokenizer(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}
    piece = lambda name: {"Sequence": {"id": "A", "type_id": 0}} if name == "$A" else {"SpecialToken": {"id": name, "type_id": 0}}  # noqa: E731
    special = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in single.split() if name != "$A"}
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": [piece(name) for name in single.split()], "pair": pair, "special_tokens": special,
    }  # fmt: skip
    write(folder / "tokenizer.json", content)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write(folder / "tokenizer_config.json", config | ({"bos_token": bos} if bos else {}))
    return folder
