"""What a path means: a file, a folder that is one table, a BEIR folder, or a folder of sources.

Names that begin with `.` or `_` are hidden (`._x.parquet` of macOS, `_SUCCESS` of Spark) and skipped, unless a path names one itself.
A folder is one table if it is
    a `datasets.save_to_disk` folder    `state.json` names its Arrow files and their order
    a folder that Spark wrote           it holds `_SUCCESS` and `part-...` files
    a partitioned folder                `lang=de/part-0.parquet`: the names of its folders are columns of text
    a folder of files of one form       read in the order of their names; of shards `x-00000-of-00003`, all of one `x` must be there.
                                        A folder of sources is one only if it holds nothing but shards
"""

import dataclasses
import re
import urllib.parse
from collections.abc import Iterator

from etils import epath

from f2llm_jax.errors import UserError
from f2llm_jax.inputs.tables import SUFFIXES, File, open_file, split_suffix
from f2llm_jax.storage.files import read_json

SPARK = "_SUCCESS"  # what Spark and Hadoop write to the folder of a table
_SHARD = re.compile(r"(.+?)[-_.](\d+)[-_]of[-_](\d+)(?:-[0-9a-f]{16})?\Z")  # with the digest that older `push_to_hub` puts behind
_PARTITION = re.compile(r"([^=]+)=(.*)\Z")
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
HELD_OUT = {"validation", "valid", "val", "dev", "eval", "test"}  # names of splits next to "train"
TASKS_FILE = "tasks.json"  # kinds of sources, in their folder or next to a single file
LISTED = ("parquet", "arrow", "jsonl", "ndjson", "csv", "tsv")  # forms that a folder is searched for; `.txt` and `.json` are named by hand


@dataclasses.dataclass(frozen=True)
class Sources:
    """The sources of a folder by name, and what else is in it."""

    paths: dict[str, epath.Path]
    unread: list[str]  # names, without those that are hidden
    hidden: int


def open_table(path: epath.PathLike) -> list[File]:
    """The files of one table, in order; each has been opened.

    Raises:
      UserError: there is none, a file cannot be read, a shard is missing, or the folder holds more than one table.
    """
    return [open_file(file, constants) for file, constants in table_paths(path)]


def table_paths(path: epath.PathLike) -> list[tuple[epath.Path, dict[str, str | None]]]:
    """The files of one table, in order, each with the columns that the names of its folders give; raises as `open_table` does."""
    path = epath.Path(path)
    if not path.is_dir():
        return [(path, {})]
    if is_beir(path):
        raise UserError(f"{path} is a BEIR folder of three tables; name the one that is meant, such as {find_member(path, 'corpus')}")
    found = _saved_dataset(path) if (path / "state.json").exists() else sorted(_walk(path), key=lambda file: str(file[0]))
    if not found:
        raise UserError(f"{path} holds no file of a form that is read (*.{', *.'.join(LISTED)}); name another folder")
    _check_one_table(path, [file for file, _ in found])
    return found


def find_sources(folder: epath.PathLike, known: tuple[str, ...] = ()) -> Sources:
    """The files and sub-folders of `folder`, each a source; or `folder` itself, where it is one table or a BEIR folder.

    Args:
      folder: to list.
      known: names of files in it that are read elsewhere.

    Raises:
      UserError: the folder does not exist, or two of its entries are one source by name.
    """
    folder = epath.Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name the folder that holds one file a source")
    entries = sorted(folder.iterdir(), key=lambda path: path.name)
    shown = [path for path in entries if not _hidden(path)]
    inner = [path for path in shown if path.is_dir()]
    _refuse_splits(folder)
    spark = (folder / SPARK).exists() and any(path.name.startswith("part-") for path in shown)
    if spark or (folder / "state.json").exists() or is_beir(folder) or any(_PARTITION.match(path.name) for path in inner):
        return Sources({folder.name: folder}, [], len(entries) - len(shown))
    files = [path for path in shown if path not in inner and source_name(path) is not None]
    if shards := [path for path in files if _SHARD.match(table_name(path))]:
        if inner or len(shards) < len(files):
            raise UserError(
                f"{folder} holds shards of a table, such as {shards[0].name}, next to other sources; give them their own folder"
            )
        unread = [path.name for path in shown if path not in shards and path.name not in known]
        return Sources({folder.name: folder}, unread, len(entries) - len(shown))
    return _each_a_source(shown, inner, known, len(entries) - len(shown))


def _each_a_source(shown: list[epath.Path], inner: list[epath.Path], known: tuple[str, ...], hidden: int) -> Sources:
    paths: dict[str, epath.Path] = {}
    unread: list[str] = []
    for path in shown:
        name = path.name if path in inner and _has_tables(path) else source_name(path) if path not in inner else None
        if name in paths:
            raise UserError(f"{paths[name]} and {path.name} are one source by name; rename one of them")
        if name is not None:
            paths[name] = path
        elif path.name not in known:
            unread.append(path.name + "/" * (path in inner))
    return Sources(paths, unread, hidden)


