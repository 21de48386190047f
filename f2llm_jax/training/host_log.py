"""Each host's own account of a run: when it started, where it resumed, why it ended. `WORKDIR/logs/host-I.log`."""

import datetime
import traceback
from types import TracebackType

from etils import epath

from f2llm_jax.errors import Preempted, UserError
from f2llm_jax.storage.files import is_remote, naming, write_text


class HostLog:
    """Appends dated lines to a file; used as a context manager, which notes how the run ended.

    A run that is refused leaves no workdir behind, so nothing is written before there is one.
    """

    def __init__(self, workdir: epath.Path, process_id: int):
        self._workdir, self._file = workdir, workdir / "logs" / f"host-{process_id}.log"
        self._remote = is_remote(workdir)
        self._lines: list[str] = []
        self._before: str | None = None  # what an object's earlier content was: there is no appending to it

    def __enter__(self) -> "HostLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or isinstance(error, Preempted):
            self.say(str(error or "done"))
        elif isinstance(error, UserError):
            self.say(f"ended by {type(error).__name__}: {error}")
        else:
            self.say("ended by\n" + "".join(traceback.format_exception(kind, error, trace)).rstrip())
        self.store()

    def say(self, text: str) -> None:
        """Notes `text` with the time, UTC; on an object store it is written at the next `store`."""
        now = datetime.datetime.now(datetime.UTC).isoformat(sep=" ", timespec="seconds")
        self._lines.append(f"{now} {text}\n")
        if not self._remote:
            self.store()

    def store(self) -> None:
        """Writes what is noted, if there is a workdir."""
        if not self._lines or not self._workdir.exists():
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        if self._remote:
            if self._before is None:
                self._before = self._file.read_bytes().decode(errors="replace") if self._file.exists() else ""
            write_text(self._file, self._before + "".join(self._lines))
            return
        with naming(self._file), self._file.open("a") as file:
            file.write("".join(self._lines))
        self._lines.clear()
