"""Will it fit, and how fast can it be? Compiles the training step for TPUs that are not there.

    python -m f2llm_jax.compile_check --config configs/stage2.py:size=14b --topology v5p:4x4x4
    python -m f2llm_jax.compile_check --config configs/stage2.py:size=0.6b --topology v5e:2x4 --slices 2 --teacher 1.7b --config.mesh.data=2

The step is the real one: optimizer, teacher, matryoshka, packing, chunks. Needs libtpu (`pip install -e '.[tpu]'`), no TPU.
"""

import os
import sys

from absl import app, flags
from ml_collections import config_flags

from f2llm_jax.command import command

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # with libtpu installed JAX would look for a TPU here

CONFIG = config_flags.DEFINE_config_file("config", None, "A configuration file, e.g. configs/stage2.py:size=14b.", lock_config=True)
TOPOLOGY = flags.DEFINE_string("topology", None, "Slice to compile for: v5e:2x4, v6e:4x4, v5p:4x4x4, tpu7x:2x2x1, ...")
SLICES = flags.DEFINE_integer("slices", 1, "Number of such slices; config.mesh.data goes across them.", lower_bound=1)
TEACHER = flags.DEFINE_string("teacher", "", "Size of the online teacher; none by default.")
TOKENS_PER_TEXT = flags.DEFINE_integer("tokens_per_text", 128, "Mean length of a text, for the number of chunks a step.", lower_bound=1)
SEARCH = flags.DEFINE_bool("search", False, "Find the largest batch.microbatch_rows that fits, by doubling.")
JSON = flags.DEFINE_string("json", None, "File to write the report to as JSON.")
flags.mark_flags_as_required(["config", "topology"])


@command("compile_check")
def main(argv: list[str]) -> int | None:
    """Compiles and prints; what does not fit, or an unknown slice, is one line on stderr and exit code 1."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; overrides are written --config.field=value")
    from f2llm_jax.compilation import check, table

    request = check.Request(CONFIG.value, TOPOLOGY.value, SLICES.value, TEACHER.value, TOKENS_PER_TEXT.value)
    found = check.search(request, lambda line: print(line, file=sys.stderr, flush=True)) if SEARCH.value else check.check(request)
    if JSON.value:
        table.write_json(found, JSON.value)
    print(table.describe(found))


if __name__ == "__main__":
    app.run(main)
