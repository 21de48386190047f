"""The model card: what the model is, how to use it, and what the run that made it recorded."""

import dataclasses
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import huggingface_hub
from etils import epath

from f2llm_jax import __version__, text
from f2llm_jax.model.decoder import count_parameters
from f2llm_jax.reporting.run_record import RunRecord, read_record
from f2llm_jax.storage.files import write_text
from f2llm_jax.weights.embedding_config import EmbeddingConfig
from f2llm_jax.weights.models import ModelSource

CURVE_FILE = "training_curve.png"
WIDTHS_FILE = "matryoshka_curve.png"
TAGS = ["sentence-transformers", "feature-extraction", "sentence-similarity", "transformers", "text-embeddings-inference", "mteb"]

_USAGE = """# {title}

A Qwen3 decoder of {parameters:,} parameters whose embedding is the hidden state of the last token, `{eos}`, which the
tokenizer appends by itself. Embeddings have {width} dimensions{matryoshka}. Texts are cut at {text_limit} tokens.
Queries carry an instruction, documents do not. Weights are stored in {dtype}.

## Use

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
queries = model.encode(["how do plants make food"], prompt_name="query")
documents = model.encode(["Photosynthesis turns light into sugar."])
print(model.similarity(queries, documents))
```

Another task is another instruction, with the space after the colon: `model.encode(queries, prompt={prompt!r})`.

With transformers alone:

```python
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModel.from_pretrained("path/to/this/folder")
texts = [{query_prompt!r} + "how do plants make food", "Photosynthesis turns light into sugar."]
inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    hidden = model(**inputs).last_hidden_state
last = inputs.attention_mask.shape[1] - 1 - inputs.attention_mask.flip(1).argmax(1)  # right for padding on either side
embeddings = torch.nn.functional.normalize(hidden[torch.arange(len(last)), last], dim=-1)
```

## In other libraries

Documents get no prompt; queries get `PROMPT = {query_prompt!r}`. LangChain and LlamaIndex add it only if they are told; txtai
adds it by itself, and a second time if it is given as `instructions`.

```python
HuggingFaceEmbeddings(model_name="path/to/this/folder", query_encode_kwargs={{"prompt_name": "query"}})        # LangChain
HuggingFaceEmbedding(model_name="path/to/this/folder", query_instruction=PROMPT)                             # LlamaIndex
SentenceTransformersTextEmbedder(model="path/to/this/folder", prefix=PROMPT)                                 # Haystack, queries
SentenceTransformersDocumentEmbedder(model="path/to/this/folder")                                            # Haystack, documents
Embeddings(path="path/to/this/folder", method="sentence-transformers")                                       # txtai
```

A server of infinity (`infinity_emb v2 --model-id path/to/this/folder --dtype float32`), text-embeddings-inference, vLLM or llama.cpp
gets `PROMPT` in front of each query by the caller. LangChain replaces line breaks by blanks before it encodes.

With the project that trained it, on TPUs:

```
python -m f2llm_jax.embed --model path/to/this/folder --input texts.txt --output vectors.npy
```

`golden.json`, where it is here, holds texts and what they must become: compare a server's answers with it before trusting
them, or run `python -m f2llm_jax.convert verify path/to/this/folder`.
"""

_ACCURACY = """Losses are in nats a sample. Accuracy is the share of rows whose positive is nearer to the query than all its hard negatives
and, in retrieval, than all other documents of its batch.
"""


@dataclasses.dataclass(frozen=True)
class Labels:
    """What only a person can say of a model.

    Attributes:
      license: as the Hub names it; it depends on the base model and on the data.
      base_model: Hub id; empty for none. A run knows its starting weights by a path, which may be a folder of any name.
    """

    license: str = "apache-2.0"
    base_model: str = ""


def write_card(folder: epath.Path, source: ModelSource, embedding: EmbeddingConfig, dtype: str, labels: Labels) -> None:
    """Writes `README.md`, and the curves of training and of quality by width where the run left what they need."""
    record = read_record(source.run_folder, source.step) if source.run_folder else RunRecord()
    pictures = _pictures(record)
    for name, picture in pictures.items():
        (folder / name).write_bytes(picture)
    sections = [
        _usage(source, embedding, dtype),
        _training(source, record, CURVE_FILE in pictures),
        _data(record),
        _held_out(record, WIDTHS_FILE in pictures),
        _made_with(record),
    ]
    header = huggingface_hub.ModelCardData(
        language=record.languages or None,
        license=labels.license,
        library_name="sentence-transformers",
        pipeline_tag="feature-extraction",
        base_model=labels.base_model or None,
        tags=TAGS,
    ).to_yaml()
    write_text(folder / "README.md", f"---\n{header}\n---\n\n" + "\n".join(filter(None, sections)))


