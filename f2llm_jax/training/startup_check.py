"""Whether every process of a run has started, and all with the same code and configuration, before JAX joins them.

`jax.distributed.initialize` waits for the missing and then aborts without a word on who they are, so this asks first, over TCP
of its own: process 0 listens, every other sends a line of JSON (who it is, what it runs) and gets one back (nothing, or the
problem). All get the same answer, so all go on or all stop.
"""

import collections
import contextlib
import dataclasses
import json
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from f2llm_jax.errors import UserError

GRACE = 5.0  # seconds beyond the limit in which process 0 may still tell the outcome; also for sending one line
RETRY = 0.2  # seconds between two attempts to reach process 0
LONGEST_LINE = 2**20  # bytes of an answer
NAMED = 5  # differences named of a host


class StartupError(UserError):
    """Processes that are missing or differ; the message names them, and is the same on all that were there."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """Who is called.

    Attributes:
      host: of process 0, a name or an address.
      port: that process 0 listens on.
      count: number of processes.
      names: host name of each process, where they are known before it answers; else empty.
    """

    host: str
    port: int
    count: int
    names: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class _Answer:
    """What one process says of itself, and, at process 0, the connection on which it waits for the outcome."""

    index: int
    host: str
    facts: Mapping[str, str]
    connection: socket.socket | None = None

    def __str__(self) -> str:
        return f"process {self.index} ({self.host})"


def startup_check(roll: Processes, index: int, facts: Mapping[str, str], limit: float) -> None:
    """Returns on every process when all have answered alike.

    Args:
      roll: the same on all.
      index: of this process; 0 listens.
      facts: what all must have in common, by name.
      limit: seconds from the start of the first process on.

    Raises:
      StartupError: within `limit`, on every process that did start.
    """
    deadline = time.monotonic() + limit
    mine = _Answer(index, socket.gethostname(), {"number of processes": str(roll.count), **facts})
    problem = _call(roll, mine, deadline, limit) if index == 0 else _answer(roll, mine, deadline, limit)
    if problem:
        raise StartupError(f"roll call: {problem}")


def _answer(roll: Processes, mine: _Answer, deadline: float, limit: float) -> str:
    """A process other than 0: says what it runs, again if process 0 starts late or over; the problem, "" for none."""
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError, ValueError), socket.create_connection((roll.host, roll.port), min(left, GRACE)) as connection:
            _send(connection, {"index": mine.index, "host": mine.host, "facts": mine.facts, "left": left})
            connection.settimeout(left + GRACE)
            return _receive(connection)["problem"]
        time.sleep(RETRY)
    return _missing(roll, {mine.index: mine}, [0], limit)


def _call(roll: Processes, mine: _Answer, deadline: float, limit: float) -> str:
    """Process 0: hears all and tells all the problem, "" for none."""
    with contextlib.ExitStack() as opened, _listen(roll.port) as server:
        present = {0: mine}
        while not (problem := _problem(roll, present, limit, overdue=time.monotonic() > deadline)):
            if len(present) == roll.count:
                break
            server.settimeout(max(RETRY, min(1.0, deadline - time.monotonic())))
            try:
                connection = opened.enter_context(server.accept()[0])
                connection.settimeout(GRACE)
                said = _receive(connection)
                answer = _Answer(said["index"], said["host"], said["facts"], connection)
                deadline = min(deadline, time.monotonic() + said["left"])
            except (OSError, ValueError, KeyError, TypeError):  # nobody yet, or something else that knocks at ports
                continue
            present[answer.index if answer.index not in present else -1] = answer
        for answer in present.values():
            if answer.connection:
                with contextlib.suppress(OSError):
                    _send(answer.connection, {"problem": problem})
    return problem


def _problem(roll: Processes, present: dict[int, _Answer], limit: float, *, overdue: bool) -> str:
    """What is wrong so far, "" for nothing; who has gone meanwhile is no longer `present`."""
    for index in [index for index, answer in present.items() if answer.connection and _gone(answer.connection)]:
        del present[index]
    if twice := present.get(-1):
        if twice.index in present:
            return f"{present[twice.index]} and {twice} claim the same number; give each process its own"
        present[twice.index] = present.pop(-1)  # started over
    absent = sorted(set(range(roll.count)) - present.keys())
    if not absent or max(present) >= roll.count:
        return _differences(present)
    return _missing(roll, present, absent, limit) if overdue else ""


def _missing(roll: Processes, present: Mapping[int, _Answer], absent: Sequence[int], limit: float) -> str:
    names = [f"process {i} ({roll.names[i]})" if roll.names else f"process {i}" for i in absent]
    return (
        f"{', '.join(names)} of {roll.count} did not answer at {roll.host}:{roll.port} within {limit:g} s; there was "
        f"{', '.join(map(str, present.values()))}. Look at what the missing printed, and start all with the same command"
    )


def _differences(present: Mapping[int, _Answer]) -> str:
    """Who differs from the most common answer (process 0's among equals) and in what; "" if nobody does."""
    kinds = collections.Counter(json.dumps(answer.facts, sort_keys=True) for answer in present.values())
    usual = json.loads(max(kinds, key=kinds.get))
    reference = next(answer for answer in present.values() if answer.facts == usual)
    lines = []
    for answer in present.values():
        wrong = [name for name in sorted(usual.keys() | answer.facts.keys()) if usual.get(name) != answer.facts.get(name)]
        if wrong:
            listed = "; ".join(f"{name} is {answer.facts.get(name)}, not {usual.get(name)}" for name in wrong[:NAMED])
            more = f"; and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
            lines.append(f"{answer} differs from {reference}: {listed}{more}")
    return "\n  ".join([*lines, "give all hosts the same code, packages and command"]) if lines else ""


def _listen(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, backlog=1024, dualstack_ipv6=both)
    except OSError as error:
        raise StartupError(f"roll call: process 0 cannot listen at port {port} ({error}); is another run on this host?") from error


def _gone(connection: socket.socket) -> bool:
    """Whether the other side has closed; it sends nothing while it waits."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(GRACE)


def _send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket) -> dict[str, Any]:
    """Raises a ValueError if it is not one line of JSON."""
    with connection.makefile("rb") as lines:
        return json.loads(lines.readline(LONGEST_LINE))
