"""How every command ends: the one place that turns exceptions into a line on stderr and an exit code.

    0     done
    1     the user's to fix: a `UserError`, a file that the operating system refused, an extra that is not installed
    75    stopped on SIGTERM with everything saved; the same command resumes (`EX_TEMPFAIL`)
    130   Ctrl-C

Anything else is a bug, here or in a library, and keeps its traceback.
"""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

from f2llm_jax.errors import Preempted, UserError

Arguments = ParamSpec("Arguments")
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again
INTERRUPTED = 130  # 128 + SIGINT, as shells count
# The extra of pyproject.toml that brings an optional package.
EXTRAS = {
    "apache_beam": "prepare",
    "babel": "demo",
    "gcsfs": "gcs",
    "matplotlib": "report",
    "mteb": "eval",
    "sentence_transformers": "eval",
    "torch": "eval",
    "transformers": "eval",
}


def command(name: str) -> Callable[[Callable[Arguments, int | None]], Callable[Arguments, int]]:
    """Decorates the `main` of the command `name`; the decorated function returns the exit code."""

    def decorate(main: Callable[Arguments, int | None]) -> Callable[Arguments, int]:
        @functools.wraps(main)
        def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> int:
            try:
                return main(*args, **kwargs) or 0
            except Preempted as notice:
                print(f"{name}: {notice}", file=sys.stderr)
                return STOPPED
            except KeyboardInterrupt:
                print(f"{name}: interrupted", file=sys.stderr)
                return INTERRUPTED
            except (UserError, OSError, ModuleNotFoundError) as error:
                if isinstance(error, ModuleNotFoundError) and _package(error) not in EXTRAS:
                    raise
                print(f"{name}: error: {_describe(error)}", file=sys.stderr)
                return 1

        return run

    return decorate


def _package(error: ModuleNotFoundError) -> str:
    return (error.name or "").partition(".")[0]


def _describe(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{_package(error)} is not installed; run: pip install 'f2llm-jax[{EXTRAS[_package(error)]}]'"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        files = " -> ".join(str(file) for file in (error.filename, error.filename2) if file is not None)
        return f"{files}: {error.strerror}"
    return str(error)
