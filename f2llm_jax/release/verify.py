"""Do the readers of a release see the vectors that this project sees?

torch, transformers and sentence-transformers are needed here and nowhere else in the package, so they are imported late.
"""

import dataclasses
import functools
import importlib.util
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from f2llm_jax.errors import UserError
from f2llm_jax.inference.encode import TextEncoder, truncate_and_normalize
from f2llm_jax.release.golden import GOLDEN_FILE, TEXTS, GoldenVectors, read_golden
from f2llm_jax.storage.files import is_remote, read_json
from f2llm_jax.weights.hf_fetch import local_folder
from f2llm_jax.weights.models import LoadableModel, find_model

REQUIRED_FLOAT32 = 0.99999  # worst cosine of all texts
REQUIRED_HALF = 0.999  # weights and, in the peers, arithmetic of bfloat16 or float16
CUT = 16  # tokens: short enough that most texts are cut
BATCH = 8  # texts, padded to the longest
Encode = Callable[[Sequence[str], str, int, int], np.ndarray]  # (texts, prompt, limit in tokens, texts at once) -> [S, D]


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
      folder: a release, on this disk or in an object store, from which it is copied first. Its golden
        vectors, if it has any, are compared with this project's and every peer's.
      extra_texts: to encode besides the golden ones.

    Raises:
      UserError: there is nothing to compare with, or `folder` is not a model that this project can read.
    """
    if is_remote(folder):
        folder = str(local_folder(folder))
    if not pathlib.Path(folder).is_dir():
        raise UserError(f"{folder} is not a folder; verify takes what `convert to-hf` wrote")
    origin = find_model(folder)
    golden, blanks, peers = read_golden(folder), read_golden(folder, "blanks"), _peers(folder)
    if not golden and not peers:
        raise UserError(f"{folder} has no {GOLDEN_FILE} and no peer is installed; pip install 'f2llm-jax[eval]'")
    stored = read_json(pathlib.Path(folder) / "config.json").get("dtype", "float32")
    required = REQUIRED_FLOAT32 if stored == "float32" else REQUIRED_HALF
    here = _here(origin)
    results = []
    for name, encode in {"f2llm_jax": here, **peers}.items():
        if golden:
            results.append(Agreement(name, "golden, one by one", _worst_of_golden(golden, encode, origin.text_limit), required))
        if blanks and not _strips(encode, origin.text_limit):
            results.append(Agreement(name, "golden, blanks", _worst_of_golden(blanks, encode, origin.text_limit), required))
    for case, (prompt, limit, dim) in _cases(origin).items():
        # Of texts that begin or end with a blank the golden vectors tell, for peers that keep it.
        texts = [one for one in (*TEXTS, *extra_texts) if (prompt + one).strip() == prompt + one]
        ours = here(texts, prompt, limit, len(texts))
        for name, encode in peers.items():
            results.append(Agreement(name, case, _worst_cosine(ours, encode(texts, prompt, limit, BATCH), dim), required))
    return results


def _worst_of_golden(golden: GoldenVectors, encode: Encode, limit: int) -> float:
    # Where the end token was lost an empty text is no token at all, on which peers crash instead of answering.
    alone = [i for i, one in enumerate(golden.texts) if one]
    theirs = np.concatenate([encode([golden.texts[i]], golden.prompts[i], limit, 1) for i in alone])
    return _worst_cosine(golden.vectors[alone], theirs)


def _strips(encode: Encode, limit: int) -> bool:
    """Whether a peer takes blanks away, as sentence-transformers did for years."""
    return bool(np.array_equal(encode([" a "], "", limit, 1), encode(["a"], "", limit, 1)))


def _cases(origin: LoadableModel) -> dict[str, tuple[str, int, int | None]]:
    """Prompt, limit in tokens and width (None for all) of each comparison."""
    limit, prompt = origin.text_limit, origin.embedding.query_prompt
    cases: dict[str, tuple[str, int, int | None]] = {"as documents": ("", limit, None)}
    if prompt:
        cases["as queries"] = (prompt, limit, None)
    cases[f"cut at {min(CUT, limit)} tokens"] = ("", min(CUT, limit), None)
    for dim in origin.embedding.served_dims[:1]:
        cases[f"first {dim} dimensions"] = ("", limit, dim)
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
