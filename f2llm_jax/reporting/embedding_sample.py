"""A few held-out rows through a model: what a report shows of its space."""

import dataclasses

import numpy as np
from jaxtyping import Float

from f2llm_jax.data.records import CORPUS, Dataset
from f2llm_jax.evaluation.held_out import SPLIT, encode_stored
from f2llm_jax.inference.encode import TextEncoder

ROWS = 600  # of all sources together


@dataclasses.dataclass(frozen=True)
class EmbeddingSample:
    """Normalised embeddings of held-out rows, float32.

    Attributes:
      query: `[B, D]`.
      passage: `[B, D]`.
      negative_cosine: `[Q]`, of each query with the hard negatives that its row has.
      source: of each row.
    """

    query: Float[np.ndarray, "B D"]
    passage: Float[np.ndarray, "B D"]
    negative_cosine: Float[np.ndarray, " Q"]
    source: list[str]

    @property
    def positive_cosine(self) -> Float[np.ndarray, "B"]:
        """Of each query with its positive."""
        return np.einsum("bd,bd->b", self.query, self.passage)

    @property
    def separation(self) -> float:
        """The probability that a random positive is nearer to its query than a random hard negative to its (area under the ROC curve)."""
        negatives = np.sort(self.negative_cosine)
        return float(np.searchsorted(negatives, self.positive_cosine).mean() / max(len(negatives), 1))


def sample_embeddings(encoder: TextEncoder, dataset: Dataset) -> EmbeddingSample:
    """The first held-out rows of each source, as many of each as of another; with up to three of a row's negatives."""
    names = [name for name, source in dataset.sources.items() if source.rows[SPLIT]]
    parts = [_of_source(encoder, dataset, name, -(-ROWS // len(names))) for name in names]
    return EmbeddingSample(
        query=np.concatenate([query for query, _, _ in parts]),
        passage=np.concatenate([passage for _, passage, _ in parts]),
        negative_cosine=np.concatenate([cosine for _, _, cosine in parts]),
        source=[name for name, (query, _, _) in zip(names, parts, strict=True) for _ in query],
    )


def _of_source(encoder: TextEncoder, dataset: Dataset, name: str, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    documents = dataset.tables(name, SPLIT).documents[:most, :4]
    query = encode_stored(encoder, dataset, dataset.reader(name, SPLIT).read(range(len(documents))))
    distinct, place = np.unique(documents[documents >= 0], return_inverse=True)
    vectors = encode_stored(encoder, dataset, dataset.reader(name, CORPUS).read(distinct))
    where = np.full(documents.shape, -1)
    where[documents >= 0] = place
    rows, columns = np.nonzero(documents[:, 1:] >= 0)
    cosine = np.einsum("qd,qd->q", query[rows], vectors[where[rows, columns + 1]])
    return query, vectors[where[:, 0]], cosine


def principal_plane(vectors: Float[np.ndarray, "S D"]) -> Float[np.ndarray, "S 2"]:
    """The vectors in the plane of their largest variance (principal components), the same way up each time."""
    centred = vectors - vectors.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    plane = axes[:2] * np.sign(axes[:2, np.abs(axes[:2]).argmax(axis=1)].diagonal())[:, None]
    return centred @ plane.T
