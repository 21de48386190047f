"""The commands that fine-tune a model on data of one's own, from its files to a release that is verified."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence

from etils import epath

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
    fingerprint: str  # of the tokenizer
    data: epath.Path  # file or folder of pairs, absolute
    out: epath.Path  # the release, absolute
    root: epath.Path  # of everything else, absolute
    max_length: int  # tokens at which texts are truncated
    validation: float | epath.Path  # share of the queries that are held out, or a file of pairs, absolute
    instruction: str = ""  # for queries that carry none
    columns: tuple[str, ...] = ()  # flags of columns, as `prepare` and `mine` take them
    skip_invalid: bool = False  # rows without valid texts
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
        flags += [*columns, *["--instruction", plan.instruction] * bool(plan.instruction)]
        links.append(Link(mined, "f2llm_jax.mine", (*flags, "--out", str(plan.root / mined)), (plan.model,)))
        raw, content, columns = plan.root / mined, mined, ()
    held_out = plan.validation if isinstance(plan.validation, float) else _content(plan.validation)
    data = f"data-{_digest(content, plan.fingerprint, plan.max_length, held_out, plan.instruction, columns, plan.skip_invalid)}"
    run = f"run-{_digest(data, plan.digest, plan.settings)}"
    folder = str(plan.root / data)
    links.append(Link(data, "f2llm_jax.prepare", _prepare(plan, raw, columns, folder), (content if plan.mine else str(raw),)))
    settings = [("init", plan.model), ("data.folder", folder), *plan.overrides]
    flags = ["--config", plan.config, "--workdir", str(plan.root / run), *(f"--config.{field}={value}" for field, value in settings)]
    links.append(Link(run, "f2llm_jax.main", tuple(flags), (data, plan.model), whole=False))
    out = str(plan.out)
    released = release_name(plan)
    links.append(Link(released, "f2llm_jax.convert", ("to-hf", str(plan.root / run), out, "--dtype", plan.dtype), (run,), place=out))
    figures = f"{run.removeprefix('run-')}-{released.removeprefix('release-')}.json"  # of this run in this release
    recall = f"recall-{figures}"
    flags = ["--model", plan.model, "--model", out, "--data", folder, "--json", str(plan.root / recall)]
    links.append(Link(recall, "f2llm_jax.recall", tuple(flags), (plan.model, released, data)))
    verified = f"verified-{figures}"
    links.append(Link(verified, "f2llm_jax.convert", ("verify", out, "--json", str(plan.root / verified)), (released,)))
    return links


def release_name(plan: Finetune) -> str:
    """Of the link that makes `plan.out`."""
    return f"release-{_digest(str(plan.out))}"


def _prepare(plan: Finetune, raw: epath.Path, columns: Sequence[str], folder: str) -> tuple[str, ...]:
    flags = ["--raw", str(raw), "--tokenizer", plan.tokenizer, "--out", folder, "--max-length", str(plan.max_length)]
    flags += ["--validation", str(plan.validation), "--split-by", "query", "--cap", "0"]
    flags += [*columns, *["--skip-invalid"] * plan.skip_invalid]
    if plan.instruction and not plan.mine:
        flags += [word for name in _sources(plan.data) for word in ("--instruction", f"{name}={plan.instruction}")]
    return tuple(flags)


def _sources(data: epath.Path) -> list[str]:
    """Names of the sources that `prepare` makes of `data`."""
    return list(folders.find_sources(data).paths) if data.is_dir() else [folders.table_name(data)]


def _content(data: epath.Path) -> str:
    """A digest of names and bytes of the files."""
    files = sorted(path for path in data.rglob("*") if not path.is_dir()) if data.is_dir() else [data]
    files += [path for path in [data.parent / folders.TASKS_FILE] if not data.is_dir() and path.exists()]
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
