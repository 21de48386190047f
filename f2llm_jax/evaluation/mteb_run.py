"""mteb's tasks through this project's encoder, at every width from one pass over the texts.

Results stand in mteb's own layout, `OUT/results/NAME/REVISION/TASK.json` at full width and below `experiments/` otherwise;
what is there for the same data is not computed again. Vectors are in `OUT/vectors` and may be deleted at any time.
"""

import contextlib
import copy
import dataclasses
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence

from etils import epath

from f2llm_jax.cli.progress import Progress
from f2llm_jax.errors import UserError
from f2llm_jax.evaluation.instructions import near
from f2llm_jax.evaluation.mteb_encoder import Conditions, MtebEncoder, meta_code
from f2llm_jax.inference.devices import all_here, is_first
from f2llm_jax.inference.vector_cache import CachedEncoder
from f2llm_jax.storage.files import write_text

LOADER_TEXTS = 1024  # texts a batch of mteb's data loader; our encoder makes its own batches


class TaskNameError(UserError):
    """A task or a benchmark that mteb does not have; the message lists near names."""


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """A task's main score at one width."""

    task: str
    kind: str
    dim: int
    value: float


def find_tasks(names: Sequence[str], benchmark: str | None) -> list:
    """mteb's tasks of these names, and those of a benchmark.

    Raises:
      TaskNameError: there is none of a name.
    """
    import mteb
    from mteb.get_tasks import _TASKS_REGISTRY as registry

    found = []
    if benchmark:
        try:
            found += mteb.get_benchmark(benchmark).tasks
        except KeyError as error:
            known = [one.name for one in mteb.get_benchmarks()]
            raise TaskNameError(f"mteb has no benchmark {benchmark!r}{near(benchmark, known)}") from error
    for name in names:
        if name not in registry:
            raise TaskNameError(f"mteb has no task {name!r}{near(name, registry)}")
        found.append(mteb.get_task(name))
    return found


def run_tasks(
    encoder: CachedEncoder,
    tasks: Sequence,
    dims: Sequence[int],
    out: epath.PathLike,
    table: Mapping[str, str],
    meta,
    conditions: Conditions,
) -> list[TaskScore]:
    """The main score of each task at each width; the mean over splits and subsets is mteb's.

    Args:
      encoder: of the model.
      tasks: mteb's.
      dims: widths.
      out: folder of the results.
      table: of instructions.
      meta: mteb's `ModelMeta` of the model.
      conditions: what else the results depend on.
    """
    import mteb

    results = mteb.ResultCache(_results_folder(out))
    write_text(epath.Path(out) / "model_meta.py", meta_code(meta))
    scores = []
    total = len(tasks) * len(dims)
    with Progress(line_seconds=0) as progress, _quiet():
        for task in tasks:
            for dim in dims:
                experiment = conditions.experiment(dim if dim < encoder.width else None)
                at_dim = MtebEncoder(encoder, table, meta.model_copy(update={"experiment_kwargs": experiment}), dim)
                scores.append(TaskScore(task.metadata.name, task.metadata.type, dim, _evaluate(at_dim, task, results)))
                progress.show("evaluating", len(scores), total, "tasks", f"{task.metadata.name} at {dim}")
    return scores


def _results_folder(out: epath.PathLike) -> str:
    """`out` for the first process; for others a copy of what is there: all compute the same in the same order, one of them writes."""
    if is_first():
        folder = str(out)
    else:
        folder = tempfile.mkdtemp(prefix="f2llm_jax-results-")
        if (theirs := epath.Path(out) / "results").exists():
            shutil.copytree(theirs, f"{folder}/results")
    all_here("results read")
    return folder


def _evaluate(encoder: MtebEncoder, task, results) -> float:
    import mteb

    stored = results.load_task_result(task.metadata.name, encoder.mteb_model_meta)
    same_data = stored is None or stored.dataset_revision == task.metadata.revision
    # A copy of its own for each width: a task draws samples from a generator that it carries along.
    result = mteb.evaluate(
        encoder,
        copy.deepcopy(task),
        co2_tracker=False,
        encode_kwargs={"batch_size": LOADER_TEXTS, "show_progress_bar": False},
        cache=results,
        overwrite_strategy="only-missing" if same_data else "always",
        show_progress_bar=False,
    )
    return result.task_results[0].get_score()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """mteb tells of every step and warns of what its own libraries do."""
    import datasets

    level = logging.getLogger("mteb").level
    logging.getLogger("mteb").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.getLogger("mteb").setLevel(level)
            datasets.enable_progress_bars()
