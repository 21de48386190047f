"""ML-Embed (arXiv 2605.15081): widths, depths and the rank of the embedding table, as its released configuration trains them.

The rank is 512 in every step: the released `config.json` leaves `use_mel` out, so that no smaller one is drawn.
`--config.table_rank_sampled=True` draws them, as the paper describes.

  python -m f2llm_jax.prepare --raw RAW --tokenizer Qwen3-0.6B/ --out DATA --stage 2 --catalogue ml_embed --cap 100000
  python -m f2llm_jax.main --config configs/ml_embed.py:size=0.6b --workdir RUNS/ml-embed \\
    --config.init=RUNS/stage1 --config.data.folder=DATA
"""

import ml_collections

from f2llm_jax.configs import common

STAGE = 2


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`size=...` (all eight), `runlocal` and `recipe=published` (see docs/recipe.md)."""
    arg = common.parse_arg(arg, size="0.6b", runlocal=False, recipe="")
    config = common.base(arg.size, arg.runlocal, STAGE, arg.recipe)
    config.table_rank = 64 if arg.runlocal else 512
    config.table_rank_sampled = False
    config.objective.layer_matryoshka = True
    config.optimizer.warmup_steps = 20 if arg.runlocal else 100
    return config
