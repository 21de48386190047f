"""Do the readers of a release see the vectors that this project sees?

torch, transformers and sentence-transformers are needed here and nowhere else in the package, so they are imported late.
"""

import dataclasses
import functools
import importlib.util
import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from f2llm_jax import text
from f2llm_jax.errors import UserError
from f2llm_jax.inference.encode import TextEncoder, truncate_and_normalize
from f2llm_jax.release.golden import GOLDEN_FILE, TEXTS, read_golden
from f2llm_jax.weights.models import LoadableModel, find_model

REQUIRED_FLOAT32 = 0.99999  # worst cosine of all texts
REQUIRED_HALF = 0.999  # weights and, in the peers, arithmetic of bfloat16 or float16
CUT = 16  # tokens: short enough that most texts are cut
BATCH = 8  # texts, padded to the longest
Encode = Callable[[Sequence[str], str, int, int], np.ndarray]  # (texts, prompt, limit in tokens, texts at once) -> [S, D]


class VerificationError(UserError):
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
    """Encodes texts of many scripts and lengths here and in each of sentence-transformers and transformers that is installed.

    Args:
      folder: a local release. Its golden vectors, if it has any, are compared with this project's and every peer's.
      extra_texts: to encode besides the golden ones.

    Raises:
      VerificationError: there is nothing to compare with, or `folder` is not a folder.
      ModelFolderError, TokenizerError: `folder` is not a model that this project can read.
    """
    if not pathlib.Path(folder).is_dir():
        raise VerificationError(f"{folder} is not a folder; verify takes what `convert to-hf` wrote")
    origin = find_model(folder)
    golden, peers = read_golden(folder), _peers(folder)
    if not golden and not peers:
        raise VerificationError(f"{folder} has no {GOLDEN_FILE} and no peer is installed; pip install 'f2llm-jax[eval]'")
    stored = json.loads((pathlib.Path(folder) / "config.json").read_text()).get("dtype", "float32")
    required = REQUIRED_FLOAT32 if stored == "float32" else REQUIRED_HALF
    here = _here(origin)
    results = []
    if golden:
        # Where the EOS was lost an empty text is no token at all, on which peers crash instead of answering.
        alone = [i for i, one in enumerate(golden.texts) if one]
        for name, encode in {"f2llm_jax": here, **peers}.items():
            theirs = np.concatenate([encode([golden.texts[i]], golden.prompts[i], origin.text_limit, 1) for i in alone])
            results.append(Agreement(name, "golden, one by one", _worst_cosine(golden.vectors[alone], theirs), required))
    texts = [*TEXTS, *extra_texts]
    for case, (prompt, limit, dim) in _cases(origin).items():
        ours = here(texts, prompt, limit, len(texts))
        for name, encode in peers.items():
            results.append(Agreement(name, case, _worst_cosine(ours, encode(texts, prompt, limit, BATCH), dim), required))
    return results


def _cases(origin: LoadableModel) -> dict[str, tuple[str, int, int | None]]:
    """Prompt, limit in tokens and width (None for all) of each comparison."""
    limit = origin.text_limit
    prompt = text.query_prompt(text.DEFAULT_QUERY_INSTRUCTION)
    cases = {"as documents": ("", limit, None), "as queries": (prompt, limit, None)}
    cases[f"cut at {min(CUT, limit)} tokens"] = ("", min(CUT, limit), None)
    if origin.matryoshka_dims:
        cases[f"first {origin.matryoshka_dims[0]} dimensions"] = ("", limit, origin.matryoshka_dims[0])
    return cases


def _here(origin: LoadableModel) -> Encode:
    tokenizer, params = origin.matching_tokenizer(), origin.load(None)
    encoder = functools.cache(lambda limit: TextEncoder(origin.config, params, tokenizer, limit))

    def encode(texts: Sequence[str], prompt: str, limit: int, at_once: int) -> np.ndarray:
        del at_once  # rows are packed, so no text knows how many there are
        return encoder(limit).encode(texts, prompt)

    return encode


def _worst_cosine(ours: np.ndarray, theirs: np.ndarray, dim: int | None = None) -> float:
    """Over what both have: a release that was cut to some width gives so many dimensions in sentence-transformers."""
    width = dim or min(ours.shape[1], theirs.shape[1])
    return float((truncate_and_normalize(ours, width) * truncate_and_normalize(theirs, width)).sum(axis=1).min())


def _peers(folder: str) -> dict[str, Encode]:
    """The peers that are installed."""
    makers = {"sentence-transformers": _sentence_transformers, "transformers": _transformers}
    installed = {name for name in makers if importlib.util.find_spec("torch") and importlib.util.find_spec(name.replace("-", "_"))}
    return {name: make(folder) for name, make in makers.items() if name in installed}


def _sentence_transformers(folder: str) -> Encode:
    import sentence_transformers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = sentence_transformers.SentenceTransformer(folder, device="cpu")

    def encode(texts: Sequence[str], prompt: str, limit: int, at_once: int) -> np.ndarray:
        model.max_seq_length = limit
        own = model.prompts.get("query" if prompt else "document")  # the folder's prompt: that it is right is part of the check
        return model.encode(list(texts), prompt=own, batch_size=at_once, show_progress_bar=False)

    return encode


def _transformers(folder: str) -> Encode:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def encode(texts: Sequence[str], prompt: str, limit: int, at_once: int) -> np.ndarray:
        vectors = []
        for start in range(0, len(texts), at_once):
            batch = [prompt + t for t in texts[start : start + at_once]]
            inputs = tokenizer(batch, padding=True, truncation=True, max_length=limit, return_tensors="pt")
            hidden = model(**inputs).last_hidden_state
            last = inputs["attention_mask"].shape[1] - 1 - inputs["attention_mask"].flip(1).argmax(1)
            vectors.append(hidden[torch.arange(len(batch)), last].float().numpy())
        return np.concatenate(vectors)

    return encode
