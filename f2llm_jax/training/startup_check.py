"""Whether every process of a run has started, and all with the same code and configuration, before JAX joins them.

`jax.distributed.initialize` waits for the missing and then aborts without a word on who they are, so this asks first, over TCP
of its own: process 0 listens, every other sends a line of JSON (who it is, what it runs) and gets one back (nothing, or the
problem). All get the same answer, so all continue or all stop.

Whoever else connects changes nothing: a line counts only with the run's token, in bounded length and of the right types, and all
connections share one deadline.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import selectors
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

from f2llm_jax.errors import UserError

GRACE = 5.0  # seconds beyond the limit in which process 0 may still tell the outcome; also for sending one line
RETRY = 0.2  # seconds between two attempts to reach process 0
LONGEST_LINE = 2**20  # bytes of an answer
MOST_CONNECTIONS = 4096  # open at once; the longest silent is closed for a new one
NAMED = 5  # differences named of a host
SECRET_VARIABLE = "F2LLM_JAX_TOKEN"  # a secret of the user's instead of one that follows from the workdir


class StartupError(UserError):
    """Processes that are missing or differ; the message names them, and is the same on all that were there."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """Who is called."""

    host: str  # of process 0, a name or an address
    port: int  # that process 0 listens on
    count: int
    names: Sequence[str] = ()  # host name of each process, where they are known before it answers; else empty


@dataclasses.dataclass(frozen=True)
class _Answer:
    """What one process says of itself, and, at process 0, the connection on which it waits for the outcome."""

    index: int
    host: str
    settings: Mapping[str, str]
    connection: socket.socket | None = None
    failed: str = ""  # why it cannot start

    def __str__(self) -> str:
        return f"process {self.index} ({self.host})"


def run_token(workdir: str) -> str:
    """What the processes of a run know and strangers do not: the user's secret if there is one, else a digest of the workdir's path."""
    return hashlib.sha256(f"f2llm_jax {os.environ.get(SECRET_VARIABLE) or workdir}".encode()).hexdigest()


def startup_check(processes: Processes, index: int, settings: Mapping[str, str], limit: float, token: str = "", failed: str = "") -> None:
    """Returns on every process when all have answered alike.

    Args:
      processes: the same on all.
      index: of this process; 0 listens.
      settings: what all must have in common, by name.
      limit: seconds from the start of the first process on.
      token: of the run; who sends another is not of it.
      failed: why this process cannot start, for the others to know; "" if it can.

    Raises:
      StartupError: within `limit`, on every process that did start.
    """
    deadline = time.monotonic() + limit
    mine = _Answer(index, socket.gethostname(), {"number of processes": str(processes.count), **settings}, failed=failed)
    problem = _Listener(processes, mine, deadline, limit, token).wait() if index == 0 else _answer(processes, mine, deadline, limit, token)
    if problem:
        raise StartupError(f"startup check: {problem}")


def _answer(processes: Processes, mine: _Answer, deadline: float, limit: float, token: str) -> str:
    """A process other than 0: says what it runs, again if process 0 starts late or over; the problem, "" for none."""
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError), socket.create_connection((processes.host, processes.port), min(left, GRACE)) as connection:
            said = {"token": token, "left": left}
            said |= {name: getattr(mine, name) for name in ("index", "host", "settings", "failed")}
            connection.sendall(_line(said))
            answer = _receive(connection, deadline + GRACE)
            if answer and answer.get("token") == token and isinstance(answer.get("problem"), str):
                return answer["problem"]
        time.sleep(RETRY)
    return _missing(processes, {mine.index: mine}, [0], limit)


class _Listener:
    """Process 0: hears all and tells all the problem."""

    def __init__(self, processes: Processes, mine: _Answer, deadline: float, limit: float, token: str):
        self._processes, self._deadline, self._limit, self._token = processes, deadline, limit, token
        self._present = {0: mine}
        self._heard: dict[socket.socket, bytearray] = {}  # of those whose line is not complete
        self._strangers = 0
        self._problem = ""

    def wait(self) -> str:
        """The problem, "" for none."""
        with _listen(self._processes.port) as server, selectors.DefaultSelector() as selector:
            server.setblocking(False)
            selector.register(server, selectors.EVENT_READ)
            try:
                while not self._done():
                    for key, _ in selector.select(min(1.0, max(0.0, self._deadline - time.monotonic()))):
                        self._accept(server, selector) if key.fileobj is server else self._read(cast(socket.socket, key.fileobj), selector)
                return self._problem
            finally:
                self._tell()

    def _done(self) -> bool:
        for answer in list(self._present.values()):
            if answer.connection and _gone(answer.connection):
                answer.connection.close()
                del self._present[answer.index]
        if self._problem:
            return True
        absent = sorted(set(range(self._processes.count)) - self._present.keys())
        if not absent or max(self._present) >= self._processes.count:
            self._problem = _failures(self._present) or _differences(self._present)
            return True
        if time.monotonic() <= self._deadline:
            return False
        self._problem = _failures(self._present)
        if self._problem:
            return True
        self._problem = _missing(self._processes, self._present, absent, self._limit)
        if self._strangers:
            self._problem += f" ({self._strangers} connections were of other runs, with another --workdir, or of no run)"
        return True

    def _accept(self, server: socket.socket, selector: selectors.BaseSelector) -> None:
        with contextlib.suppress(OSError):
            connection, _ = server.accept()
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_READ)
            self._heard[connection] = bytearray()
            if len(self._heard) > MOST_CONNECTIONS:
                self._refuse(next(iter(self._heard)), selector)

    def _read(self, connection: socket.socket, selector: selectors.BaseSelector) -> None:
        heard = self._heard[connection]
        try:
            more = connection.recv(2**16)
        except BlockingIOError:
            return
        except OSError:
            more = b""
        heard += more
        if not more or len(heard) > LONGEST_LINE:
            self._refuse(connection, selector)
        elif b"\n" in heard:
            said = _parse(bytes(heard).partition(b"\n")[0])
            if said is None or said.get("token") != self._token or (answer := _understood(said, connection)) is None:
                self._refuse(connection, selector)
                return
            selector.unregister(connection)
            del self._heard[connection]
            self._take(answer, said["left"])

    def _take(self, answer: _Answer, left: float) -> None:
        self._deadline = min(self._deadline, time.monotonic() + left)
        before = self._present.get(answer.index)
        if before and not (before.connection and _gone(before.connection)):
            self._problem = f"{before} and {answer} claim the same number; give each process its own"
            self._present[-1] = answer  # to be told
        else:
            if before and before.connection:
                before.connection.close()
            self._present[answer.index] = answer  # new, or started over

    def _refuse(self, connection: socket.socket, selector: selectors.BaseSelector) -> None:
        self._strangers += 1
        selector.unregister(connection)
        del self._heard[connection]
        connection.close()

    def _tell(self) -> None:
        for connection in self._heard:
            connection.close()
        until = time.monotonic() + GRACE
        for connection in [answer.connection for answer in self._present.values() if answer.connection]:
            with contextlib.suppress(OSError), connection:
                connection.settimeout(max(0.1, until - time.monotonic()))
                connection.sendall(_line({"token": self._token, "problem": self._problem}))


def _understood(said: Mapping[str, Any], connection: socket.socket) -> _Answer | None:
    """The answer in a line, if its fields are of the right types."""
    index, host, settings, left = (said.get(name, math.nan) for name in ("index", "host", "settings", "left"))
    failed = said.get("failed", "")
    right = (
        isinstance(index, int)
        and not isinstance(index, bool)
        and 0 <= index < 2**31
        and isinstance(host, str)
        and isinstance(settings, dict)
        and all(isinstance(value, str) for value in settings.values())
        and isinstance(left, int | float)
        and not isinstance(left, bool)
        and math.isfinite(left)
        and left >= 0
        and isinstance(failed, str)
    )
    return _Answer(index, host, settings, connection, failed) if right else None


def _missing(processes: Processes, present: Mapping[int, _Answer], absent: Sequence[int], limit: float) -> str:
    names = [f"process {i} ({processes.names[i]})" if processes.names else f"process {i}" for i in absent]
    return (
        f"{', '.join(names)} of {processes.count} did not answer at {processes.host}:{processes.port} within {limit:g} s; there was "
        f"{', '.join(map(str, present.values()))}. Look at what the missing printed, and start all with the same command"
    )


def _failures(present: Mapping[int, _Answer]) -> str:
    return "\n  ".join(f"{answer} cannot start: {answer.failed}" for answer in present.values() if answer.failed)


def _differences(present: Mapping[int, _Answer]) -> str:
    """Who differs from the most common answer (process 0's among equals) and in what; "" if nobody does."""
    kinds = collections.Counter(json.dumps(answer.settings, sort_keys=True) for answer in present.values())
    usual = json.loads(max(kinds, key=lambda kind: kinds[kind]))
    reference = next(answer for answer in present.values() if answer.settings == usual)
    lines = []
    for answer in present.values():
        wrong = [name for name in sorted(usual.keys() | answer.settings.keys()) if usual.get(name) != answer.settings.get(name)]
        if wrong:
            listed = "; ".join(f"{name} is {answer.settings.get(name)}, not {usual.get(name)}" for name in wrong[:NAMED])
            more = f"; and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
            lines.append(f"{answer} differs from {reference}: {listed}{more}")
    return "\n  ".join([*lines, "give all hosts the same code, packages and command"]) if lines else ""


def _listen(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, backlog=1024, dualstack_ipv6=both)
    except OSError as error:
        raise StartupError(f"startup check: process 0 cannot listen at port {port} ({error}); is another run on this host?") from error


def _gone(connection: socket.socket) -> bool:
    """Whether the other side has closed; it sends nothing while it waits."""
    try:
        connection.setblocking(False)
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _receive(connection: socket.socket, deadline: float) -> dict[str, Any] | None:
    """One line of JSON, None if none came until the deadline."""
    heard = bytearray()
    while b"\n" not in heard and len(heard) <= LONGEST_LINE and (left := deadline - time.monotonic()) > 0:
        connection.settimeout(left)
        if not (more := connection.recv(2**16)):
            break
        heard += more
    return _parse(bytes(heard).partition(b"\n")[0])
