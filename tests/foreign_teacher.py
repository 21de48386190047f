"""A sentence-transformers folder of random weights, with a tokenizer and prompts of its own."""

import string

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import BertConfig, BertModel, BertTokenizerFast

WIDTH = 24
PROMPTS = {"query": "query: ", "document": "passage: "}


def write(folder, seed=0):
    """Saves the model below `folder`; its path."""
    import torch

    torch.manual_seed(seed)
    base = folder / "bert"
    letters = string.ascii_lowercase + string.digits + string.punctuation
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    base.mkdir(parents=True)
    (base / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab=str(base / "vocab.txt"), model_max_length=64).save_pretrained(base)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, initializer_range=0.5, **sizes)).save_pretrained(base)
    modules = [Transformer(str(base)), Pooling(WIDTH), Normalize()]
    SentenceTransformer(modules=modules, device="cpu", prompts=PROMPTS).save(str(folder / "model"))
    return folder / "model"
