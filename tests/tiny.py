"""A model small enough for tests, on disk as other software would leave it."""

import contextlib
import functools
import json

import jax
import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from f2llm_jax.model.decoder import init_decoder
from f2llm_jax.model.sizes import DecoderConfig
from f2llm_jax.text import load_tokenizer
from f2llm_jax.weights.checkpoint_reader import flatten
from f2llm_jax.weights.embedding_config import EmbeddingConfig
from f2llm_jax.weights.models import LoadableModel

EOS, PAD = "<|im_end|>", "<|endoftext|>"
CONFIG = DecoderConfig(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,  # heads x head_dim is not the hidden size
    max_position_embeddings=512,
)
QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# What Qwen/Qwen3-Embedding-0.6B has in tokenizer_config.json besides its tokens and its chat template.
QWEN3_EMBEDDING_TOKENIZER = {
    "add_bos_token": False,
    "add_prefix_space": False,
    "additional_special_tokens": [EOS],
    "bos_token": None,
    "clean_up_tokenization_spaces": False,
    "errors": "replace",
    "model_max_length": 131072,
    "split_special_tokens": False,
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
}
TEXTS = [
    "the cat sat on the mat",
    "",
    "a",
    "die Katze saß auf der Matte",
    "猫坐在垫子上",
    "the cat sat on the mat",  # twice
    "القطة على الحصيرة",
    "the dog " * 40,
    "def add(a, b):\n    return a + b",
]


def write_tokenizer(folder, form="bare"):
    """A byte-level BPE tokenizer in one of three forms.

    "bare": without an end token of its own, as a base model has it; "qwen": with Qwen's pre-tokenizer, which llama.cpp knows;
    "embedding": as Qwen3-Embedding has it, whose post-processor appends `<|endoftext|>` while its `eos_token` is `<|im_end|>`.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    if form == "bare":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[PAD, EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    config = {"tokenizer_class": "TokenizersBackend", "eos_token": EOS, "pad_token": PAD, "model_max_length": 10**6}
    if form == "embedding":
        end = [(PAD, tokenizer.token_to_id(PAD))]
        template = processors.TemplateProcessing(single=f"$A {PAD}", pair=f"$A {PAD} $B:1 {PAD}:1", special_tokens=end)
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
        special = {str(tokenizer.token_to_id(token)): {"content": token, "special": True} for token in (PAD, EOS)}
        config = config | QWEN3_EMBEDDING_TOKENIZER | {"added_tokens_decoder": special}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@functools.cache
def _params(config, mesh):
    """Five times what training starts with: of random weights near zero all texts would have nearly the same embedding."""
    return jax.tree.map(lambda x: 5 * x if x.ndim > 2 or x.shape[0] == config.vocab_size else x, init_decoder(config, 0, mesh))


def origin(folder, config=CONFIG, tokenizer=None, load=None, **embedding):
    """A model of random weights that knows what training would have told it; its tokenizer is written to `folder`."""
    load = load or (lambda mesh: _params(config, mesh))
    return LoadableModel(
        name="tiny",
        config=config,
        load=load,
        open_params=lambda: in_memory(load(None)),
        tokenizer=tokenizer or load_tokenizer(write_tokenizer(folder)),
        embedding=EmbeddingConfig(**{"matryoshka_dims": (16, 32, 64), "max_length": 96, **embedding}),
    )


@contextlib.contextmanager
def in_memory(params):
    """Opens parameters that were never on disk."""
    yield MemoryParameters(flatten(params))


class MemoryParameters:
    """Parameters that were never on disk, in the form that releases read."""

    def __init__(self, arrays):
        self._arrays = arrays

    def unit(self, entry):
        return 1

    def read(self, entry, start, stop):
        return np.asarray(self._arrays["/".join(entry.path)])[start:stop]
