"""The prompts of a prepared dataset's queries, read back from its token ids, so that a release offers the one that was trained."""

from collections import Counter
from concurrent import futures

import numpy as np

from f2llm_jax.data.records import Dataset
from f2llm_jax.text import Tokenizer, leading_prompt
from f2llm_jax.weights.embedding_config import DEFAULT_PROMPTS

ROWS = 16  # of a source; they carry one prompt, or none
SOURCES = 64  # the largest ones; more prompts than that are a list that nobody reads
THREADS = 16  # that wait for storage


def trained_prompts(dataset: Dataset) -> dict[str, str]:
    """Prompts by name, for `EmbeddingConfig.prompts`.

    "query" is the published one if the data carries it, else the one of most training rows: of retrieval sources, if there are any
    ("" if queries carry none, as in stage 1). Where sources carry several, each is offered under its source's name as well.
    """
    tokenizer = dataset.tokenizer()
    largest = sorted(dataset.sources.values(), key=lambda source: -source.rows["train"])
    retrieval = [source for source in largest if source.kind == "retrieval"]
    with futures.ThreadPoolExecutor(THREADS) as threads:
        named = (retrieval or largest)[:SOURCES]
        prompts = threads.map(lambda source: _prompt(dataset, tokenizer, source.name), named)
        by_source = {source.name: prompt for source, prompt in zip(named, prompts, strict=True)}
    rows: Counter[str] = Counter()
    for source in named:
        rows[by_source[source.name]] += source.rows["train"]
    query = DEFAULT_PROMPTS["query"] if DEFAULT_PROMPTS["query"] in rows else max(rows, key=rows.__getitem__, default="")
    several = {name: prompt for name, prompt in by_source.items() if prompt} if len(set(rows) - {""}) > 1 else {}
    return {**several, "query": query, "document": ""}


def _prompt(dataset: Dataset, tokenizer: Tokenizer, name: str) -> str:
    """What most of a source's first rows begin with."""
    rows = min(ROWS, dataset.sources[name].rows["train"])
    texts = [tokenizer.decode(ids) for ids in dataset.reader(name, "train").read(np.arange(rows))]
    return Counter(map(leading_prompt, texts)).most_common(1)[0][0] if texts else ""
