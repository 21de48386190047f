"""The chain of models from 14B to 80M (paper, sections 3.1 to 3.3, table 1), as data.

Five sizes are trained in stage 1, from Qwen3. The three smallest are pruned from the stage-1 0.6B and see stage 2 only. In stage
2 every size up to 1.7B is distilled from the next larger one (the three smallest all from 0.6B), hence the order.

    python -m f2llm_jax.family --root gs://BUCKET/family --config.raw=RAW --config.tokenizer=Qwen3-0.6B/    what is to be done
    python -m f2llm_jax.family --root /tmp/family --config configs/family.py:toy --run                      all of it, in small
"""

import ml_collections

from f2llm_jax.configs import common

TEACHERS = {"80m": "0.6b", "160m": "0.6b", "330m": "0.6b", "0.6b": "1.7b", "1.7b": "4b"}  # paper, table 1
LARGE = ("14b", "8b", "4b", "1.7b", "0.6b")
PRUNED = ("330m", "160m", "80m")
TOY_STEPS = 6


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """`toy`: every size at a sixteenth of its width, a few steps each, on the embedded corpus."""
    toy = common.parse_arg(arg, toy=False).toy
    config = ml_collections.ConfigDict()
    config.raw = ""  # raw files of both stages; empty for the embedded corpus
    config.tokenizer = ""  # of Qwen3; with `raw`
    config.calibration_rows = 1024  # of the stage-2 data, on which the pruned models go on; the paper says "a small set"
    config.models = _models(toy)
    config.size_prefix = "toy-" if toy else ""
    config.stage_argument = "size={size},runlocal" if toy else "size={size}"
    config.prepare_flags = ("--max-length", "64") if toy else ()
    config.train_flags = ()  # for every training, as in ("--config.mesh.tensor=4",)
    if toy:
        config.calibration_rows = 64
        settings: dict[str, int | str] = {
            "steps": TOY_STEPS,
            "batch.size": 32,
            "batch.microbatch_rows": 16,
            "eval.every": 1000,
            "eval.batches": 1,
        }
        settings |= {"optimizer.warmup_steps": 2}
        config.train_flags = tuple(f"--config.{name}={value}" for name, value in settings.items())
    return config


def _models(toy: bool) -> tuple[ml_collections.ConfigDict, ...]:
    """In an order in which everything is there before it is needed."""
    stage1 = [_trained(1, size, "" if toy else f"Qwen/Qwen3-{size.upper()}", toy) for size in LARGE]
    pruned = [ml_collections.ConfigDict({"name": f"pruned-{size}", "stage": 2, "target": size, "init": "stage1-0.6b"}) for size in PRUNED]
    stage2 = [_trained(2, size, f"stage1-{size}", toy) for size in LARGE] + [_trained(2, size, f"pruned-{size}", toy) for size in PRUNED]
    return (*stage1, *pruned, *stage2)


def _trained(stage: int, size: str, init: str, toy: bool) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "name": f"stage{stage}-{size}",
            "stage": stage,  # whose data and configuration
            "size": size,
            "init": init,  # another of the chain by name, or anything `--config.init` takes
            "teacher": f"stage2-{TEACHERS[size]}" if stage == 2 and size in TEACHERS else "",
            "learning_rate": 2e-3 if toy else common.LEARNING_RATE[size],
            "epochs": common.EPOCHS[size],
            "release": stage == 2,
        }
    )
