"""Text-embedding models trained by the F2LLM-v2 recipe in JAX, from raw rows to a Hugging Face release."""

import os
import signal
import sys

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # run as a command: until `command.command` takes over, while packages are imported, Ctrl-C is one line too
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), os._exit(130)))
