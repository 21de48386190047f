"""Models behind an OpenAI-compatible endpoint (`POST URL/embeddings`) as teachers: OpenAI, vLLM, text-embeddings-inference, infinity."""

import functools
import hashlib
import json
from concurrent import futures
from typing import Any

import numpy as np
import urllib3
from jaxtyping import Float

from f2llm_jax.errors import UserError
from f2llm_jax.teachers.texts import StoredText

RETRIED = (408, 409, 429, 500, 502, 503, 504)  # and connections that fail or break
SECONDS = urllib3.Timeout(connect=10, read=600)
RESUMES = "what is complete stays, and the same command resumes there"


class EndpointModel:
    """A model by its name at the endpoint. Its weights cannot be seen: `fill_cache` compares a vector when a run is resumed."""

    compute = ""

    def __init__(self, url: str, model: str, *, key: str = "", batch: int = 64, at_once: int = 8, retries: int = 8, backoff: float = 1.0):
        """Asks nothing yet.

        Args:
          url: with or without `/embeddings` at its end, such as `http://localhost:8000/v1`.
          model: its name there.
          key: sent as `Authorization: Bearer KEY`; empty for none.
          batch: texts a request.
          at_once: requests under way.
          retries: of a request that is answered by one of `RETRIED` or not at all, after waits that double; `Retry-After` is obeyed.
          backoff: seconds of the first wait.
        """
        self.name, self.digest = model, hashlib.sha256(model.encode()).hexdigest()
        self._url = url.rstrip("/").removesuffix("/embeddings") + "/embeddings"
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._batch, self._at_once = batch, at_once
        retry = urllib3.Retry(
            retries,
            redirect=False,
            status_forcelist=RETRIED,
            allowed_methods={"POST"},
            backoff_factor=backoff,
            backoff_max=60,
            backoff_jitter=backoff,
            raise_on_status=False,
        )
        self._http = urllib3.PoolManager(maxsize=at_once, retries=retry, timeout=SECONDS)

    @functools.cached_property
    def width(self) -> int:
        return self._ask(["width"]).shape[1]

    def encode(self, texts: list[StoredText]) -> Float[np.ndarray, "S W"]:
        read = [text.read for text in texts]
        with futures.ThreadPoolExecutor(self._at_once) as threads:
            asked = [threads.submit(self._ask, read[start : start + self._batch]) for start in range(0, len(read), self._batch)]
            try:
                answers = [one.result() for one in asked]
            finally:
                threads.shutdown(cancel_futures=True)
        if wrong := {answer.shape[1] for answer in answers} - {self.width}:
            raise UserError(f"{self._url} gives vectors of {self.width} numbers, and some of {min(wrong)}; ask one model of one width")
        return np.concatenate(answers)

    def _ask(self, texts: list[str]) -> Float[np.ndarray, "S W"]:
        """The vectors of one request.

        Raises:
          UserError: no answer, a refusal, or an answer that is not of the protocol.
        """
        body = json.dumps({"model": self.name, "input": texts, "encoding_format": "float"})
        try:
            answer = self._http.request("POST", self._url, body=body, headers=self._headers)
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", None) or error
            raise UserError(f"{self._url} does not answer ({reason}); check the URL and the server: {RESUMES}") from error
        if answer.status != 200:
            told = " ".join(answer.data[:300].decode(errors="replace").split())
            remedy = "name the variable that holds a valid key with --api-key-variable" if answer.status in (401, 403) else "mend that"
            raise UserError(f"{self._url} refuses {len(texts)} texts with HTTP {answer.status} ({told}); {remedy}: {RESUMES}")
        try:
            return _vectors(json.loads(answer.data), len(texts))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self._url} gives no answer of OpenAI's protocol ({error}); name another --endpoint: {RESUMES}") from error


def _vectors(answer: Any, count: int) -> Float[np.ndarray, "S W"]:
    """The vectors of an answer in the order of the request."""
    places = [item["index"] for item in answer["data"]]
    if sorted(places) != list(range(count)):
        raise ValueError(f"{len(places)} vectors for {count} texts")
    vectors = np.array([item["embedding"] for item in answer["data"]], np.float32)
    if vectors.ndim != 2:
        raise ValueError("vectors that are no lists of numbers")
    return vectors[np.argsort(places)]
