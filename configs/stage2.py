"""Stage 2: all task kinds with instructions, distilled from the next larger sibling up to 1.7B (paper, sections 3.2, 3.3).

On a TPU VM:
  python -m f2llm_jax.prepare --raw RAW --tokenizer Qwen3-0.6B/ --out DATA --stage 2
  python -m f2llm_jax.main --config configs/stage2.py:size=0.6b --workdir gs://BUCKET/stage2-0.6b \\
    --config.init=gs://BUCKET/stage1-0.6b --config.teacher=gs://BUCKET/stage2-1.7b --config.data.folder=DATA
On a laptop, on the corpus that comes with the code (minutes, no download):
  python -m f2llm_jax.main --config configs/stage2.py:runlocal --workdir /tmp/stage2 --config.init=/tmp/stage1
"""

import ml_collections

from f2llm_jax.configs import common

STAGE = 2


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`size=...` (all eight), `runlocal` and `recipe=published` (see docs/recipe.md)."""
    chosen = common.parse_arg(arg, size="0.6b", runlocal=False, recipe="")
    return common.base(chosen.size, chosen.runlocal, STAGE, chosen.recipe)
