"""The versions of JAX that this release is tested with, for the modules that use what JAX does not promise to keep.

These are `training.cluster` (who the processes of a cluster are), `model.splash` (the TPU kernel), `compilation.collectives` (the text of a
compiled program) and `compilation.cost` (what rematerialisation leaves in a traced one). Each warns on a newer JAX; training goes on.
"""

import functools
import re
import warnings

import jax

LAST_TESTED = (0, 12)


class UntestedJaxWarning(UserWarning):
    """JAX is newer than what this release is tested with, and the module that the message names may no longer fit it."""


@functools.cache  # once a process and module
def warn_if_newer(module: str, consequence: str) -> None:
    """Warns that `module` was never run with this JAX, and what may come of it, if JAX is newer than `LAST_TESTED`."""
    if version() > LAST_TESTED:
        tested = ".".join(map(str, LAST_TESTED))
        warnings.warn(
            f"JAX {jax.__version__} is newer than {tested}, the last that {module} was tested with: {consequence}",
            UntestedJaxWarning,
            stacklevel=3,
        )


def version() -> tuple[int, int]:
    """Major and minor version of the installed JAX."""
    major, minor = re.findall(r"\d+", jax.__version__)[:2]
    return int(major), int(minor)
