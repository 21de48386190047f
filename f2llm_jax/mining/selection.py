"""Which of a query's nearest documents become its negatives.

The rules are those of F2LLM (v1: sentence-transformers' mining over the 100 nearest, skip 5, below 0.8 and below 95% of the
positive's score, 24 from the top, queries with fewer dropped; v2 states no thresholds), in the order in which
`sentence_transformers.util.mine_hard_negatives` applies them: thresholds first, then the ranks to skip are counted among what is left.
Where a query has several positives, the lowest of their scores counts.
"""

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from f2llm_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class NegativeRules:
    """How negatives are selected; the defaults are the published ones.

    Attributes:
      nearest: k, documents considered a query, positives not counted.
      skip: the first ranks of what the thresholds leave, which may be positives that nobody has marked.
      max_score: cosine above which a document is no negative.
      max_relative: the same as a share of the positive's score p: above p - (1 - share) |p| is too near.
      absolute_margin: the same as a distance: above p - margin is too near.
      min_score: cosine below which a document is too easy.
      near_duplicate: similarity to a positive (see `near_duplicates`) from which on a document is no negative; above 1 for never.
      negatives: n, wanted a query.
      take: the n nearest of what is left ("top") or n at random ("sample").
      too_few: rows with fewer are skipped ("drop") or get random documents that are not among the nearest ("fill").
      max_positive_rank: rows whose positive is not among that many nearest are skipped; None for never.
      seed: of what is random.
    """

    nearest: int = 100
    skip: int = 5
    max_score: float | None = 0.8
    max_relative: float | None = 0.95
    absolute_margin: float | None = None
    min_score: float | None = None
    near_duplicate: float = 0.9
    negatives: int = 24
    take: Literal["top", "sample"] = "top"
    too_few: Literal["drop", "fill"] = "drop"
    max_positive_rank: int | None = None
    seed: int = 0

    def check(self) -> None:
        """Raises a UserError if the numbers contradict one another."""
        if self.negatives < 1 or self.skip < 0:
            raise UserError(f"--negatives {self.negatives} must be at least 1 and --skip {self.skip} at least 0")
        if self.nearest < self.skip + self.negatives:
            raise UserError(
                f"--nearest {self.nearest} is fewer than --skip {self.skip} and --negatives {self.negatives} together; raise or lower one"
            )
        if (self.max_positive_rank or 0) > self.nearest:
            raise UserError(f"--max-positive-rank {self.max_positive_rank} must not exceed --nearest {self.nearest}; raise that")


def allowed(
    rules: NegativeRules, scores: Float[np.ndarray, "B K"], positive: Float[np.ndarray, "B"], counters: Counter
) -> Bool[np.ndarray, "B K"]:
    """Which neighbours the thresholds leave, bool `[B, k]`; what they take is counted, each neighbour once.

    Args:
      rules: to follow.
      scores: float32 `[B, k]`, -inf for none.
      positive: float32 `[B]`, the lowest score of a positive.
      counters: of neighbours, by rule.
    """
    left, p = np.isfinite(scores), positive[:, None]
    thresholds = {
        "too near its positive (--absolute-margin)": rules.absolute_margin is not None and scores + np.float32(rules.absolute_margin) > p,
        "too near its positive (--max-relative)": rules.max_relative is not None
        and scores > p - np.abs(p) * np.float32(1 - rules.max_relative),
        "above --max-score": rules.max_score is not None and scores > np.float32(rules.max_score),
        "below --min-score": rules.min_score is not None and scores < np.float32(rules.min_score),
    }
    for name, beyond in thresholds.items():
        counters[name] += int((left & beyond).sum())
        left &= ~np.asarray(beyond)
    return left


def positive_rank(scores: Float[np.ndarray, "B K"], positive: Float[np.ndarray, "R"], query: Int[np.ndarray, "R"]) -> Int[np.ndarray, "R"]:
    """Rank from 1 of each row's positive among it and the documents that are no positives of its query; at most k + 1."""
    return 1 + (scores[query] > positive[:, None]).sum(axis=1)


def choose_negatives(rules: NegativeRules, left: Bool[np.ndarray, "B K"], names: list[str]) -> Int[np.ndarray, "B n"]:
    """Columns of the negatives, int64 `[B, n]`, nearest first; -1 where there are too few.

    Args:
      rules: to follow.
      left: bool `[B, k]`, neighbours that may be taken.
      names: `[B]`, what a random choice depends on besides the seed.
    """
    left = left & (np.cumsum(left, axis=1) > rules.skip)
    if rules.take == "sample":
        for row in np.flatnonzero(left.sum(axis=1) > rules.negatives):
            options = np.flatnonzero(left[row])
            left[row] = False
            left[row, generator(rules.seed, names[row]).choice(options, rules.negatives, replace=False)] = True
    order = np.argsort(~left, axis=1, kind="stable")[:, : rules.negatives]
    return np.where(np.take_along_axis(left, order, axis=1), order, -1)


def generator(seed: int, name: str) -> np.random.Generator:
    """Randomness that depends on a text and not on its position."""
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()))


def near_duplicates(
    left: Bool[np.ndarray, "B K"],
    index: Int[np.ndarray, "B K"],
    positives: list[np.ndarray],
    grams: Callable[[int], frozenset[str]],
    share: float,
) -> Bool[np.ndarray, "B K"]:
    """Which neighbours repeat a positive of their query, bool `[B, k]`: sets of 5-grams whose Jaccard similarity is `share` or more.

    Args:
      left: bool `[B, k]`, the neighbours to look at.
      index: int `[B, k]`, their documents.
      positives: `[B]`, documents.
      grams: from a document to its set, see `character_grams`.
      share: between 0 and 1, or above 1 for none.
    """
    repeats = np.zeros(left.shape, bool)
    if share > 1:
        return repeats
    for row in np.flatnonzero(left.any(axis=1)):
        for known in (grams(int(document)) for document in positives[row]):
            for column in np.flatnonzero(left[row] & ~repeats[row]):
                repeats[row, column] = _jaccard_reaches(share, known, grams(int(index[row, column])))
    return repeats


def character_grams(text: str) -> frozenset[str]:
    """The character 5-grams of a text's letters and digits, case and everything between them left out; a short text whole."""
    plain = "".join(letter for letter in text.casefold() if letter.isalnum())
    return frozenset(plain[i : i + 5] for i in range(max(1, len(plain) - 4)))


def _jaccard_reaches(share: float, a: frozenset, b: frozenset) -> bool:
    smaller, larger = sorted((len(a), len(b)))
    if smaller < math.floor(share * larger):  # the similarity is at most the ratio of the sizes
        return False
    common = len(a & b)
    return common >= share * (len(a) + len(b) - common)
