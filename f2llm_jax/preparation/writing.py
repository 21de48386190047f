"""From sources to a complete dataset: which sources, several at a time, resumable, all or nothing.

A local dataset is written to `OUT.partial` and renamed when complete. An object store has no rename of folders, so there it is
written in place, and dataset.json, written last, is what makes it complete.
"""

import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import io
import logging
import multiprocessing
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection

from etils import epath

from f2llm_jax.data import records
from f2llm_jax.preparation import encoding, summary
from f2llm_jax.preparation.selection import Recipe, choose_rows
from f2llm_jax.preparation.sources import Source
from f2llm_jax.storage.files import check_apart, check_name, is_remote, plain
from f2llm_jax.storage.folders import check_ours, files_in, mark, replace_folder
from f2llm_jax.storage.locks import lock
from f2llm_jax.text import Tokenizer, load_tokenizer

NEEDED = ("apache_beam", "matplotlib")  # packages of the extra `prepare`
# What may lie in a dataset that is not complete yet.
BEGUN = ("settings.json", "summary.json", "summary.png", "tokenizer", "tables", "work", records.BUILDER)


@dataclasses.dataclass(frozen=True)
class BuildProgress:
    """The state after a source: what was found, and totals over the sources built by this run.

    Attributes:
      source: the one that was just completed.
      reused: it was complete from an interrupted run.
      done: sources completed so far, of `sources`.
      sources: in all.
      rows: built by this run so far, of `rows_total`.
      rows_total: that this run has to build.
      texts: queries, passages and negatives among `rows`.
      seconds: since the first source was begun.
    """

    source: records.SourceInfo
    reused: bool
    done: int
    sources: int
    rows: int
    rows_total: int
    texts: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class _Job:
    """One source to build; plain values, since it travels to another process."""

    folder: str
    source: Source
    recipe: Recipe
    beam_flags: tuple[str, ...]

    @property
    def rows(self) -> int:
        """That it takes before cleaning, about: of a capped unit, its sources take what chance gives them."""
        return round(self.source.rows * min(1, (self.recipe.cap or self.source.unit_rows) / self.source.unit_rows))


def prepare(
    sources: Sequence[Source],
    tokenizer: epath.PathLike,
    out: epath.PathLike,
    recipe: Recipe,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    beam_flags: Sequence[str] = (),
    report: Callable[[BuildProgress], None] = lambda progress: None,
) -> records.Dataset:
    """Writes the dataset `out`, or returns it if it is there with the same settings and raw files.

    Args:
      sources: to write, from `sources.find_sources`.
      tokenizer: folder of the tokenizer.
      out: folder to write.
      recipe: what is made of the sources.
      workers: processes, each building one source at a time; default one a CPU.
      overwrite: replace another dataset at `out`; a local one only once the new one is complete.
      beam_flags: Beam pipeline options; without a `--runner` pipelines run on this machine.
      report: called after each source.

    Raises:
      UserError: the raw data or the tokenizer cannot be used.
      DatasetError: `out` holds something else, or a dataset of other settings and `overwrite` is not set.
    """
    out = epath.Path(out)
    sources = [source for source in sources if choose_rows(source, recipe).any()]  # a small file of a capped unit may be left out
    loaded = load_tokenizer(tokenizer)
    settings = _settings(sources, loaded, recipe)
    for source in sources:
        check_name(source.name, "source")
        check_name(source.unit, "unit")
    raw = {f"raw file {path}": path for source in sources for path in source.files}
    check_apart(out, {f"--tokenizer {tokenizer}": tokenizer} | raw)
    with lock(out):
        return _prepare(sources, loaded, out, recipe, settings, workers or os.cpu_count() or 1, overwrite, beam_flags, report)


def _prepare(
    sources: Sequence[Source],
    loaded: Tokenizer,
    out: epath.Path,
    recipe: Recipe,
    settings: dict,
    workers: int,
    overwrite: bool,
    beam_flags: Sequence[str],
    report: Callable[[BuildProgress], None],
) -> records.Dataset:
    _check_replaceable(out)
    if records.read_settings(out) and not overwrite and (same := _existing(out, settings)):
        return same
    check_installed()  # said now and not after hours of work
    folder = _begin(out, settings)
    loaded.save(records.tokenizer_folder(folder))
    encoding.remember(str(records.tokenizer_folder(folder)), loaded)
    jobs = [_Job(str(folder), source, recipe, tuple(beam_flags)) for source in sources]
    finished = _build_all(jobs, workers, report)
    entries = [finished[source.name] for source in sources]
    summary.write(folder, entries)
    if (folder / "work").exists():
        (folder / "work").rmtree()
    records.write_dataset(folder, loaded, stage=recipe.stage, max_length=recipe.max_length, seed=recipe.seed, sources=entries)
    mark(folder)
    if folder != out:
        replace_folder(folder, out)
    return records.load_dataset(out)


