"""From neighbours to rows: each pair's negatives with their scores, and why some pairs have none."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float, Int

from f2llm_jax.mining import selection
from f2llm_jax.mining.pool import PoolRows
from f2llm_jax.mining.search import Searched
from f2llm_jax.mining.selection import NegativeRules

BLOCK_ROWS = 4096  # selected for at once
REMEMBERED_TEXTS = 20_000  # whose 5-grams or token ids are kept
SAME_SCORE = 5e-3  # cosines of one text, from vectors stored in float16, differ by less


@dataclasses.dataclass(frozen=True)
class MinedRows:
    """Consecutive rows of a source that are kept, R of them with N negatives."""

    index: Int[np.ndarray, " R"]  # which rows of the source
    negatives: Int[np.ndarray, "R N"]  # documents
    scores: Float[np.ndarray, "R 1+N"]  # float32, cosines of the positive and of the negatives with the query
    counters: Counter[str]  # of all rows ("rows", "kept", "skipped: ...", "filled"), and of neighbours by the rule that took them


def mined(
    found: Searched, source: PoolRows, rules: NegativeRules, ids: Callable[[str], bytes], report: Callable[[int], None]
) -> Iterator[MinedRows]:
    """The rows of a source, in order, with negatives by the rules, given negatives first.

    Args:
      found: neighbours of its queries.
      source: to mine for.
      rules: to follow.
      ids: the token ids of a text as the model sees it.
      report: told of rows done.
    """
    judge = _Judge(found, rules, ids)
    for start in range(0, len(source.query), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        yield judge.rows(source.query[part], source.positive[part], source.given[part], start)
        report(min(start + BLOCK_ROWS, len(source.query)))


class _Judge:
    """Applies the rules to rows of one pool."""

    def __init__(self, found: Searched, rules: NegativeRules, ids: Callable[[str], bytes]):
        self._found, self._rules = found, rules
        self._ids = functools.lru_cache(maxsize=REMEMBERED_TEXTS)(lambda document: ids(found.pool.documents[document].as_py()))
        self._grams = functools.lru_cache(maxsize=REMEMBERED_TEXTS)(
            lambda document: selection.character_grams(found.pool.documents[document].as_py())
        )
        self._file = functools.lru_cache(maxsize=2)(found.neighbours.read)

    def rows(self, query: np.ndarray, positive: np.ndarray, given: np.ndarray, start: int) -> MinedRows:
        rules, pool, counters = self._rules, self._found.pool, Counter(rows=len(query))
        queries, of = np.unique(query, return_inverse=True)
        scores, index = self._neighbours(queries)
        positives = [pool.positives[number] for number in queries]
        of_positives = self._scores(np.repeat(queries, list(map(len, positives))), np.concatenate(positives))
        starts = np.cumsum([0, *map(len, positives[:-1])])
        left = selection.allowed(rules, scores, np.minimum.reduceat(of_positives, starts), counters)
        same = self._same_ids(left, scores, index, positives, np.split(of_positives, starts[1:]))
        counters["has the token ids of a positive"] += int(same.sum())
        left &= ~same
        repeats = selection.near_duplicates(left, index, positives, self._grams, rules.near_duplicate)
        counters["near-duplicate of a positive (--near-duplicate)"] += int(repeats.sum())
        columns = selection.choose_negatives(rules, left & ~repeats, [pool.queries[int(number)].as_py() for number in queries])
        chosen = np.where(columns >= 0, np.take_along_axis(index, columns, axis=1), -1).astype(np.int64)[of]
        negatives = _closed_up(np.concatenate([given, chosen], axis=1))[:, : rules.negatives]
        own = self._scores(query, positive)
        keep = np.ones(len(query), bool)
        if rules.max_positive_rank is not None:
            keep &= selection.positive_rank(scores, own, of) <= rules.max_positive_rank
            counters["skipped: the positive ranks below --max-positive-rank"] += int((~keep).sum())
        if rules.too_few == "fill":
            counters["filled with random documents"] += self._fill(negatives, query, index[of], keep)
        enough = (negatives >= 0).all(axis=1)
        counters["skipped: too few negatives"] += int((keep & ~enough).sum())
        kept = np.flatnonzero(keep & enough)
        counters["kept"] += len(kept)
        negatives = negatives[kept]
        theirs = self._scores(np.repeat(query[kept], rules.negatives), negatives.ravel()).reshape(negatives.shape)
        return MinedRows(start + kept, negatives, np.column_stack([own[kept], theirs]).astype(np.float32), +counters)

    def _neighbours(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores and documents `[B, k]` of queries in ascending order."""
        step, parts = self._found.neighbours.step, []
        for number in np.unique(queries // step):
            scores, index = self._file(int(number))
            mine = queries[queries // step == number] - number * step
            parts.append((scores[mine], index[mine]))
        scores, index = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return scores, index

    def _same_ids(
        self, left: np.ndarray, scores: np.ndarray, index: np.ndarray, positives: list[np.ndarray], of_positives: list[np.ndarray]
    ) -> np.ndarray:
        """Which neighbours `[B, k]` are to the model the same text as a positive; only those of the positive's score can be."""
        same = np.zeros(left.shape, bool)
        for row, (known, own) in enumerate(zip(positives, of_positives, strict=True)):
            near = left[row] & (np.abs(scores[row] - own[:, None]).min(axis=0) < SAME_SCORE)
            for column in np.flatnonzero(near):
                same[row, column] = self._ids(int(index[row, column])) in {self._ids(int(document)) for document in known}
        return same

    def _scores(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """float32 cosine of each query with its document, summed in float64."""
        scores = np.empty(len(queries), np.float32)
        for start in range(0, len(queries), BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            q = self._found.store.take(self._found.queries, queries[part])
            d = self._found.store.take(self._found.documents, documents[part])
            scores[part] = np.einsum("nd,nd->n", q, d, dtype=np.float64)
        return scores

    def _fill(self, negatives: np.ndarray, query: np.ndarray, nearest: np.ndarray, keep: np.ndarray) -> int:
        """Puts random documents, none of them near, in place of absent negatives; returns how many."""
        pool, filled = self._found.pool, 0
        for row in np.flatnonzero(keep & (negatives < 0).any(axis=1)):
            absent = np.flatnonzero(negatives[row] < 0)
            taken = np.concatenate([pool.excluded[query[row]], nearest[row], negatives[row]])
            draw = selection.generator(self._rules.seed, f"fill\0{pool.queries[int(query[row])].as_py()}")
            options = draw.choice(len(pool.documents), min(len(pool.documents), len(absent) + len(taken)), replace=False)
            found = options[~np.isin(options, taken)][: len(absent)]
            negatives[row, absent[: len(found)]] = found
            filled += len(found)
        return filled


def _closed_up(documents: np.ndarray) -> np.ndarray:
    """Rows with what is -1 last, the rest in order."""
    return np.take_along_axis(documents, np.argsort(documents < 0, axis=1, kind="stable"), axis=1)