def source_name(path: epath.PathLike) -> str | None:
    """The name of a file without its suffix, or None where folders are not searched for such files."""
    found = split_suffix(path)
    return found[0] if found and found[1].split(".")[1] in LISTED else None


def table_name(path: epath.PathLike) -> str:
    """What a file or folder is called as a source."""
    found = split_suffix(path)
    return found[0] if found else epath.Path(path).name


def is_beir(folder: epath.PathLike) -> bool:
    """Whether a folder has the corpus, the queries and the judgements of BEIR."""
    return all(find_member(folder, name) for name in ("corpus", "queries")) and (epath.Path(folder) / "qrels").is_dir()


def find_member(folder: epath.PathLike, name: str) -> epath.Path | None:
    """`folder/name` with whichever suffix of a form that is read."""
    paths = (epath.Path(folder) / f"{name}{suffix}" for suffix in SUFFIXES)
    return next((path for path in paths if path.exists()), None)


def _hidden(path: epath.Path) -> bool:
    return path.name.startswith((".", "_"))


def _has_tables(folder: epath.Path) -> bool:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return True
    return any(_has_tables(path) if path.is_dir() else source_name(path) for path in folder.iterdir() if not _hidden(path))


def _refuse_splits(folder: epath.Path) -> None:
    """Raises a UserError for a folder of several splits of one dataset: taken together, held-out rows would be trained on."""
    if (folder / "dataset_dict.json").exists():
        splits = read_json(folder / "dataset_dict.json").get("splits", [])
        named = ", ".join(str(folder / split) for split in splits)
        raise UserError(f"{folder} holds the splits {', '.join(splits)} of a saved DatasetDict; name the folder of one: {named}")
    splits = {table_name(path): path for path in folder.iterdir() if path.is_dir() or source_name(path)}
    if "train" in splits and (held_out := sorted(HELD_OUT & splits.keys())):
        raise UserError(
            f"{folder} holds the splits train and {', '.join(held_out)} of one dataset; name one, such as {splits['train']}, or move or "
            "rename the others (`prepare` takes one as --validation)"
        )


def _saved_dataset(folder: epath.Path) -> list[tuple[epath.Path, dict[str, str | None]]]:
    state = read_json(folder / "state.json")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise UserError(f"{folder} was saved with an index of rows; load it, call flatten_indices() and save it again")
    return [(folder / entry["filename"], {}) for entry in state.get("_data_files", [])]


def _walk(folder: epath.Path, constants: dict[str, str | None] | None = None) -> Iterator[tuple[epath.Path, dict[str, str | None]]]:
    _refuse_splits(folder)
    for path in folder.iterdir():
        if _hidden(path):
            continue
        partition = _PARTITION.match(path.name)
        if not path.is_dir():
            if source_name(path):
                yield path, constants or {}
        elif partition:
            value = urllib.parse.unquote(partition[2])
            yield from _walk(path, {**(constants or {}), partition[1]: None if value == NULL_PARTITION else value})
        elif _has_tables(path):
            raise UserError(f"{folder} has the sub-folder {path.name!r}, which may be another table; name that folder, or move it away")


def _check_one_table(folder: epath.Path, files: list[epath.Path]) -> None:
    suffixes = {found[1].split(".")[1] for file in files if (found := split_suffix(file))}
    if len(suffixes) > 1:
        raise UserError(f"{folder} holds files of the forms {', '.join(sorted(suffixes))}; one table has one form, move the others away")
    names = [(file.parent, table_name(file)) for file in files]
    if twice := [file for file, name in zip(files, names, strict=True) if names.count(name) > 1]:
        raise UserError(f"{folder} holds {twice[0].name} and {twice[1].name}, which are one table by name; remove one of them")
    shards = [_SHARD.match(table_name(file)) for file in files]
    stems = {shard[1] for shard in shards if shard}
    if len(stems) > 1 or (stems and not all(shards)):
        names = sorted(stems | {file.name for file, shard in zip(files, shards, strict=True) if not shard})
        raise UserError(f"{folder} holds shards of {', '.join(names)}; give each a folder of its own, and name one")
    for parent in dict.fromkeys(file.parent for file in files):
        inside = [shard for file, shard in zip(files, shards, strict=True) if shard and file.parent == parent]
        if len({shard[3] for shard in inside}) > 1:
            raise UserError(
                f"{parent} holds shards of {' and of '.join(sorted({shard[3] for shard in inside}))} files; remove those of one"
            )
        _check_shards(parent, inside)


def _check_shards(parent: epath.Path, shards: list[re.Match[str]]) -> None:
    """Raises a UserError unless all shards of a table are there, numbered from 0 or from 1."""
    if not shards:
        return
    numbers = {int(shard[2]) for shard in shards}
    first, total, width = int(0 not in numbers and int(shards[0][3]) in numbers), int(shards[0][3]), len(shards[0][2])
    if missing := [number for number in range(first, first + total) if number not in numbers]:
        raise UserError(f"{parent}: shard {shards[0][1]}-{missing[0]:0{width}d}-of-{shards[0][3]} is missing; fetch it")
