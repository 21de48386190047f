"""Raw files of multilingual rows, the command that prepares them, and a tokenizer with options for it."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

EOS, PAD = "<|end|>", "<|pad|>"
MAX_LENGTH = 100
WORDS = ["Katze", "猫", "кошка", "قطة", "बिल्ली", "γάτα", "gato", "con mèo"]
INSTRUCTION = "Instruct: Retrieve translations of the following text.\nQuery: "


def rows(count, negatives, start=0):
    """Multilingual rows with shared documents, some of them longer than `MAX_LENGTH` tokens, one negative equal to its positive."""
    table = {"query": [f"{INSTRUCTION}{i} {WORDS[i % 8] * (1 + i % 5)}" for i in range(start, start + count)]}
    table["passage"] = [f"cat {i // 2} {WORDS[(i + 1) % 8]}" for i in range(start, start + count)]
    for n in range(1, negatives + 1):
        table[f"negative_{n}"] = [f"dog {(i * n) % 7} {WORDS[n % 8] * (i % 4)}" for i in range(start, start + count)]
    if start == 0 and count > 3:
        table["negative_1"][3] = table["passage"][3]
    table["lang"] = [f"l{i % 8}" for i in range(start, start + count)]
    return table


def labelled(count):
    """Rows that look like classification: two passages that come back, each the other's negative."""
    table, labels = rows(count, 1), ["it is one", "it is the other"]
    return table | {"passage": [labels[i % 2] for i in range(count)], "negative_1": [labels[1 - i % 2] for i in range(count)]}


def write(folder, name, table, tasks=None):
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(table), folder / f"{name}.parquet")
    if tasks:
        (folder / "tasks.json").write_text(json.dumps(tasks))


def command(raw, tokenizer, out, *more):
    return ["--raw", str(raw), "--tokenizer", str(tokenizer), "--out", str(out), "--max-length", str(MAX_LENGTH), "--workers", "1", *more]


def write_tokenizer(folder, pad=PAD, appends_eos=False):
    """A byte-level BPE tokenizer of a few merges in the Hugging Face layout."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[EOS, PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat", "die Katze saß auf der Matte", "猫坐在垫子上"], trainer)
    if appends_eos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, tokenizer.token_to_id(EOS))])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
