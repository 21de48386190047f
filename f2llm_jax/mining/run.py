"""Mining on one page: pools, vectors and neighbours, rows, files."""

import contextlib
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from f2llm_jax import sharding
from f2llm_jax.errors import UserError
from f2llm_jax.inference.devices import all_here, local_mesh
from f2llm_jax.inference.encode import load_encoder
from f2llm_jax.mining import writing
from f2llm_jax.mining.inputs import SourcePairs, check_names
from f2llm_jax.mining.pool import Pool, make_pool
from f2llm_jax.mining.rows import mined
from f2llm_jax.mining.search import Searched, StageCallback, search
from f2llm_jax.mining.selection import NegativeRules
from f2llm_jax.mining.vectors import ShardedVectors, made_by
from f2llm_jax.storage.files import check_apart, read_json
from f2llm_jax.storage.folders import INCOMPLETE, check_new_folder, check_whole, new_folder
from f2llm_jax.storage.locks import lock
from f2llm_jax.weights.models import LoadableModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoding:
    """How texts become vectors.

    Attributes:
      max_length: tokens at which texts are cut; None for the model's own limit.
      compute: dtype the model computes in.
      stored: dtype of the vectors on disk.
    """

    max_length: int | None = None
    compute: str = "float32"
    stored: str = "float32"


def mine(
    origin: LoadableModel,
    sources: Sequence[SourcePairs],
    corpus: Sequence[str] | None,
    out: epath.PathLike,
    rules: NegativeRules,
    *,
    encoding: Encoding = Encoding(),
    cache: epath.PathLike | None = None,
    overwrite: bool = False,
    inputs: Mapping[str, epath.PathLike] | None = None,
    report: StageCallback = lambda what, done, total: None,
) -> dict:
    """Writes the sources with mined negatives to `out` (see `writing`), or finds them there; returns `summary.json`.

    Args:
      origin: the model whose cosine is the score.
      sources: rows without negatives, or with some that are given.
      corpus: documents that all sources search in, besides their own positives; None for the positives of its own source each.
      out: folder to write; exists only when complete.
      rules: of selection.
      encoding: of texts.
      cache: folder of vectors and neighbours, which runs that share a model or texts can share; default `OUT.cache`.
      overwrite: replace an older output at `out`.
      inputs: files and folders that are read, by flag; none may lie in `out`.
      report: called with what is done.

    Raises:
      UserError: inputs, rules or vectors that cannot be mined with, or something else at `out`.
    """
    rules.check()
    check_names(sources)
    out, cache = epath.Path(out), epath.Path(cache or f"{out}.cache")
    pools = [make_pool(sources, corpus)] if corpus is not None else [make_pool([source], ()) for source in sources]
    for pool in pools:
        _check_size(pool, rules.negatives)
    mesh = sharding.make_mesh(devices=jax.local_devices())
    limit = encoding.max_length or origin.text_limit

    def load():
        return load_encoder(origin, max_length=limit, dtype=jnp.dtype(encoding.compute), mesh=local_mesh())

    store = ShardedVectors(cache / "vectors", made_by(origin, limit, encoding.compute), origin.width, encoding.stored, load)
    made_of = _digest(rules, pools, store)
    summary = out / "summary.json"
    check_apart(out, inputs or {})
    if not overwrite and out.is_dir() and any(out.iterdir()) and not (out / INCOMPLETE).exists():
        if not summary.exists() or read_json(summary).get("made_of") != made_of:
            raise UserError(f"{out} exists and was not made from these inputs by these rules; remove it, or pass --overwrite")
        check_whole(out, "remove it and run the same command again")
        return read_json(summary)
    check_new_folder(out, overwrite, inputs)
    with lock(out) if jax.process_index() == 0 else contextlib.nullcontext():
        found = [search(pool, store, cache / "neighbours", rules.nearest, mesh, report) for pool in pools]
        if jax.process_index() == 0:
            settings = {"model": origin.name, "encoding": dataclasses.asdict(encoding), "made_of": made_of}
            tokenizer = origin.matching_tokenizer()
            ids = lambda text: tokenizer.encode([text], limit)[0].tobytes()  # noqa: E731
            with new_folder(out, "summary.json", overwrite, inputs) as folder:
                _write(found, folder, rules, settings, ids, report)
        all_here("written")
    return read_json(summary)


def _write(
    found: Sequence[Searched],
    folder: epath.Path,
    rules: NegativeRules,
    settings: dict[str, Any],
    ids: Callable[[str], bytes],
    report: StageCallback,
) -> None:
    seen = writing.Seen()
    counters: dict[str, Counter[str]] = {}
    kinds: dict[str, str] = {}
    rows = sum(len(source.query) for one in found for source in one.pool.sources)
    for one in found:
        for source in one.pool.sources:
            before = sum(counted["rows"] for counted in counters.values())
            parts = mined(one, source, rules, ids, lambda done, before=before: report("select", before + done, rows))  # type: ignore[misc]
            counters[source.name] = writing.write_source(folder, one.pool, source, parts, rules.negatives, seen)
            kinds[source.name] = source.kind
    total = sum(counters.values(), Counter())
    if not total["kept"]:
        raise UserError(f"no row is left ({_told(total)}); loosen the rules or give more documents with --corpus")
    sizes = {"documents": sum(len(one.pool.documents) for one in found), "queries": sum(len(one.pool.queries) for one in found)}
    by_source = {name: dict(sorted(counted.items())) for name, counted in counters.items()}
    details = {"rules": dataclasses.asdict(rules), **sizes, "total": dict(sorted(total.items())), "sources": by_source}
    writing.write_summary(folder, kinds, seen, {**settings, **details})


def _told(counters: Counter) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in sorted(counters.items()))


def _check_size(pool: Pool, negatives: int) -> None:
    possible = len(pool.documents) - min(map(len, pool.positives))
    if possible < negatives:
        raise UserError(
            f"--negatives {negatives} cannot be had: {', '.join(source.name for source in pool.sources)} can search "
            f"{len(pool.documents):,} distinct documents, {possible:,} besides a query's positives; lower it or give more with --corpus"
        )


def _digest(rules: NegativeRules, pools: Sequence[Pool], store: ShardedVectors) -> str:
    """What makes two outputs equal."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(rules), sort_keys=True).encode())
    for pool in pools:
        for texts in (pool.documents, pool.queries):
            digest.update(json.dumps([shard.key for shard in store.shards(texts)]).encode())
        for source in pool.sources:
            digest.update(json.dumps([source.name, source.kind, source.languages]).encode())
            for numbers in (source.query, source.positive, source.given):
                digest.update(numbers.tobytes())
    return digest.hexdigest()
