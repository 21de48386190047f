"""Golden vectors: a release carries what a few texts must become, so that whoever serves it can check the server.

`golden.json` holds texts of many scripts and lengths with and without the prompt of queries, the ids' count of each (an EOS
too few or too many shows there), and vectors at length 1, of the weights as the release stores them, in float32.
"""

import dataclasses
import json
from typing import Any

import numpy as np
from etils import epath

from f2llm_jax import text
from f2llm_jax.inference.by_layer import encode_by_layer
from f2llm_jax.inference.encode import truncate_and_normalize
from f2llm_jax.model.sizes import DecoderConfig
from f2llm_jax.text import Tokenizer
from f2llm_jax.weights.hf_mapping import Entry
from f2llm_jax.weights.parameters import Parameters

GOLDEN_FILE = "golden.json"
DECIMALS = 6  # cosines keep nine nines
TEXTS = (
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "how do plants make food",
    "",
    "a",
    "Die Katze saß auf der Matte und wartete, bis es dunkel wurde.",
    "Кошка сидела на коврике и ждала, пока стемнеет.",
    "光合作用是植物利用光能把二氧化碳和水转化为有机物的过程。",
    "猫は暗くなるまでマットの上に座って待っていた。",
    "고양이는 어두워질 때까지 매트 위에 앉아 기다렸다.",
    "जलवायु परिवर्तन का प्रभाव",
    "التمثيل الضوئي عملية حيوية",
    "ይህ አጭር ጽሑፍ ነው።",
    "🌱 → 🌳",
    "def add(a, b):\n    return a + b\n",
    "The quick brown fox jumps over the lazy dog. " * 12,
)
WITH_PROMPT = 4  # of TEXTS, which stand twice


@dataclasses.dataclass(frozen=True)
class GoldenVectors:
    """Texts, the prompt before each, and what they must become: float32 `[S, D]` at length 1."""

    texts: list[str]
    prompts: list[str]
    vectors: np.ndarray


class _Rounded:
    """Parameters as a release of another dtype will hold them."""

    def __init__(self, parameters: Parameters, dtype: np.dtype):
        self._parameters, self._dtype = parameters, dtype

    def unit(self, entry: Entry) -> int:
        return self._parameters.unit(entry)

    def read(self, entry: Entry, start: int, stop: int) -> np.ndarray:
        return self._parameters.read(entry, start, stop).astype(self._dtype).astype(np.float32)


def golden_vectors(config: DecoderConfig, parameters: Parameters, dtype: np.dtype, tokenizer: Tokenizer, limit: int) -> dict[str, Any]:
    """The contents of `golden.json`, with one layer of the model in memory at a time.

    Args:
      config: the decoder's shape.
      parameters: of that shape.
      dtype: in which the release stores them.
      tokenizer: of the model.
      limit: tokens, EOS included, at which texts are cut.
    """
    query = text.query_prompt(text.DEFAULT_QUERY_INSTRUCTION)
    cases = [(one, "") for one in TEXTS] + [(one, query) for one in TEXTS[:WITH_PROMPT]]
    ids = tokenizer.encode([prompt + one for one, prompt in cases], limit)
    raw = encode_by_layer(config, _Rounded(parameters, dtype), ids)
    vectors = np.round(truncate_and_normalize(raw, config.hidden_size).astype(np.float64), DECIMALS)
    return {
        "about": "Each vector is the embedding of prompt + text at length 1; `tokens` counts the ids, EOS included.",
        "entries": [
            {"text": one, "prompt": prompt, "tokens": len(i), "vector": vector.tolist()}
            for (one, prompt), i, vector in zip(cases, ids, vectors, strict=True)
        ],
    }


def read_golden(folder: epath.PathLike) -> GoldenVectors | None:
    """What a release's `golden.json` holds; None if it has none."""
    path = epath.Path(folder) / GOLDEN_FILE
    if not path.exists():
        return None
    entries = json.loads(path.read_text())["entries"]
    return GoldenVectors([e["text"] for e in entries], [e["prompt"] for e in entries], np.array([e["vector"] for e in entries], np.float32))
