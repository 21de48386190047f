"""A chain of commands under one folder: what each needs and makes, what there is, and running the rest.

`ROOT/chain.json` says which commands ended well. What a command leaves when it is killed is its own affair, and all of this
project's commands go on or start again when they are given again; so the same chain, run again, ends as if nothing had happened.
"""

import contextlib
import dataclasses
import fcntl
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Literal

from etils import epath

from f2llm_jax.errors import UserError
from f2llm_jax.storage.files import check_name, is_remote, read_json, write_json

DONE_FILE = "chain.json"
LOCK_FILE = "chain.lock"

Status = Literal["done", "begun", "missing", "changed"]


class ChainError(UserError):
    """A chain that cannot be run; the message names the remedy."""


@dataclasses.dataclass(frozen=True)
class Link:
    """One command.

    Attributes:
      name: of what it makes, a folder under the chain's root.
      module: that is run, as in `python -m module`.
      arguments: of the command.
      needs: names of other links, or anything else that must be there (a Hub id, a folder elsewhere).
      whole: whether what it makes exists only when complete; of other links (training) only `DONE_FILE` tells.
      place: what it makes, where that is not `name` under the root.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()
    whole: bool = True
    place: str = ""

    def path(self, root: epath.PathLike) -> epath.Path:
        """Of what it makes."""
        return epath.Path(self.place) if self.place else epath.Path(root) / self.name

    @property
    def command(self) -> str:
        """As one would type it."""
        return shlex.join(["python", "-m", self.module, *self.arguments])


def statuses(links: Sequence[Link], root: epath.PathLike) -> dict[str, Status]:
    """What there is of each link, by name; "changed" if it was made by another command than the link's."""
    root = epath.Path(root)
    done = commands_done(root)
    found: dict[str, Status] = {}
    for link in links:
        exists = link.path(root).exists()
        if exists and link.name in done:
            found[link.name] = "done" if done[link.name] == link.command else "changed"
        else:
            found[link.name] = ("done" if link.whole else "begun") if exists else "missing"
    return found


def describe(links: Sequence[Link], root: epath.PathLike) -> str:
    """The chain in order, for people: status and command, then what it needs and makes."""
    found = statuses(links, root)
    lines = []
    for number, link in enumerate(links, start=1):
        needs = ", ".join(link.needs) or "nothing"
        lines += [f"{number:>3}  {found[link.name]:<8} {link.command}", f"{'':14}needs {needs}; makes {link.path(root)}"]
    count = list(found.values()).count("done")
    return "\n".join([*lines, f"{count} of {len(links)} done"])


def run(links: Sequence[Link], root: epath.PathLike) -> None:
    """Runs what is not done, in order, each in a process of its own whose output passes through.

    Raises:
      ChainError: a command fails, what a link makes was made by another command, or `root` is not on this machine.
    """
    for link in links:
        check_name(link.name, "unit")
    root = epath.Path(root)
    if is_remote(root):
        raise ChainError(f"a chain runs in a local folder, not in {root}; there, type the commands of the plan yourself")
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root) as lock:
        found = statuses(links, root)
        if changed := [link for link in links if found[link.name] == "changed"]:
            raise ChainError(
                f"{changed[0].path(root)} was made by another command than this chain's; remove it, or choose another folder than {root}\n"
                f"  it was: {commands_done(root)[changed[0].name]}\n  now is: {changed[0].command}"
            )
        for number, link in enumerate(links, start=1):
            if found[link.name] != "done":
                _run(link, root, f"[{number}/{len(links)}] {link.name}", lock)


def _run(link: Link, root: epath.Path, label: str, lock: int) -> None:
    print(f"{label}: {link.command}", file=sys.stderr, flush=True)
    start = time.monotonic()
    # The child holds the lock too: one that outlives a killed chain is waited for, not raced with.
    code = subprocess.run([sys.executable, "-m", link.module, *link.arguments], pass_fds=(lock,)).returncode
    if code:
        raise ChainError(f"{link.name} ended with exit code {code}; mend what its own message says and give the same command again")
    write_json(root / DONE_FILE, commands_done(root) | {link.name: link.command}, sealed=True)
    print(f"{label}: done in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def commands_done(root: epath.Path) -> dict[str, str]:
    """Commands that ended well, by what they made."""
    file = root / DONE_FILE
    return read_json(file, sealed=True) if file.exists() else {}


@contextlib.contextmanager
def _alone(root: epath.Path) -> Iterator[int]:
    """One chain at a time in a folder; gives the lock's file descriptor."""
    with open(root / LOCK_FILE, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another chain, or a command that one left behind, is at work in {root}; waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()
