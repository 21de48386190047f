"""The commands that make the family of models, from the chain that `configs/family.py` writes down."""

import ml_collections
from etils import epath

from f2llm_jax.chain.links import Link


def family_links(config: ml_collections.ConfigDict, root: epath.PathLike) -> list[Link]:
    """Data, then every model of `config.models` in its order, then a release of each that is to be released.

    Args:
      config: see configs/family.py.
      root: folder of the chain; commands name what they read and write by it.
    """
    root = epath.Path(root)
    corpus = [] if config.raw else [Link("corpus", "f2llm_jax.demo_data", ("--out", f"{root}/corpus"))]
    data = [_prepared(config, root, stage) for stage in sorted({model.stage for model in config.models})]
    made = {model.name for model in config.models}
    models = [(_pruned if "target" in model else _trained)(config, root, model, made) for model in config.models]
    releases = [
        Link(f"release-{model.size}", "f2llm_jax.convert", ("to-hf", f"{root}/{model.name}", f"{root}/release-{model.size}"), (model.name,))
        for model in config.models
        if model.get("release", False)
    ]
    return corpus + data + models + releases


def _prepared(config: ml_collections.ConfigDict, root: epath.Path, stage: int) -> Link:
    raw, tokenizer = (config.raw, config.tokenizer) if config.raw else (f"{root}/corpus/raw", f"{root}/corpus/tokenizer")
    name = f"data{stage}"
    arguments = ("--raw", raw, "--tokenizer", tokenizer, "--out", f"{root}/{name}", "--stage", str(stage), *config.prepare_flags)
    return Link(name, "f2llm_jax.prepare", arguments, (raw, tokenizer) if config.raw else ("corpus",))


def _trained(config: ml_collections.ConfigDict, root: epath.Path, model: ml_collections.ConfigDict, made: set[str]) -> Link:
    place = lambda name: f"{root}/{name}" if name in made else name  # noqa: E731
    settings = {
        "size": config.size_prefix + model.size,
        "init": place(model.init),
        "teacher": place(model.teacher),
        "optimizer.learning_rate": model.learning_rate,
        "epochs": model.epochs,
        "data.folder": f"{root}/data{model.stage}",
    }
    overrides = tuple(f"--config.{name}={value}" for name, value in settings.items() if value != "")
    arguments = (
        "--config",
        f"configs/stage{model.stage}.py:{config.stage_argument.format(size=model.size)}",
        "--workdir",
        place(model.name),
    )
    needs = (f"data{model.stage}", *filter(None, (model.init, model.teacher)))
    return Link(model.name, "f2llm_jax.main", (*arguments, *overrides, *config.train_flags), needs, whole=False)


def _pruned(config: ml_collections.ConfigDict, root: epath.Path, model: ml_collections.ConfigDict, made: set[str]) -> Link:
    del made
    data = f"data{model.stage}"
    flags = {
        "--model": f"{root}/{model.init}",
        "--target": config.size_prefix + model.target,
        "--data": f"{root}/{data}",
        "--calibration-rows": str(config.calibration_rows),
        "--out": f"{root}/{model.name}",
    }
    return Link(model.name, "f2llm_jax.prune", tuple(part for flag in flags.items() for part in flag), (model.init, data))
