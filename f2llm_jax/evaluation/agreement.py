"""Do the readers of a release see the vectors that this project sees?

torch, transformers and sentence-transformers are needed here and nowhere else in the package, so they are imported late.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from f2llm_jax import text
from f2llm_jax.evaluation.encode import TextEncoder, truncate_and_normalize
from f2llm_jax.model.origin import find_model

REQUIRED_FLOAT32 = 0.99999  # worst cosine of all texts
REQUIRED_HALF = 0.999  # weights and, in the peers, arithmetic of bfloat16 or float16
CUT = 16  # tokens: short enough that most texts are cut
BATCH = 8  # texts, padded to the longest
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

Encode = Callable[[Sequence[str], str, int], np.ndarray]  # (texts, prompt, limit in tokens) -> [S, D]


class AgreementError(ValueError):
    """The comparison cannot be made; the message names the remedy."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The worst cosine between this project's vectors and a peer's, over all texts."""

    peer: str
    case: str
    cosine: float
    required: float

    @property
    def holds(self) -> bool:
        """Whether the vectors are the same for practical purposes."""
        return self.cosine >= self.required


def compare(folder: str, extra_texts: Sequence[str] = ()) -> list[Agreement]:
    """Encodes texts of many scripts and lengths here, in sentence-transformers and in transformers.

    Args:
      folder: a local release.
      extra_texts: to encode besides `TEXTS`.

    Raises:
      AgreementError: a peer is not installed, or `folder` is not a folder.
      ModelFolderError, TokenizerError: `folder` is not a model that this project can read.
    """
    if not pathlib.Path(folder).is_dir():
        raise AgreementError(f"{folder} is not a folder; verify takes what `convert to-hf` wrote")
    origin = find_model(folder)
    peers = _peers(folder)
    stored = json.loads((pathlib.Path(folder) / "config.json").read_text()).get("dtype", "float32")
    required = REQUIRED_FLOAT32 if stored == "float32" else REQUIRED_HALF
    texts = [*TEXTS, *extra_texts]
    prompt = text.query_prompt(text.DEFAULT_QUERY_INSTRUCTION)
    tokenizer, params, limit = origin.matching_tokenizer(), origin.load(None), origin.text_limit
    cases = {"as documents": ("", limit), "as queries": (prompt, limit), f"cut at {min(CUT, limit)} tokens": ("", min(CUT, limit))}
    results = []
    for case, (prefix, max_length) in cases.items():
        ours = TextEncoder(origin.config, params, tokenizer, max_length).encode(texts, prefix)
        for name, encode in peers.items():
            results.append(Agreement(name, case, _worst_cosine(ours, encode(texts, prefix, max_length)), required))
    return results


def _worst_cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    width = ours.shape[1]
    return float((truncate_and_normalize(ours, width) * truncate_and_normalize(theirs, width)).sum(axis=1).min())


def _peers(folder: str) -> dict[str, Encode]:
    try:
        import sentence_transformers
        import torch
        import transformers
    except ImportError as error:
        raise AgreementError(f"{error.name} is not installed; pip install 'f2llm-jax[eval]'") from error
    transformers.utils.logging.disable_progress_bar()
    sentences = sentence_transformers.SentenceTransformer(folder, device="cpu")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()

    def with_sentence_transformers(texts: Sequence[str], prompt: str, limit: int) -> np.ndarray:
        sentences.max_seq_length = limit
        own = sentences.prompts.get("query" if prompt else "document")  # the folder's prompt: that it is right is part of the check
        return sentences.encode(list(texts), prompt=own, batch_size=BATCH, show_progress_bar=False)

    @torch.no_grad()
    def with_transformers(texts: Sequence[str], prompt: str, limit: int) -> np.ndarray:
        vectors = []
        for start in range(0, len(texts), BATCH):
            batch = [prompt + t for t in texts[start : start + BATCH]]
            inputs = tokenizer(batch, padding=True, truncation=True, max_length=limit, return_tensors="pt")
            hidden = model(**inputs).last_hidden_state
            last = inputs["attention_mask"].shape[1] - 1 - inputs["attention_mask"].flip(1).argmax(1)
            vectors.append(hidden[torch.arange(len(batch)), last].float().numpy())
        return np.concatenate(vectors)

    return {"sentence-transformers": with_sentence_transformers, "transformers": with_transformers}
