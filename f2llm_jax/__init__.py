"""Text-embedding models trained by the F2LLM-v2 recipe in JAX, from raw rows to a Hugging Face release."""

import importlib
import os
import signal
import sys
from types import ModuleType

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # run as a command: until `command.command` takes over, while packages are imported, Ctrl-C is one line too
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), os._exit(130)))


def __getattr__(name: str) -> ModuleType:
    """`f2llm_jax.api`, imported when it is first used: `import f2llm_jax` needs no JAX."""
    if name != "api":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("f2llm_jax.api")
