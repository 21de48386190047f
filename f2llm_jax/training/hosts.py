"""The processes of a run, one a host: who they are, and joining them.

On TPU pods, on GKE and under Slurm JAX itself knows who they are; elsewhere three flags say so, named as the arguments of
`jax.distributed.initialize`. One process needs none of this.
"""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import jax
import jaxlib
import ml_collections
from etils import epath

import f2llm_jax
from f2llm_jax.errors import UserError
from f2llm_jax.training import cluster
from f2llm_jax.training.resuming import Resume
from f2llm_jax.training.startup_check import Processes, StartupError, run_token, startup_check


class HostsError(UserError):
    """Processes that cannot be told apart or found; the message names the remedy."""


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among all of a run.

    Attributes:
      coordinator_address: `host:port` of process 0; empty for a run of one process.
      num_processes: of the run.
      process_id: of this one, counted from 0.
    """

    coordinator_address: str = ""
    num_processes: int = 1
    process_id: int = 0


ALONE = Place()


def find_place(coordinator_address: str | None, num_processes: int | None, process_id: int | None, limit: int) -> Place:
    """This process's place: as given, the rest as JAX's cluster detection finds it within `limit` seconds; `ALONE` if neither.

    Raises:
      HostsError: the place is known in part.
    """
    given: dict[str, Any] = {"--coordinator_address": coordinator_address, "--num_processes": num_processes, "--process_id": process_id}
    if None in given.values():
        try:
            found = cluster.detect(coordinator_address, num_processes, process_id, limit)
        except RuntimeError as error:  # the name of process 0's host means nothing yet
            raise HostsError(f"process 0 is not to be found: {error}; is it started, and does the network know its name?") from error
        given = dict(zip(given, found, strict=True))
    unknown = [flag for flag, value in given.items() if value is None]
    if len(unknown) == len(given):
        return ALONE
    if unknown:
        raise HostsError(f"{' and '.join(unknown)} missing, and this is no cluster that JAX knows; give all of {', '.join(given)}")
    place = Place(*given.values())
    if not 0 <= place.process_id < place.num_processes or not place.coordinator_address.rpartition(":")[2].isdigit():
        raise HostsError(
            f"--coordinator_address={place.coordinator_address} must be host:port, and --process_id={place.process_id} one of "
            f"0 to {place.num_processes - 1} (--num_processes={place.num_processes})"
        )
    return place


class Joining:
    """The processes of a run become one JAX, or all of them learn why not: also of an error on one of them before it has joined.

    A context manager; what must be done before the hosts join is done in it, before `join`.
    """

    def __init__(self, place: Place, settings: Mapping[str, str], limit: int):
        """
        Args:
          place: of this process.
          settings: what all must have in common, by name.
          limit: seconds from the start of the first process on.
        """
        self._place, self._settings, self._limit = place, settings, limit
        self._waiting = place.num_processes > 1

    def __enter__(self) -> "Joining":
        return self

    def join(self) -> None:
        """Runs the startup check (at the port below the coordinator's) and joins; nothing for one process.

        Raises:
          StartupError: not all are there, or not all are alike, or one cannot start; raised on all of them.
        """
        if self._waiting:
            self._check()
            place = self._place
            jax.distributed.initialize(place.coordinator_address, place.num_processes, place.process_id, initialization_timeout=self._limit)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._waiting and isinstance(error, Exception):
            print(f"cannot start: {error}\ntelling the other processes, for at most {self._limit} s", file=sys.stderr, flush=True)
            with contextlib.suppress(StartupError):
                self._check(str(error) or type(error).__name__)

    def _check(self, failed: str = "") -> None:
        self._waiting = False
        place, (host, _, port) = self._place, self._place.coordinator_address.rpartition(":")
        known = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")  # GKE names the pods of a slice
        names = known if len(known) == place.num_processes else ()
        processes = Processes(host.strip("[]"), int(port) - 1, place.num_processes, names)
        startup_check(processes, place.process_id, self._settings, self._limit, run_token(self._settings["--workdir"]), failed)


def settings_of(config: ml_collections.ConfigDict, workdir: epath.Path, resume: Resume) -> dict[str, str]:
    """What all processes of a run must have in common, by name: code, JAX, every field of the configuration, the workdir."""
    code = f"{f2llm_jax.__version__} with sources {source_digest()}"
    versions = {"f2llm_jax": code, "jax": jax.__version__, "jaxlib": jaxlib.__version__}
    flags = {"--workdir": str(workdir), "--resume_from": str(resume.step), "--resume_with_changes": str(resume.with_changes)}
    return versions | flags | _fields(config.to_dict(), "--config")


def source_digest() -> str:
    """16 hex digits that stand for every Python file of this package."""
    digest = hashlib.sha256()
    package = pathlib.Path(f2llm_jax.__file__).parent
    for file in sorted(package.rglob("*.py")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def _fields(value: Any, name: str) -> dict[str, str]:
    if not isinstance(value, Mapping):
        return {name: repr(value)}
    return {path: text for key, inner in value.items() for path, text in _fields(inner, f"{name}.{key}").items()}
