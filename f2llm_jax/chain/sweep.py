"""An ablation: the same training from several starts, with and without a teacher, with several seeds; its table and picture.

As in the paper, what is pruned is a model of a first training and the teacher the same model after a second one. (A teacher that is
no further than what was pruned holds its students back: see docs/log.md.)
"""

import dataclasses
import io
import itertools
import json
from collections.abc import Callable, Sequence

import ml_collections
import numpy as np
from etils import epath
from matplotlib.figure import Figure

from f2llm_jax.chain.links import Link, run
from f2llm_jax.data.records import Dataset, load_dataset
from f2llm_jax.evaluation.held_out import accuracies
from f2llm_jax.inference.encode import load_encoder
from f2llm_jax.model.sizes import SIZES
from f2llm_jax.storage.files import read_json, write_bytes, write_json, write_text
from f2llm_jax.weights.models import find_model

SOURCE, TEACHER, CACHE = "source", "teacher", "teacher-vectors"
RANDOM = "random"


@dataclasses.dataclass(frozen=True)
class Arm:
    """One training of the sweep: from which start, distilled or not, with which seed."""

    start: str
    distilled: bool
    seed: int

    @property
    def name(self) -> str:
        """Of its workdir."""
        return f"{self.start}-{'distilled' if self.distilled else 'plain'}-{self.seed}"


@dataclasses.dataclass(frozen=True)
class ArmScore:
    """Of one model on held-out rows.

    Attributes:
      accuracy: mean over sources of `evaluation.held_out.accuracies`.
      loss: mean over sources of the contrastive loss, as the run recorded it.
    """

    accuracy: float
    loss: float


def arms(config: ml_collections.ConfigDict) -> list[Arm]:
    """Every arm: the product of the configuration's starts, `distilled` and `seeds`."""
    return [Arm(*which) for which in itertools.product(config.starts, config.distilled, config.seeds)]


def sweep_links(config: ml_collections.ConfigDict, root: epath.PathLike) -> list[Link]:
    """What is pruned, the teacher, its vectors, every pruned start, every arm; see configs/ablation.py."""
    root = epath.Path(root)
    source = _training(config, root, SOURCE, {"size": config.source_size, "steps": config.source_steps, "seed": 0})
    further = {"size": config.source_size, "steps": config.teacher_steps, "seed": 1, "init": f"{root}/{SOURCE}"}
    teacher = dataclasses.replace(_training(config, root, TEACHER, further), needs=(SOURCE,))
    cache = {"--model": f"{root}/{TEACHER}", "--data": config.data, "--out": f"{root}/{CACHE}"}
    cache |= {"--dims": SIZES[config.target].hidden_size, "--max-length": config.max_length}
    links = [source, teacher]
    if any(config.distilled):
        links.append(Link(CACHE, "f2llm_jax.cache_teacher", _flat(cache), (TEACHER,), whole=False))
    for start, flags in config.starts.items():
        if start != RANDOM:
            links.append(_start(config, root, start, tuple(flags)))
    return links + [_arm(config, root, arm) for arm in arms(config)]


def _start(config: ml_collections.ConfigDict, root: epath.Path, start: str, flags: tuple[str, ...]) -> Link:
    arguments = {"--model": f"{root}/{SOURCE}", "--target": config.target, "--data": config.data, "--out": f"{root}/{start}"}
    arguments |= {"--calibration-rows": config.calibration_rows}
    return Link(start, "f2llm_jax.prune", (*_flat(arguments), *flags), (SOURCE,))


def _arm(config: ml_collections.ConfigDict, root: epath.Path, arm: Arm) -> Link:
    settings = {"size": config.target, "steps": config.steps, "seed": arm.seed}
    needs = []
    if arm.start != RANDOM:
        settings["init"] = f"{root}/{arm.start}"
        needs.append(arm.start)
    if arm.distilled:
        settings["teacher_cache"] = f"{root}/{CACHE}"
        needs.append(CACHE)
    return dataclasses.replace(_training(config, root, arm.name, settings), needs=tuple(needs))


def _training(config: ml_collections.ConfigDict, root: epath.Path, name: str, settings: dict[str, object]) -> Link:
    # Validated and saved where it starts and where it ends, and nowhere between.
    settings = settings | {"data.folder": config.data, "eval.every": 10**9, "checkpoint.every": 10**9}
    settings |= {"eval.batches": 10**6, "batch.max_length": config.max_length, "batch.row_tokens": config.max_length}
    overrides = tuple(f"--config.{name}={value}" for name, value in settings.items())
    arguments = ("--config", config.train_config, "--workdir", f"{root}/{name}", *overrides, *config.train_flags)
    return Link(name, "f2llm_jax.main", arguments, whole=False)


