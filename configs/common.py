"""What stage 1 and stage 2 share: every field of a run, with its unit, at the published value.

A configuration file is a program: `--config configs/stage2.py:size=0.6b,runlocal` passes an argument to its `get_config`,
`--config.optimizer.learning_rate=1e-5` overrides a field. An unknown argument or field fails with the nearest valid name.
"""

import difflib

import ml_collections

from f2llm_jax.errors import UserError

# Peak learning rate and epochs by size (paper, table 1; it does not tell the stages apart).
LEARNING_RATE = {"80m": 4e-5, "160m": 3e-5, "330m": 2e-5, "0.6b": 1e-5, "1.7b": 9e-6, "4b": 7e-6, "8b": 6e-6, "14b": 5e-6}
EPOCHS = {"80m": 4, "160m": 3, "330m": 3, "0.6b": 2, "1.7b": 2, "4b": 2, "8b": 2, "14b": 2}

# The slice that compile_check finds each size to fit in with room to spare (launch/README.md).
SLICE = {"80m": "v5e:2x4", "160m": "v5e:2x4", "330m": "v5e:2x4", "0.6b": "v5e:2x4", "1.7b": "v5e:4x4"}
SLICE |= {"4b": "v5e:8x8", "8b": "v6e:8x8", "14b": "v5p:4x4x4"}
# Size of the mesh's fsdp axis; -1 for all devices. XLA makes an all-reduce of each layer's gather if those are 64.
FSDP = {"1.7b": 16, "4b": 16, "8b": 16, "14b": 16}
# Packed rows on such a slice together: a step of the published data has 50 to 1,250, and one that fits is encoded once.
MICROBATCH_ROWS = {"80m": 1280, "160m": 1280, "330m": 1280, "0.6b": 1280, "1.7b": 1248, "4b": 1280, "8b": 1280, "14b": 1280}
# Of these in a layer together: fewer leave fewer rows empty, more make better use of a chip.
CHUNK_ROWS = {"80m": 32, "160m": 32, "330m": 32, "0.6b": 32, "1.7b": 32, "4b": 64, "8b": 64, "14b": 64}
# What the backward pass recomputes, where it is not all of a layer: what leaves a tenth of the memory free and is faster.
REMAT = {"14b": "attention"}


def parse_arg(arg: str | None, **defaults: str | bool) -> ml_collections.ConfigDict:
    """Parses `size=0.6b,runlocal` into the types of `defaults`; a bare name of a bool means True.

    Raises:
      ValueError: an unknown name; the message offers the nearest one.
    """
    values = dict(defaults)
    for part in (arg or "").split(","):
        name, _, value = part.partition("=")
        if not name:
            continue
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(defaults)}"
            raise UserError(f"unknown configuration argument {name!r}; {hint}")
        values[name] = value.lower() not in ("0", "false", "no") if isinstance(defaults[name], bool) else value
    return ml_collections.ConfigDict(values)


# Where the default differs from the published code by choice (docs/recipe.md). `prepare --recipe published` does the same for data.
PUBLISHED = {
    "data.order": "published",
    "batch.tail": "repeated",
    "batch.single_negative": "first",
    "objective.in_batch_passage_grad": "none",
    "objective.loss_dtype": "bfloat16",
    "checkpoint.every": 5000,
}