def _pictures(record: RunRecord) -> dict[str, bytes]:
    """PNGs by file name, as far as there is something to draw; none without the extra `report`, the tables hold the same numbers."""
    if not record.metrics or not importlib.util.find_spec("matplotlib"):
        return {}
    from f2llm_jax.reporting import charts

    drawn = {CURVE_FILE: charts.loss([record]), WIDTHS_FILE: charts.by_width([record])}
    return {name: charts.png(figure) for name, figure in drawn.items() if figure}


def _usage(source: ModelSource, embedding: EmbeddingConfig, dtype: str) -> str:
    tokenizer, width = source.matching_tokenizer(), embedding.truncate_dim or source.config.hidden_size
    shorter = [dim for dim in embedding.served_dims if dim < width]
    return _USAGE.format(
        title="Text-embedding model",
        parameters=count_parameters(source.config),
        eos=tokenizer.decode([tokenizer.end_id]),
        width=width,
        matryoshka=f" and may be truncated to {', '.join(map(str, shorter))} (normalise afterwards)" if shorter else "",
        text_limit=source.text_limit,
        dtype=dtype,
        prompt=text.query_prompt("Your instruction."),
        query_prompt=embedding.query_prompt,
    )


def _training(source: ModelSource, record: RunRecord, curve: bool) -> str:
    """Where the weights come from, every hyper-parameter, the curve."""
    lines = [] if not source.step else [f"Weights after {source.step:,} updates.\n"]
    if " merge of " in source.name or " model pruned from " in source.name:
        lines = [f"A {source.name}.\n"]
    if curve:
        lines.append(f"![Loss by update]({CURVE_FILE})\n")
    if record.config:
        lines.append(_table(("setting", "value"), [(f"`{name}`", f"`{value}`") for name, value in _flat(record.config)]))
    return "## Training\n\n" + "\n".join(lines) if lines else ""


def _data(record: RunRecord) -> str:
    if not record.sources:
        return ""
    rows = [
        (s["name"], s["kind"], f"{s['rows']['train']:,}", f"{s['documents']:,}", s["negatives"], _shortened(sorted(s["languages"])))
        for s in record.sources
    ]
    return "## Data\n\n" + _table(("source", "kind", "rows", "documents", "negatives a row", "languages"), rows)


def _held_out(record: RunRecord, curve: bool) -> str:
    """Losses and accuracies on held-out rows, before and after, by source, task kind and width; there are too many languages."""
    if not record.validations:
        return ""
    first, last = record.validations[0], record.validations[-1]
    left_out = ("validation/in_batch", "validation/hard")  # parts of the loss
    names = [name for name in last if name.startswith("validation/") and not name.startswith(left_out) and name in first]
    names = [name for name in names if "/language/" not in name and "/dim/" not in name]
    rows = [(name.removeprefix("validation/"), f"{first[name]:.4f}", f"{last[name]:.4f}") for name in names]
    parts = [_table(("on held-out rows", f"update {first['step']}", f"update {last['step']}"), rows), _ACCURACY]
    if curve:
        widths = [(width, f"{accuracy:.4f}") for width, accuracy in record.accuracy_by("dim", last).items()]
        parts += [f"![Accuracy by width]({WIDTHS_FILE})\n", _table(("dimensions", "accuracy"), widths)]
    return "## Evaluation\n\n" + "\n".join(parts)


def _made_with(record: RunRecord) -> str:
    versions = {**record.environment, "f2llm_jax": __version__}
    return "## Made with\n\n" + _table(("what", "version"), [(name, value) for name, value in versions.items() if value is not None])


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Settings by dotted name, without those that are places on the machine of the run."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif not (isinstance(value, str) and ("/" in value or not value)):
            yield prefix + name, value


def _shortened(languages: Sequence[str], most: int = 8) -> str:
    more = f" and {len(languages) - most} more" if len(languages) > most else ""
    return ", ".join(languages[:most]) + more
