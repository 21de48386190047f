"""One line for machines that this package cannot be installed on, where pip alone would try one release after the other and give up."""

import platform
import sys

from setuptools import setup

if sys.version_info < (3, 11):  # noqa: UP036 - this is what says so
    sys.exit(f"f2llm_jax needs Python 3.11 or newer, this is {platform.python_version()}: python3.12 -m pip install ...")
if sys.platform == "win32" or (sys.platform, platform.machine()) == ("darwin", "x86_64"):
    sys.exit(
        "f2llm_jax runs on Linux and on Macs with Apple silicon; array_record and Grain have no wheels here: use WSL or a Linux machine"
    )
setup()