def base(size: str, runlocal: bool, stage: int, recipe: str = "") -> ml_collections.ConfigDict:
    """Every field of a run, for one of the eight sizes or, with `runlocal`, for a toy on a laptop; `recipe` is "" or "published".

    A run that was saved before a field was added resumes as if it had had the default: that of a new field is what the code did before.

    Raises:
      UserError: there is no such size or recipe.
    """
    if recipe not in ("", "published"):
        raise UserError(
            f"unknown recipe {recipe!r}; recipe=published takes every choice of the published code, without it the defaults are ours"
        )
    if size not in LEARNING_RATE:
        raise UserError(f"unknown size {size!r}; there are: {', '.join(LEARNING_RATE)}")
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.size = size  # a row of f2llm_jax/model/sizes.py
    config.init = ""  # weights to start from: HF folder, Hub id, workdir or checkpoint; empty for random
    config.table_rank = 0  # train the embedding table as two factors of this rank (ML-Embed); 0 for one table
    config.table_rank_sampled = True  # draw a rank up to it for each step, so that any prefix of the factors serves; else always all of it
    config.teacher = ""  # model to distil from, named like init; empty for none
    config.teacher_cache = ""  # folder of cached teacher vectors to distil from instead (f2llm_jax.cache_teacher); several with commas
    config.epochs = EPOCHS[size]
    config.steps = 0  # updates; 0 means `epochs` epochs
    config.dtype = "bfloat16"  # compute dtype; parameters and optimizer state are float32
    config.remat = REMAT.get(size, "full")  # what the backward pass recomputes, of least to most: none, dots, attention or full
    config.attention = "auto"  # kernel: xla, splash (TPU), cudnn (GPU), or the best that serves the devices
    config.hang_minutes = 10.0  # of an update (or 20 median ones) after which the process ends itself, to be run again; 0 for never
    config.max_skipped_steps = 20  # in a row, without a finite loss and gradient, before the run gives up
    config.log_every = 20  # steps over which losses are averaged by source; between progress lines where there is no terminal
    config.loggers = ("tensorboard",)  # where metrics go besides the workdir's files: tensorboard, wandb, mlflow, trackio

    fsdp = FSDP.get(size, -1)
    config.mesh = ml_collections.ConfigDict({"data": 1 if fsdp == -1 else -1, "fsdp": fsdp, "tensor": 1})  # -1 fills up

    config.data = ml_collections.ConfigDict()
    config.data.folder = ""  # made by f2llm_jax.prepare
    config.data.embedded_stage = 0  # where no folder is given: make the embedded corpus for this stage; 0 for never
    config.data.order = "uniform"  # of an epoch's batches; "published" draws sources by their initial sizes until they are exhausted
    config.data.temperature = 1.0  # of the sources' shares of an epoch; below 1 small sources have more, at 0 all have the same
    config.data.weights = ""  # "squad=2,paracrawl=0.5": relative weights of sources or units; no row is repeated for it
    config.data.repeats = ""  # "squad=3": most times that an epoch goes over a source
    config.data.starts = ""  # "squad=0.5": epochs after which a source is first drawn
    config.data.copy_to = ""  # folder on each host for copies of gs:// data and gs:// teacher vectors; empty for ~/.cache/f2llm_jax
    config.data.threads = 2  # that read and pack
    config.data.ahead = 4  # steps read before they are needed

    config.batch = ml_collections.ConfigDict()
    config.batch.size = 512  # samples a step over all devices; the pool of in-batch negatives
    config.batch.max_length = 1024  # tokens of a text, EOS included
    config.batch.row_tokens = 1024  # tokens of a packed row
    config.batch.row_texts = 128  # most texts in a packed row
    config.batch.microbatch_rows = MICROBATCH_ROWS[size]  # kept together; of a step with more, the others are encoded twice
    config.batch.row_parts = 2  # rows are split into so many where their texts allow: less attention is computed
    config.batch.chunk_rows = CHUNK_ROWS[size]  # of these in a layer at once, about; 0 for all
    config.batch.negatives = ml_collections.ConfigDict({"retrieval": 7, "clustering": 9, "classification": 1})  # drawn of those stored
    config.batch.negatives_per_sample = "batch"  # one draw of negative columns a "batch" (published) or a "row"
    config.batch.single_negative = "random"  # where one is drawn of several; "first" for always negative_1 (published)
    config.batch.tail = "masked"  # what fills a source's last batch; "repeated" takes its first rows again (published)

    config.objective = ml_collections.ConfigDict()
    config.objective.temperature = 0.05
    config.objective.matryoshka = True  # in both stages
    config.objective.matryoshka_minimum = 8  # smallest width; larger ones are powers of two, and the full width
    config.objective.matryoshka_dims = ()  # widths of your own, ascending, instead
    config.objective.matryoshka_weights = ()  # one a width; empty for the published 1 / (n sqrt(D / d))
    config.objective.layer_matryoshka = False  # also train depths 1, 2, 4, 8, 16, ... to serve alone (ML-Embed)
    config.objective.in_batch_pool = "positives"  # or "positives_and_negatives": everybody's hard negatives too
    config.objective.hard_weight = 1.0  # of the softmax over own negatives next to that over the batch; 0 leaves them to the pool
    config.objective.in_batch_passage_grad = "full"  # "none" is what the published multi-GPU trainer computes
    config.objective.loss_dtype = "float32"  # of cosines and logits; "bfloat16" rounds them as the published trainer does
    config.objective.positives = "own"  # what another row's positive of the same query is: a negative, "masked", or "joint" with the own
    config.objective.mask_false_negatives = False  # leave out candidates whose text is the positive's
    config.objective.false_negative_margin = float("inf")  # leave out candidates nearer than the positive by more than this cosine
    config.objective.guide = ""  # "absolute" or "relative": leave out candidates that the teacher finds nearer than the positive, less
    config.objective.guide_margin = 0.0  # a cosine, or a share of the positive's
    config.objective.query_negatives = False  # other queries are negatives of a query too
    config.objective.document_negatives = False  # other documents are negatives of a positive too
    config.objective.hardness = 0.0  # own hard negatives weigh exp(hardness * cosine); EmbeddingGemma takes 5
    config.objective.focal = 0.0  # losses are multiplied by (1 - p) ** focal; KaLM-Embedding-V2 takes 0.5
    config.objective.distillation = "mse"  # of raw embeddings (published), or "cosine", or "scores"
    config.objective.distillation_weight = 1.0  # used if there is a teacher
    config.objective.distillation_matryoshka = False  # follow at every trained width, not at the full one alone
    config.objective.projection = False  # compare in the teacher's space, through a linear map that is trained along
    config.objective.teacher_weights = ()  # one for each of several teachers; empty for equal parts
    config.objective.scores = "kl"  # how scores of rows are learned from, or "margin_mse"
    config.objective.scores_weight = 0.0  # of that term
    config.objective.scores_temperature = 1.0  # scores are divided by it, as cosines are by `temperature`
    config.objective.graded = "cosent"  # how pairs with a score of their likeness are learned from, or "angle"
    config.objective.graded_weight = 1.0  # of that term, which sources of the kind "graded" alone have
    config.objective.spread_out_weight = 0.0  # of the spread-out regulariser (EmbeddingGemma)

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.learning_rate = LEARNING_RATE[size]
    config.optimizer.warmup_steps = 500  # published; a run of less than 5,000 updates warms up for a share of them instead:
    config.optimizer.warmup_share = 0.1  # most of a run that is warm-up; 1 takes `warmup_steps` as they are
    config.optimizer.schedule = "cosine"  # after the warm-up, or "linear" or "constant_with_warmup"
    config.optimizer.min_learning_rate = 1e-7
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.98
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0

    config.profile = ml_collections.ConfigDict({"start": 0, "steps": 0})  # updates to trace for xprof, in workdir/profile; 0 steps for none
    config.eval = ml_collections.ConfigDict({"every": 1000, "batches": 64})  # steps between; batches over all sources: 2% of the time
    config.checkpoint = ml_collections.ConfigDict({"every": 1000, "keep": 3})  # steps between; how many of the last stay
    config.checkpoint.minutes = 10.0  # after which a checkpoint is made that the next one replaces; 0 for never
    config.checkpoint.keep_every = 0  # steps between checkpoints that stay for good; 0 for none
    config.checkpoint.merge_last = 5  # how many checkpoints of the last steps stay for f2llm_jax.merge; 0 for none
    config.checkpoint.merge_every = 500  # steps between these
    config.checkpoint.best = ""  # also keep the best by this metric of a validation, as "validation/accuracy"; empty for none
    if recipe:
        config.update_from_flattened_dict(PUBLISHED)
    return _runlocal(config, stage) if runlocal else config


def _runlocal(config: ml_collections.ConfigDict, stage: int) -> ml_collections.ConfigDict:
    """The same run in small: a toy decoder from random weights, minutes on two cores."""
    config.size = "toy"
    config.mesh.update({"data": 1, "fsdp": -1})
    config.data.embedded_stage = stage
    config.dtype = "float32"
    config.epochs = 1
    config.remat = "dots"
    config.batch.update(
        {"size": 256, "max_length": 64, "row_tokens": 64, "row_texts": 32, "microbatch_rows": 96, "chunk_rows": 16, "row_parts": 1}
    )
    config.batch.negatives.update({"retrieval": 1, "clustering": 3})  # a small model learns more from more samples
    config.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 20, "warmup_share": 1.0, "min_learning_rate": 1e-5})
    config.eval.update({"every": 100, "batches": 8})
    config.checkpoint.update({"every": 50, "minutes": 0.0})
    return config
