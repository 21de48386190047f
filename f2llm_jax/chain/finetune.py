"""The commands that fine-tune a model on data of one's own, from its files to a release that is verified."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence

from f2llm_jax.chain.links import Link
from f2llm_jax.errors import UserError
from f2llm_jax.inputs import folders

DIGITS = 8  # hex, of the names of folders
BLOCK = 1 << 20  # bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetune:
    """What is fine-tuned, on what, and how."""

    model: str  # Hugging Face folder, Hub id, workdir or checkpoint
    digest: str  # of its weights
    tokenizer: str  # of the model: folder or Hub id
    data: pathlib.Path  # file or folder of pairs, absolute
    out: pathlib.Path  # the release, absolute
    root: pathlib.Path  # of everything else, absolute
    max_length: int  # tokens at which texts are truncated
    validation: str  # share of the queries that are held out, or a path
    instruction: str = ""  # for queries that carry none
    columns: str = ""  # as `prepare --columns` takes it
    mine: bool = False  # hard negatives by the model itself
    negatives: int = 7  # a row, that are mined
    dtype: str = "float32"  # of the release
    config: str = "configs/finetune.py"  # a shipped file, or an absolute path
    settings: str = ""  # the whole configuration, overrides included, as text
    overrides: Sequence[tuple[str, str]] = ()  # fields of the configuration, as typed


def finetune_links(plan: Finetune) -> list[Link]:
    """Mined negatives if they are asked for, data, training, release, the model before and after on held-out queries, verification.

    Folders are named by what made them: content of the data, model and settings. So data that has not changed is prepared once, other
    settings train in a folder of their own, and the same command resumes.
    """
    raw, content, columns = plan.data, _content(plan.data), plan.columns
    links: list[Link] = []
    if plan.mine:
        mined = f"mined-{_digest(content, plan.digest, plan.instruction, columns, plan.negatives)}"
        flags = ["--model", plan.model, "--queries", str(plan.data), "--negatives", str(plan.negatives), "--too-few", "fill"]
        flags += ["--columns", columns] * bool(columns) + ["--instruction", plan.instruction] * bool(plan.instruction)
        links.append(Link(mined, "f2llm_jax.mine", (*flags, "--out", str(plan.root / mined)), (plan.model,)))
        raw, content, columns = plan.root / mined, mined, ""
    data = f"data-{_digest(content, plan.tokenizer, plan.max_length, plan.validation, plan.instruction, columns)}"
    run = f"run-{_digest(data, plan.digest, plan.settings)}"
    folder = str(plan.root / data)
    links.append(Link(data, "f2llm_jax.prepare", _prepare(plan, raw, columns, folder), (content if plan.mine else str(raw),)))
    settings = [("init", plan.model), ("data.folder", folder), *plan.overrides]
    flags = ["--config", plan.config, "--workdir", str(plan.root / run), *(f"--config.{field}={value}" for field, value in settings)]
    links.append(Link(run, "f2llm_jax.main", tuple(flags), (data, plan.model), whole=False))
    out = str(plan.out)
    released = release_name(plan)
    links.append(Link(released, "f2llm_jax.convert", ("to-hf", str(plan.root / run), out, "--dtype", plan.dtype), (run,), place=out))
    recall = f"recall-{run.removeprefix('run-')}.json"
    flags = ["--model", plan.model, "--model", out, "--data", folder, "--json", str(plan.root / recall)]
    links.append(Link(recall, "f2llm_jax.recall", tuple(flags), (plan.model, released, data)))
    verified = f"verified-{run.removeprefix('run-')}.json"
    links.append(Link(verified, "f2llm_jax.convert", ("verify", out, "--json", str(plan.root / verified)), (released,)))
    return links


def release_name(plan: Finetune) -> str:
    """Of the link that makes `plan.out`."""
    return f"release-{_digest(str(plan.out))}"


def _prepare(plan: Finetune, raw: pathlib.Path, columns: str, folder: str) -> tuple[str, ...]:
    flags = ["--raw", str(raw), "--tokenizer", plan.tokenizer, "--out", folder, "--max-length", str(plan.max_length)]
    flags += ["--validation", plan.validation, "--split-by", "query", "--cap", "0"]
    flags += ["--columns", columns] * bool(columns)
    if plan.instruction and not plan.mine:
        flags += [word for name in _sources(plan.data) for word in ("--instruction", f"{name}={plan.instruction}")]
    return tuple(flags)


def _sources(data: pathlib.Path) -> list[str]:
    """Names of the sources that `prepare` makes of `data`."""
    return list(folders.find_sources(data).paths) if data.is_dir() else [folders.table_name(data)]


def _content(data: pathlib.Path) -> str:
    """A digest of names and bytes of the files."""
    files = sorted(path for path in data.rglob("*") if path.is_file()) if data.is_dir() else [data]
    if not files or not data.exists():
        raise UserError(f"{data} does not exist or is empty; give a file of pairs (forms: docs/data.md) or a folder of such files")
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:DIGITS]
