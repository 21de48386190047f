"""The model card: what the model is and how to use it."""

from etils import epath

from f2llm_jax import text
from f2llm_jax.model.decoder import count_parameters
from f2llm_jax.model.origin import ModelSource

_CARD = """---
library_name: sentence-transformers
pipeline_tag: feature-extraction
tags:
- sentence-transformers
- feature-extraction
- sentence-similarity
- transformers
- text-embeddings-inference
---

# Text-embedding model

A Qwen3 decoder of {parameters:,} parameters whose embedding is the hidden state of the last token, `{eos}`, which the
tokenizer appends by itself. Embeddings have {width} dimensions{matryoshka}. Texts are cut at {text_limit} tokens.
Queries carry an instruction, documents do not.

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
inputs = tokenizer(["Photosynthesis turns light into sugar."], padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    hidden = model(**inputs).last_hidden_state
last = inputs.attention_mask.shape[1] - 1 - inputs.attention_mask.flip(1).argmax(1)  # right for padding on either side
embeddings = torch.nn.functional.normalize(hidden[torch.arange(len(last)), last], dim=-1)
```
"""


def write_card(folder: epath.Path, source: ModelSource) -> None:
    """Writes `README.md`."""
    tokenizer, dims = source.matching_tokenizer(), source.matryoshka_dims
    matryoshka = f" and may be cut to {', '.join(map(str, dims[:-1]))} (normalise after cutting)" if len(dims) > 1 else ""
    card = _CARD.format(
        parameters=count_parameters(source.config),
        eos=tokenizer.decode([tokenizer.eos_id]),
        width=source.config.hidden_size,
        matryoshka=matryoshka,
        text_limit=source.text_limit,
        prompt=text.query_prompt("Your instruction."),
    )
    (folder / "README.md").write_text(card)
