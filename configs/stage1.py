"""Stage 1: weakly supervised retrieval pairs without instructions (paper, section 3.2).

On a TPU VM:
  python -m f2llm_jax.prepare --raw RAW --tokenizer Qwen3-0.6B/ --out DATA --stage 1
  python -m f2llm_jax.main --config configs/stage1.py:size=0.6b --workdir gs://BUCKET/stage1-0.6b \\
    --config.init=Qwen/Qwen3-0.6B --config.data.folder=DATA
On a laptop, on the corpus that comes with the code (minutes, no download):
  python -m f2llm_jax.main --config configs/stage1.py:runlocal --workdir /tmp/stage1
"""

import ml_collections

from f2llm_jax.configs import common

STAGE = 1


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`size=...` (0.6b to 14b; smaller models are pruned after stage 1), `runlocal` and `recipe=published` (see docs/recipe.md)."""
    chosen = common.parse_arg(arg, size="0.6b", runlocal=False, recipe="")
    return common.base(chosen.size, chosen.runlocal, STAGE, chosen.recipe)