def _settings(sources: Sequence[Source], tokenizer: Tokenizer, recipe: Recipe) -> dict:
    """All that the records depend on; raw files are known by size and time of change."""
    files = {path: epath.Path(path).stat() for source in sources for path in source.files}
    settings = {
        "format_version": records.FORMAT_VERSION,
        **dataclasses.asdict(recipe),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "files": {path: {"bytes": stat.length, "modified": stat.mtime} for path, stat in files.items()},
        "sources": [dataclasses.asdict(source) for source in sources],
    }
    return plain(settings)  # as it will be read again: no tuples


def _check_replaceable(folder: epath.Path) -> None:
    """Raises an error for a folder that holds something other than a dataset, begun or complete: nothing may replace it."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    if records.read_settings(folder) is None:
        raise records.DatasetError(f"{folder} exists and is not a prepared dataset; move it away or choose another --out")
    if (folder / "dataset.json").exists():
        check_ours(folder)
    elif strange := sorted(name for name in files_in(folder) if name.split("/")[0] not in BEGUN):
        raise records.DatasetError(f"{folder}/{strange[0]} was not written by prepare; move it away or choose another --out")


def _existing(out: epath.Path, settings: dict) -> records.Dataset | None:
    """The dataset at `out` if it is the one asked for, None if it may be continued; anything else is an error."""
    same = records.read_settings(out) == settings
    if same and is_remote(out) and not (out / "dataset.json").exists():
        return None
    if same:
        return records.load_dataset(out)
    raise records.DatasetError(
        f"{out} exists and was not prepared from these files with these settings; choose another --out or pass --overwrite"
    )


def _begin(out: epath.Path, settings: dict) -> epath.Path:
    """The folder to write in, with what an interrupted run of the same settings left there and nothing else."""
    folder = out if is_remote(out) else out.with_name(out.name + ".partial")
    _check_replaceable(folder)
    if folder.exists() and (records.read_settings(folder) != settings or (folder / "dataset.json").exists()):
        folder.rmtree()
    folder.mkdir(parents=True, exist_ok=True)
    records.write_settings(folder, settings)
    return folder


def check_installed() -> None:
    """Raises a ModuleNotFoundError, which a command tells with its remedy, if a package that preparation needs is not installed."""
    for package in NEEDED:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)


def _build_all(jobs: Sequence[_Job], workers: int, report: Callable[[BuildProgress], None]) -> dict[str, records.SourceInfo]:
    """Builds what is not finished yet, the largest sources first so that no worker is left alone with one at the end."""
    finished: dict[str, records.SourceInfo] = {}
    pending = []
    for job in jobs:
        if info := records.finished_source(job.folder, job.source.name):
            finished[info.name] = info
            report(BuildProgress(info, True, len(finished), len(jobs), 0, 0, 0, 0.0))
        else:
            pending.append(job)
    pending.sort(key=lambda job: job.rows * (2 + job.source.negatives), reverse=True)
    total, rows, texts, start = sum(job.rows for job in pending), 0, 0, time.monotonic()
    for info in _results(pending, min(workers, len(pending))):
        finished[info.name] = info
        built = sum(info.rows.values())
        rows, texts = rows + built, texts + built * (2 + info.negatives)
        report(BuildProgress(info, False, len(finished), len(jobs), rows, total, texts, time.monotonic() - start))
    return finished


def _results(jobs: Sequence[_Job], workers: int) -> Iterator[records.SourceInfo]:
    """Results as they come. The first failure cancels what has not begun."""
    if workers <= 1 and not _in_ipython():
        yield from map(_build, jobs)
        return
    context = multiprocessing.get_context("spawn")  # Beam and the tokenizer start threads, which a fork would break
    with concurrent.futures.ProcessPoolExecutor(max(1, workers), context, initializer=_die_with_parent) as pool:
        with _no_script():
            futures = [pool.submit(_build, job) for job in jobs]  # starts the processes
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _in_ipython() -> bool:
    """Whether this is a session of IPython, where Beam imports a part of its own that fails with pandas 3; a worker is none."""
    ipython = sys.modules.get("IPython")  # libraries import it, too
    return ipython is not None and ipython.get_ipython() is not None


@contextlib.contextmanager
def _no_script() -> Iterator[None]:
    """Keeps processes that are started from running the user's script again, which need not guard against that: a spawned process
    imports the file of `__main__`, and no job here refers to anything in it."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def _die_with_parent() -> None:
    """Ends this worker when its parent is killed: a survivor would write into the folder that the next run rebuilds."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _build(job: _Job) -> records.SourceInfo:
    """Builds one source, records and tables."""
    with contextlib.nullcontext() if job.beam_flags else _quiet():
        from f2llm_jax.preparation import builder  # takes seconds, and warns of Google libraries nobody asked for

        return builder.build_source(job.folder, job.source, job.recipe, records.tokenizer_folder(job.folder), job.beam_flags)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS and Beam from printing and logging; what fails is raised all the same."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
