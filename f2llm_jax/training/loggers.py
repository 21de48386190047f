"""Where the metrics of a run go besides its own files: TensorBoard, Weights & Biases, MLflow, trackio, or any function.

A logger takes each line of metrics as it is written: `log(step, values)`, with the values of `metrics.jsonl` by name and, as
`timing/NAME`, those of `timings.jsonl`. It is called on the first host alone.
"""

import contextlib
import hashlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
from etils import epath

from f2llm_jax.errors import UserError
from f2llm_jax.storage.files import is_remote

Logger = Callable[[int, Mapping[str, Any]], None]
PROJECT = "f2llm-jax"  # where the environment names none
MLFLOW_RUN = "mlflow_run_id"  # file in the workdir, so that a resumed run continues there too


def check(names: Sequence[str]) -> None:
    """Raises a UserError for a logger that does not exist, and ModuleNotFoundError for one whose package is not installed."""
    for name in names:
        if name not in LOGGERS:
            raise UserError(f"config.loggers: there is no {name!r}; choose of {', '.join(LOGGERS)}")
        package = LOGGERS[name][0]
        if not importlib.util.find_spec(package):
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)


@contextlib.contextmanager
def opened(names: Sequence[str], workdir: epath.Path, config: ml_collections.ConfigDict, first: int) -> Iterator[list[Logger]]:
    """The loggers of `names`, closed at the end; none on other hosts than the first.

    Args:
      names: keys of `LOGGERS`.
      workdir: of the run; its name is the run's.
      config: of the run, shown as its parameters.
      first: the step from which on lines are written; later ones of a killed run are to be forgotten.
    """
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(LOGGERS[name][1](workdir, config, first)) for name in names if jax.process_index() == 0]


@contextlib.contextmanager
def _tensorboard(workdir: epath.Path, config: ml_collections.ConfigDict, first: int) -> Iterator[Logger]:
    """Event files in `WORKDIR/tensorboard`; on a disk only."""
    del config
    if is_remote(workdir):
        yield lambda step, values: None
        return
    from tensorboardX import SummaryWriter  # imports PyTorch where that is installed, which takes seconds

    board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first)

    def log(step: int, values: Mapping[str, Any]) -> None:
        for name, value in _numbers(values).items():
            board.add_scalar(name, value, step)

    with contextlib.closing(board):
        yield log


@contextlib.contextmanager
def _wandb(workdir: epath.Path, config: ml_collections.ConfigDict, first: int) -> Iterator[Logger]:
    """A run of the project `WANDB_PROJECT`, one a workdir; `WANDB_MODE=offline` keeps it on this machine."""
    del first
    import wandb

    folder = None if is_remote(workdir) else str(workdir)
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    run = wandb.init(project=project, name=workdir.name, id=_id(workdir), resume="allow", config=config.to_dict(), dir=folder)
    try:
        yield lambda step, values: run.log(_numbers(values), step=step)
    finally:
        run.finish()


@contextlib.contextmanager
def _mlflow(workdir: epath.Path, config: ml_collections.ConfigDict, first: int) -> Iterator[Logger]:
    """A run of MLflow's experiment and tracking server, as `MLFLOW_EXPERIMENT_NAME` and `MLFLOW_TRACKING_URI` say."""
    del first
    import mlflow

    file = workdir / MLFLOW_RUN
    known = file.read_text() if file.exists() else None
    with mlflow.start_run(run_id=known, run_name=None if known else workdir.name) as run:
        if not known:
            mlflow.log_params({name: str(value) for name, value in _flat(config).items()})
            file.write_text(run.info.run_id)
        # MLflow allows these characters in names.
        yield lambda step, values: mlflow.log_metrics(
            {re.sub(r"[^\w\-. /]", "_", name): value for name, value in _numbers(values).items()}, step=step
        )


@contextlib.contextmanager
def _trackio(workdir: epath.Path, config: ml_collections.ConfigDict, first: int) -> Iterator[Logger]:
    """A run of the local project `TRACKIO_PROJECT`, one a workdir."""
    del first
    import trackio

    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    trackio.init(project=project, name=f"{workdir.name}-{_id(workdir)}", config=_flat(config), resume="allow")
    try:
        yield lambda step, values: trackio.log(_numbers(values), step=step)
    finally:
        trackio.finish()


# By name: the package that it needs, and what opens it.
Opener = Callable[[epath.Path, ml_collections.ConfigDict, int], contextlib.AbstractContextManager[Logger]]
LOGGERS: dict[str, tuple[str, Opener]] = {
    "tensorboard": ("tensorboardX", _tensorboard),
    "wandb": ("wandb", _wandb),
    "mlflow": ("mlflow", _mlflow),
    "trackio": ("trackio", _trackio),
}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def _id(workdir: epath.Path) -> str:
    """The same for a run that resumes."""
    return hashlib.sha256(str(workdir).encode()).hexdigest()[:8]


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, ml_collections.ConfigDict) else {prefix + name: value}
    return flat