def _flat(flags: dict[str, object]) -> tuple[str, ...]:
    return tuple(str(part) for flag in flags.items() for part in flag)


def run_sweep(config: ml_collections.ConfigDict, root: epath.PathLike, report: Callable[[str], None]) -> str:
    """Runs what is not done, scores it, writes `ROOT/NAME.md` and `ROOT/NAME.png`, and returns the table.

    Args:
      config: see configs/ablation.py.
      root: folder of the sweep.
      report: hears of each model that has been scored.

    Raises:
      DatasetError: `config.data` is no prepared dataset.
      ChainError: see `links.run`.
    """
    root, dataset = epath.Path(root), load_dataset(config.data)
    run(sweep_links(config, root), root)
    found = _scores(config, root, dataset, report)
    write_text(root / f"{config.name}.md", table(config, found))
    write_bytes(root / f"{config.name}.png", picture(config, found))
    return table(config, found)


def _scores(
    config: ml_collections.ConfigDict, root: epath.Path, dataset: Dataset, report: Callable[[str], None]
) -> dict[str, tuple[ArmScore, ArmScore]]:
    """Before and after training, by the name of source, teacher or arm."""
    found: dict[str, tuple[ArmScore, ArmScore]] = {}
    lasts = {SOURCE: config.source_steps, TEACHER: config.teacher_steps} | {arm.name: config.steps for arm in arms(config)}
    for name, steps in lasts.items():
        found[name] = _score(root / name, 0, dataset), _score(root / name, steps, dataset)
        report(name)
    return found


def _score(workdir: epath.Path, step: int, dataset: Dataset) -> ArmScore:
    """Of one checkpoint; kept next to the run's metrics, so that it is computed once."""
    file = workdir / f"held_out-{step}.json"
    if not file.exists():
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        loss = next(line["validation/loss"] for line in lines if line["step"] == step and "validation/loss" in line)
        by_source = accuracies(load_encoder(find_model(f"{workdir}/checkpoints/{step}")), dataset)
        content = {"accuracy": float(np.mean(list(by_source.values()))), "loss": loss, "sources": by_source}
        write_json(file, content, sealed=True)
    content = read_json(file, sealed=True)
    return ArmScore(content["accuracy"], content["loss"])


def table(config: ml_collections.ConfigDict, found: dict[str, tuple[ArmScore, ArmScore]]) -> str:
    """Markdown: a row a start, before training and after it without and with the teacher; mean and standard deviation over seeds."""
    lines = []
    for measure, scale, title in (("accuracy", 100, "held-out accuracy, %"), ("loss", 1, "held-out loss")):
        columns = ["before", *("distilled" if distilled else "not distilled" for distilled in config.distilled)]
        lines += [f"| {title} | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
        for start in config.starts:
            cells = [[found[Arm(start, config.distilled[0], seed).name][0] for seed in config.seeds]]
            cells += [[found[Arm(start, distilled, seed).name][1] for seed in config.seeds] for distilled in config.distilled]
            lines.append(f"| {start} | {' | '.join(_cell([scale * getattr(score, measure) for score in cell]) for cell in cells)} |")
        lines.append("\n" + ", ".join(f"{name}: {scale * getattr(found[name][1], measure):.2f}" for name in (SOURCE, TEACHER)) + "\n")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def picture(config: ml_collections.ConfigDict, found: dict[str, tuple[ArmScore, ArmScore]]) -> bytes:
    """A PNG of the held-out accuracy: a group a start, a mark a seed, the teacher as a line."""
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for column, distilled in enumerate(config.distilled):
        place = np.arange(len(config.starts)) + 0.2 * column
        values = [[100 * found[Arm(start, distilled, seed).name][1].accuracy for seed in config.seeds] for start in config.starts]
        axes.plot(np.repeat(place, len(config.seeds)), np.ravel(values), "o", color=f"C{column}", alpha=0.5)
        axes.plot(
            place, np.mean(values, axis=1), "_", markersize=24, color=f"C{column}", label="distilled" if distilled else "not distilled"
        )
    axes.axhline(100 * found[TEACHER][1].accuracy, color="gray", linestyle="--", label="teacher")
    axes.set(ylabel="held-out accuracy, %", xticks=np.arange(len(config.starts)) + 0.1, xticklabels=list(config.starts))
    axes.legend()
    axes.grid(axis="y", alpha=0.3)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})
    return drawn.getvalue()
