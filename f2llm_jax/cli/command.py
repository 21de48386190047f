"""How every command ends: the one place that turns exceptions into a line on stderr and an exit code.

    0     done
    1     the user's to fix: a `UserError`, a file that the operating system refused, an extra that is not installed
    75    stopped on SIGTERM with everything saved; the same command resumes (`EX_TEMPFAIL`)
    76    training hung, and its watchdog ended it; the same command resumes
    130   Ctrl-C
    141   whoever read the output, such as `head`, has closed it

Anything else is a bug, here or in a library, and keeps its traceback.
"""

import contextlib
import errno
import functools
import os
import pathlib
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import ParamSpec

from f2llm_jax.errors import Preempted, UserError

CommandArguments = ParamSpec("CommandArguments")
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again
INTERRUPTED = 130  # 128 + SIGINT, as shells count
UNREAD = 141  # 128 + SIGPIPE
_SPACE = "; free space there or choose another folder, and run the same command again"
_RIGHTS = "; choose a folder that you may write to, or change its permissions"
# What a system refuses with, and the remedy.
REFUSED = {errno.ENOSPC: _SPACE, errno.EDQUOT: _SPACE, errno.EACCES: _RIGHTS, errno.EPERM: _RIGHTS, errno.EROFS: _RIGHTS}
_running = pathlib.Path(sys.argv[0]).name  # outside of a command: a script, a test
# The extra of pyproject.toml that brings an optional package.
EXTRAS = {
    "apache_beam": "prepare",
    "babel": "demo",
    "gcsfs": "gcs",
    "matplotlib": "report",
    "mlflow": "mlflow",
    "mteb": "eval",
    "sentence_transformers": "eval",
    "torch": "eval",
    "trackio": "trackio",
    "transformers": "eval",
    "wandb": "wandb",
}


def command(name: str) -> Callable[[Callable[CommandArguments, int | None]], Callable[CommandArguments, int]]:
    """Decorates the `main` of the command `name`; the decorated function returns the exit code."""

    def decorate(main: Callable[CommandArguments, int | None]) -> Callable[CommandArguments, int]:
        @functools.wraps(main)
        def run(*args: CommandArguments.args, **kwargs: CommandArguments.kwargs) -> int:
            global _running
            _running = name
            try:
                with _ctrl_c(name) as interrupted:
                    try:
                        return main(*args, **kwargs) or 0
                    finally:
                        print(end="", flush=True)
            except Preempted as notice:
                print(f"{name}: {notice}", file=sys.stderr)
                return STOPPED
            except BaseException as error:
                if isinstance(error, BrokenPipeError) and _unread():
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes when it ends
                    return UNREAD
                if isinstance(error, KeyboardInterrupt) or (interrupted and isinstance(error, Exception)):
                    print(f"{name}: interrupted; the same command starts again or resumes", file=sys.stderr)
                    return INTERRUPTED
                if not (line := _describe(error)):
                    raise
                print(f"{name}: error: {line}", file=sys.stderr)
                return 1

        return run

    return decorate


def running() -> str:
    """The name of the command that runs, for locks and markers."""
    return _running


@contextlib.contextmanager
def _ctrl_c(name: str) -> Iterator[list[int]]:
    """Gives the list of interrupts so far. A library that swallows the first does not matter: the second ends the process at once."""
    asked: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            asked.append(number)
        if len(asked) > 1:
            os.write(2, f"{name}: interrupted twice: ended at once\n".encode())
            os._exit(INTERRUPTED)
        if _imports(frame):  # a C extension prints what is raised while it is imported: ask again when it has been
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            return
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGALRM)}
    try:
        yield asked
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _unread() -> bool:
    """Whether nobody reads standard output any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _imports(frame: FrameType | None) -> bool:
    """Whether the code at `frame` runs because a module is being imported."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _package(error: ModuleNotFoundError) -> str:
    return (error.name or "").partition(".")[0]


def _describe(error: BaseException) -> str:
    """The line for an error that is the user's to fix, "" for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and _package(error) in EXTRAS:
        return f"{_package(error)} is not installed; run: pip install 'f2llm-jax[{EXTRAS[_package(error)]}]'"
    # Orbax, Beam and ArrayRecord put the system's words into exceptions of their own.
    refused = next((number for number in REFUSED if os.strerror(number) in str(error)), None)
    if isinstance(error, OSError):
        refused = refused or error.errno
        if error.filename is not None and error.strerror:
            files = " -> ".join(str(file) for file in (error.filename, error.filename2) if file is not None)
            return f"{files}: {error.strerror}{REFUSED.get(refused or 0, '')}"
    elif refused is None or not isinstance(error, Exception):
        return ""
    return f"{str(error).splitlines()[0]}{REFUSED.get(refused or 0, '')}"
