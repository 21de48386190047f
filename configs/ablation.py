"""Does a pruned start help, and does a teacher? The paper's table 4 in small, and a random start to compare with.

python -m f2llm_jax.prepare --raw RAW --tokenizer TOKENIZER --out DATA --max-length 64
python -m f2llm_jax.ablation --root RUNS --config.data=DATA
python -m f2llm_jax.ablation --root RUNS --config configs/ablation.py:choices --config.data=DATA    how to choose channels
"""

import ml_collections

from f2llm_jax.configs import common

# Starts by the flags of f2llm_jax.prune that make them; those of "random" are none.
STARTS = {"random": (), "pruned": ()}
CHOICES = {
    "pruned": (),
    "mean-abs": ("--hidden-by", "mean-abs", "--ffn-by", "mean-abs"),
    "first": ("--hidden-by", "first", "--ffn-by", "first"),
    "first-l2": ("--hidden-by", "first", "--ffn-by", "l2"),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`choices`: pruned starts chosen in several ways instead of pruned against random."""
    chosen = common.parse_arg(arg, choices=False)
    config = ml_collections.ConfigDict()
    config.name = "choices" if chosen.choices else "starts"  # of table and picture; sweeps in one folder share what they share
    config.data = ""  # prepared dataset, of stage 2
    config.train_config = "configs/stage2.py:runlocal"  # of every training
    config.max_length = 64  # tokens of a text and of a packed row
    config.source_size = "toy-0.6b"  # of what is pruned
    config.source_steps = 600
    config.teacher_steps = 1500  # that the teacher has more; one that is not well ahead of its students holds them back (docs/log.md)
    config.target = "toy-160m"  # a size by name, because a random start needs one
    config.calibration_rows = 512
    config.starts = ml_collections.ConfigDict(CHOICES if chosen.choices else STARTS)
    config.distilled = (True,) if chosen.choices else (False, True)
    config.seeds = (0, 1, 2)
    config.steps = 200  # of every arm
    # Of every training. Raw embeddings, which the paper follows, take a narrow student more steps to follow than it has here.
    config.train_flags = ("--config.batch.size=128", "--config.objective.distillation=scores")
    return config
