"""Fine-tuning a model on data of your own. What is left open here (0, or empty) is chosen by the model, the data and the devices.

  python -m f2llm_jax.finetune --model Qwen/Qwen3-Embedding-0.6B --data pairs.jsonl --out MODEL
or, where the data is prepared already:
  python -m f2llm_jax.main --config configs/finetune.py --workdir RUN --config.init=Qwen/Qwen3-Embedding-0.6B --config.data.folder=DATA

How the open fields are chosen is said in f2llm_jax/training/automatic.py; `config.json` in the workdir has what was chosen. Everything
else is stage 2 of the recipe.
"""

import ml_collections

from f2llm_jax.configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Takes no arguments; `config.init` and `config.data.folder` are to be given."""
    common.parse_arg(arg)
    config = common.base("0.6b", runlocal=False, stage=2)
    config.size = ""  # that of init
    config.epochs = 3
    config.dtype = ""  # bfloat16, on a CPU float32
    config.remat = ""  # by the memory of the devices
    config.batch.size = 0  # at most 512, and so that the run has a hundred updates
    config.batch.max_length = 0  # no text is truncated beyond what preparation did
    config.batch.row_tokens = 0  # as the longest text needs
    config.batch.row_parts = 1
    config.batch.microbatch_rows = config.batch.chunk_rows = 0  # by the memory of the devices
    config.objective.mask_false_negatives = True  # own data often has the same passage for several queries
    config.optimizer.learning_rate = 0.0  # published, by the number of parameters
    config.eval.update({"every": 0, "batches": 16})  # a tenth of the run
    config.checkpoint.update({"every": 0, "keep": 1, "merge_last": 0})  # a tenth of the run
    return config
