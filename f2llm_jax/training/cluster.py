"""Who the processes of a TPU pod, a GKE or a Slurm job are, by JAX's own detection.

JAX detects clusters for `jax.distributed.initialize` only, and nothing public tells what it found before it connects. This private part
is known from 0.10 to 0.12. Where a newer JAX has it no longer, processes are named by flags.
"""

import os
from collections.abc import Callable

from f2llm_jax.errors import UserError
from f2llm_jax.jax_version import warn_if_newer

Found = tuple[str | None, int | None, int | None]
# Variables by which the launchers that JAX knows tell a process that it is not alone.
_SEVERAL: dict[str, Callable[[str], int]] = {
    "SLURM_NTASKS": int,
    "OMPI_COMM_WORLD_SIZE": int,
    "TPU_WORKER_HOSTNAMES": lambda value: len(value.split(",")),
}


def detect(coordinator_address: str | None, num_processes: int | None, process_id: int | None, limit: int) -> Found:
    """What is given, and the rest as JAX detects it within `limit` seconds; None for what it does not know.

    Raises:
      RuntimeError: the name of process 0's host means nothing yet.
      UserError: this JAX cannot be asked, and the environment says that there are several processes.
    """
    warn_if_newer(__name__, "if processes do not find one another, pass --coordinator_address, --num_processes and --process_id")
    given = (coordinator_address, num_processes, process_id)
    try:
        from jax._src.clusters import ClusterEnv

        found = ClusterEnv.auto_detect_unset_distributed_params(*given, None, None, limit)
    except (ImportError, AttributeError, TypeError) as error:
        if several := [name for name, count in _SEVERAL.items() if count(os.environ.get(name) or "1") > 1]:
            raise UserError(
                f"{several[0]} says that there are several processes, and this JAX does not tell which one this is ({error}); "
                "pass --coordinator_address, --num_processes and --process_id"
            ) from error
        return given
    return found[0], found[1], found[2]
