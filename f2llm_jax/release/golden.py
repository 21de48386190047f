"""Golden vectors: a release carries what a few texts must become, so that whoever serves it can check the server.

`golden.json` holds texts of many scripts and lengths with and without the prompt of queries, the number of ids of each (an end
token too few or too many shows there), and vectors at length 1, of the weights as the release stores them, in float32.
"""

import dataclasses
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from f2llm_jax.inference.by_layer import encode_by_layer
from f2llm_jax.inference.encode import truncate_and_normalize
from f2llm_jax.model.sizes import DecoderConfig
from f2llm_jax.storage.files import read_json
from f2llm_jax.text import Tokenizer
from f2llm_jax.weights.hf_mapping import Entry
from f2llm_jax.weights.parameters import Parameters

GOLDEN_FILE = "golden.json"
DECIMALS = 6  # cosines keep nine nines
# Texts of which no reader takes a blank away.
TEXTS = (
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "how do plants make food",
    "a",
    "Die Katze saß auf der Matte und wartete, bis es dunkel wurde.",
    "",
    "Кошка сидела на коврике и ждала, пока стемнеет.",
    "光合作用是植物利用光能把二氧化碳和水转化为有机物的过程。",
    "猫は暗くなるまでマットの上に座って待っていた。",
    "고양이는 어두워질 때까지 매트 위에 앉아 기다렸다.",
    "जलवायु परिवर्तन का प्रभाव",
    "التمثيل الضوئي عملية حيوية",
    "ይህ አጭር ጽሑፍ ነው።",
    "🌱 → 🌳",
    "def add(a, b):\n    return a + b",
    "The quick brown fox jumps over the lazy dog. " * 11 + "The end.",
)
WITH_PROMPT = 4  # of TEXTS, which are there twice
# sentence-transformers up to 5.1 at least strips texts, 5.7 and later do not: of these it gives other vectors.
BLANK_TEXTS = (" a blank before", "a blank after ", "a line after\n", "\ta tab before", "  ")


@dataclasses.dataclass(frozen=True)
class GoldenVectors:
    """Texts, the prompt before each, and what they must become: float32 `[S, D]` at length 1."""

    texts: list[str]
    prompts: list[str]
    vectors: Float[np.ndarray, "S D"]


class _Rounded:
    """Parameters as a release of another dtype will hold them."""

    def __init__(self, parameters: Parameters, dtype: np.dtype):
        self._parameters, self._dtype = parameters, dtype

    def unit(self, entry: Entry) -> int:
        return self._parameters.unit(entry)

    def read(self, entry: Entry, start: int, stop: int) -> np.ndarray:
        return self._parameters.read(entry, start, stop).astype(self._dtype).astype(np.float32)


def golden_vectors(
    config: DecoderConfig, parameters: Parameters, dtype: np.dtype, tokenizer: Tokenizer, limit: int, query_prompt: str
) -> dict[str, Any]:
    """The contents of `golden.json`, with one layer of the model in memory at a time.

    Args:
      config: the decoder's shape.
      parameters: of that shape.
      dtype: in which the release stores them.
      tokenizer: of the model.
      limit: tokens, the end token included, at which texts are truncated.
      query_prompt: of the release.
    """
    cases = [(one, "") for one in (*TEXTS, *BLANK_TEXTS)] + [(one, query_prompt) for one in TEXTS[:WITH_PROMPT] if query_prompt]
    ids = tokenizer.encode([prompt + one for one, prompt in cases], limit)
    raw = encode_by_layer(config, _Rounded(parameters, dtype), ids)
    vectors = np.round(truncate_and_normalize(raw, config.hidden_size).astype(np.float64), DECIMALS)
    entries = [
        {"text": one, "prompt": prompt, "tokens": len(i), "vector": vector.tolist()}
        for (one, prompt), i, vector in zip(cases, ids, vectors, strict=True)
    ]
    return {
        "about": "Each vector is the embedding of prompt + text at length 1; `tokens` counts the ids, the end token included. The texts "
        "under `blanks` begin or end with a blank, which counts: a reader that strips texts gives others.",
        "entries": [entry for entry in entries if entry["text"] not in BLANK_TEXTS],
        "blanks": [entry for entry in entries if entry["text"] in BLANK_TEXTS],
    }


def read_golden(folder: epath.PathLike, group: str = "entries") -> GoldenVectors | None:
    """What a release's `golden.json` holds in one of its groups, "entries" or "blanks"; None if it has none."""
    path = epath.Path(folder) / GOLDEN_FILE
    entries = read_json(path).get(group) if path.exists() else None
    if not entries:
        return None
    return GoldenVectors([e["text"] for e in entries], [e["prompt"] for e in entries], np.array([e["vector"] for e in entries], np.float32))
