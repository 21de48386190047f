"""What a run is: its configuration, data, teacher and code. Each checkpoint records it, and a run resumes only what it is.

`config.json` tells the configuration of the run's last part and, under "history", what was changed at which step.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import pathlib
import platform
import re
import subprocess
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import ml_collections
from etils import epath

from f2llm_jax.cli import configuration
from f2llm_jax.data.records import COMPLETE, Dataset
from f2llm_jax.errors import UserError
from f2llm_jax.storage.files import plain, read_json, write_json

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")
HISTORY = "history"
# The digests of a `Provenance`, in words.
DIGESTS = {
    "data": "content of the data",
    "tokenizer": "tokenizer",
    "teacher": "content of the teacher",
    "code": "code",
    "own": "own objective",
}
# Fields (or groups of them) that change neither the order of the data nor what is trained; names of data and teacher may change as
# long as their contents do not. The learning rate and the number of updates are changed on purpose. All are told and recorded.
MAY_CHANGE = (
    "log_every",
    "max_skipped_steps",
    "hang_minutes",
    "steps",
    "epochs",
    "optimizer.learning_rate",
    "optimizer.min_learning_rate",
    "remat",
    "attention",
    "mesh",
    "batch.microbatch_rows",
    "batch.chunk_rows",
    "batch.row_parts",
    "data.folder",
    "data.copy_to",
    "data.threads",
    "data.ahead",
    "data.embedded_stage",
    "teacher",
    "teacher_cache",
    "eval",
    "checkpoint",
    "profile",
    "loggers",
    "code",
)


class ResumeError(UserError):
    """A checkpoint of another run than the one asked for; the message names every difference."""


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What the updates of a run are a function of."""

    config: Mapping[str, Any]  # nested, as JSON holds it
    data: str  # `Dataset.digest`
    tokenizer: str  # `Dataset.tokenizer_fingerprint`
    teacher: str  # digest of the teacher's weights, shape and tokenizer; "" for none
    code: str  # digest of the sources of this package
    own: str  # an objective of the user's, `described`; "" for none

    @classmethod
    def of(
        cls, config: ml_collections.ConfigDict, dataset: Dataset, teacher: str, code: str, own: Callable[..., object] | None
    ) -> "Provenance":
        return cls(
            plain(config.to_dict()),
            dataset.digest,
            dataset.tokenizer_fingerprint,
            teacher,
            code,
            described(own) if own else "",
        )

    def changes(self, recorded: Mapping[str, Any] | None, workdir: epath.Path) -> dict[str, tuple[Any, Any]]:
        """Settings that differ from those in a checkpoint's metadata, old and new.

        A field that is not recorded, because older code did not have it, counts as its default: what configs/common.py gives it, whatever
        other configuration files do; one that is not there either, as None. A recorded field that there is no more is None now. A digest
        that is not recorded is unknown and not compared.

        Raises:
          ResumeError: the checkpoint records none.
        """
        if recorded is None:
            raise ResumeError(f"{workdir} was not trained here; start from it with --config.init={workdir} and another --workdir")
        held, now = _settings(recorded), _settings(dataclasses.asdict(self))
        before = _flat(plain(configuration.defaults(recorded["config"].get("size", "")).to_dict())) | held
        return {name: (before.get(name), now.get(name)) for name in held | _flat(self.config) if before.get(name) != now.get(name)}


@dataclasses.dataclass(frozen=True)
class ResumePoint:
    """A checkpoint of this run, and what has changed since it was saved: old and new by name."""

    step: int
    changes: dict[str, tuple[Any, Any]]


def described(function: Callable[..., object]) -> str:
    """A function in words that differ where it computes something else: name, arguments that are bound to it, digest of its bytecode."""
    if isinstance(function, functools.partial):
        return f"{described(function.func)}{_words([*function.args, *sorted(function.keywords.items())])}"
    name, code = getattr(function, "__qualname__", type(function).__qualname__), getattr(function, "__code__", None)
    if code is None:  # an object that is called
        return name
    closed = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    return f"{name}:{hashlib.sha256(repr(_instructions(code)).encode()).hexdigest()[:8]}{_words(closed) if closed else ''}"


def _words(values: Iterable[object]) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", f"({', '.join(map(repr, values))})")  # addresses differ from process to process


def _instructions(code: types.CodeType) -> list[object]:
    constants = [_instructions(one) if isinstance(one, types.CodeType) else repr(one) for one in code.co_consts]
    return [code.co_code.hex(), code.co_names, constants]


def check_changes(changes: Mapping[str, tuple[Any, Any]], workdir: epath.Path, allowed: bool) -> None:
    """Raises a ResumeError for changes of the order of data or of what is trained, unless they are `allowed`."""
    refused = {name: change for name, change in changes.items() if not _may_change(name)}
    if refused and not allowed:
        raise ResumeError(
            f"{workdir} is another run:\n  {tell(refused)}\n"
            "use another workdir, take the changes back, or pass --resume_with_changes to the command `main`"
        )


def tell(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """A line a change."""
    return "\n  ".join(f"{name}: {before!r} before, {now!r} now" for name, (before, now) in sorted(changes.items()))


def write_provenance(workdir: epath.Path, provenance: Provenance, dataset: Dataset, resumed: ResumePoint | None) -> None:
    """`config.json` with the history of its changes, `dataset.json`, `environment.json` and `tokenizer/`."""
    file = workdir / "config.json"
    history = read_json(file, sealed=True).get(HISTORY, []) if resumed and file.exists() else []
    if resumed and resumed.changes:
        changes = {name: {"before": before, "now": now} for name, (before, now) in sorted(resumed.changes.items())}
        history = [*history, {"step": resumed.step, "changes": changes}]
    write_json(file, {**provenance.config, HISTORY: history}, sealed=True)
    write_json(workdir / "dataset.json", read_json(epath.Path(dataset.folder) / COMPLETE, sealed=True), sealed=True)
    write_json(workdir / "environment.json", environment(), sealed=True)
    dataset.tokenizer().save(workdir / "tokenizer")


def environment() -> dict[str, str | int | None]:
    """Versions, devices, and the commit of this project if it runs from a checkout."""
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    devices = {"device": jax.devices()[0].device_kind, "devices": jax.device_count(), "hosts": jax.process_count()}
    return {"python": platform.python_version(), **versions, **devices, "commit": _commit()}


def _commit() -> str | None:
    here = pathlib.Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _may_change(name: str) -> bool:
    return any(name == field or name.startswith(f"{field}.") for field in MAY_CHANGE)


def _settings(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Of a `Provenance` as a checkpoint records it: the digests that are there, in words, and every field by its dotted name."""
    return {words: recorded[name] for name, words in DIGESTS.items() if name in recorded} | _flat(recorded["config"])


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix.removesuffix("."): value}
    return {name: leaf for key, inner in value.items() for name, leaf in _flat(inner, f"{prefix}{key}.").items()}
