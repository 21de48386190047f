"""Hostile names, other people's files, two writers, full and read-only disks, signals: refused or survived, nothing lost."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time

import gcs
import pytest
import world as worlds
from small_runs import environment

from f2llm_jax.data import records
from f2llm_jax.errors import UserError
from f2llm_jax.storage import files, folders, locks

pytestmark = [
    *(pytest.mark.filterwarnings(f"ignore:::{module}") for module in ("tensorflow_datasets", "apache_beam")),
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.slow,
]

FOLDERS = ("cache_teacher", "convert", "mine", "prepare", "prune", "report")  # commands that make a folder
ALL = (*FOLDERS, "embed", "main")
NAMES = ("a%41b", "a#b", "a?b", "a\\b", "a$b", "a b", "a'b", 'a"b', "a&b;c", "ä猫", "a*b", "[a]", "-a", "a:b", "~a")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("command", ["convert", "main", "embed", "cache_teacher"])
def test_folders_of_any_name(world, tmp_path, command, name):
    """They work, or are refused before any work; nothing lands elsewhere."""
    out = tmp_path / name / "out"
    out.parent.mkdir()
    code, errors = world.call(command, *world.words(command, out))
    if code == 0:
        assert out.exists() and sorted(path.name for path in tmp_path.iterdir()) == [name]
        if command == "main":
            code, errors = world.call("convert", "to-hf", out, tmp_path / "released")
            assert code == 0, errors
    else:
        assert code == 1 and "Traceback" not in errors and not out.exists(), errors


GOOD = ("a", "A1", "_a", "a.b", "a-b_c", "a b", "a,b", "a+b", "a@b", "a=b", "a~", "a(b)", "ä", "猫", "9", "x" * 128)
BAD = (
    "",
    ".",
    "..",
    ".a",
    "a/b",
    "a\\b",
    "a\nb",
    "a\0b",
    "-a",
    " a",
    "a ",
    "a.",
    "a%b",
    "a#b",
    "a?b",
    "a*b",
    "a:b",
    "a$b",
    "a|b",
    "x" * 129,
)


@pytest.mark.parametrize("name", GOOD)
def test_names_of_sources_that_are_allowed(name):
    assert files.check_name(name, "source") == name


@pytest.mark.parametrize("name", BAD)
def test_names_of_sources_that_are_not(name):
    with pytest.raises(UserError, match="a name has"):
        files.check_name(name, "source")


@pytest.mark.parametrize("name", [".parquet", "..parquet", "a%b.parquet", "a#b.parquet"])
def test_a_raw_file_of_a_hostile_name(world, tmp_path, name):
    raw = worlds.copy(world.raw, tmp_path / "raw")
    (raw / name).write_bytes((raw / "pairs.parquet").read_bytes())
    before = worlds.snapshot(raw)
    words = world.words("prepare", tmp_path / "out")
    words[1] = str(raw)
    code, errors = world.call("prepare", *words)
    assert worlds.snapshot(raw) == before and "Traceback" not in errors
    if code == 0:  # a file that begins with a dot is no raw file; it has taken nothing from the others
        assert list(records.load_dataset(tmp_path / "out").sources) == list(records.load_dataset(world.data).sources), errors


@pytest.mark.parametrize("command", FOLDERS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_somebody_else_stays(world, tmp_path, command, overwrite):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("thesis.txt", "INCOMPLETE", "settings.json", "summary.json", "report.html", "modules.json", "config.json"):
        (out / name).write_text("{}")
    before = worlds.snapshot(tmp_path)
    more = ["--overwrite"] if overwrite and command not in ("cache_teacher", "report") else []
    code, errors = world.call(command, *world.words(command, out), *more)
    assert code == 1 and "Traceback" not in errors and worlds.snapshot(tmp_path) == before, errors


@pytest.mark.parametrize("command", ["convert", "mine", "prepare", "report"])
def test_a_file_of_somebody_else_in_our_folder_stays(world, tmp_path, command):
    out = tmp_path / "out"
    worlds.expect(world, command, world.words(command, out))
    (out / "thesis.txt").write_text("dear")
    code, errors = world.call(command, *world.words(command, out), *([] if command == "report" else ["--overwrite"]))
    assert code == 1 and "thesis.txt" in errors and (out / "thesis.txt").read_text() == "dear", errors
    (out / "thesis.txt").unlink()
    code, errors = world.call(command, *world.words(command, out), *([] if command == "report" else ["--overwrite"]))
    assert code == 0, errors


@pytest.mark.parametrize("command", ["convert", "embed", "mine", "report"])
def test_partial_files_of_somebody_else_stay(world, tmp_path, command):
    for name in ("out.partial", "out.npy.partial", ".out.partial", "out.lock"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("dear")
    before = worlds.snapshot(tmp_path)
    code, errors = world.call(command, *world.words(command, tmp_path / "out"))
    assert code == 0 and before.items() <= worlds.snapshot(tmp_path).items(), errors


def inputs(world):
    return [
        ("embed", ["--model", world.model, "--input", world.texts, "--output", world.texts]),
        ("convert", ["to-hf", world.model, world.model, "--overwrite"]),
        ("convert", ["to-hf", world.run, world.run, "--overwrite"]),
        ("convert", ["from-hf", world.model, world.model, "--overwrite"]),
        ("convert", ["to-hf", world.run, world.root, "--overwrite"]),
        ("mine", [*world.words("mine", world.pairs), "--overwrite"]),
        ("mine", [*world.words("mine", world.root), "--overwrite"]),
        ("prepare", [*world.words("prepare", world.raw), "--overwrite"]),
        ("prepare", [*world.words("prepare", world.tokenizer), "--overwrite"]),
        ("prune", [*world.words("prune", world.run), "--overwrite"]),
        ("prune", [*world.words("prune", world.data), "--overwrite"]),
        ("cache_teacher", world.words("cache_teacher", world.data)),
        ("cache_teacher", world.words("cache_teacher", world.model)),
        ("report", [world.run, "--out", world.run]),
        ("report", [world.run, "--out", world.root]),
    ]


@pytest.mark.parametrize("number", range(15))
def test_an_input_is_never_the_output(world, number):
    command, words = inputs(world)[number]
    before = {folder: worlds.snapshot(folder) for folder in (world.raw, world.data, world.model, world.run, world.tokenizer)}
    code, errors = world.call(command, *words)
    assert code == 1 and "Traceback" not in errors, errors
    assert {folder: worlds.snapshot(folder) for folder in before} == before and world.texts.read_text().startswith("one\n")


HOLDER = """
import sys, time
from f2llm_jax.storage import locks
with locks.lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def held(target):
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(target)], env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("command", [name for name in ALL if name != "embed"])
def test_a_second_writer_is_told_who_the_first_is(world, tmp_path, command):
    out = tmp_path / "out"
    with held(out) as process:
        code, errors = world.call(command, *world.words(command, out))
        assert code == 1 and "is being written by" in errors and f"pid {process.pid}" in errors and "Traceback" not in errors, errors
        assert not out.exists() or (command == "main" and not (out / "checkpoints").exists())
        process.kill()
        process.wait()
    code, errors = world.call(command, *world.words(command, out))
    assert code == 0 and "took over the lock" in errors, errors
    assert not list(tmp_path.glob(".*.lock"))


def test_a_lock_in_a_bucket(monkeypatch, capsys):
    monkeypatch.setattr(locks, "STALE_SECONDS", 2.0)
    monkeypatch.setattr(locks, "RENEW_SECONDS", 0.2)
    with gcs.emulator() as bucket:
        target = f"{bucket}/folder"
        content = {"command": "main", "user": "u", "host": "elsewhere", "pid": 1, "started": "1", "since": "then"}
        store = gcs.gcsfs.GCSFileSystem()
        store.pipe_file(f"{bucket}/.folder.lock", json.dumps(content).encode())
        with locks.lock(target):  # nobody renews it: taken over
            assert "took over the lock of main (user u, host elsewhere" in capsys.readouterr().err
            store.invalidate_cache()
            assert json.loads(store.cat_file(f"{bucket}/.folder.lock"))["pid"] == os.getpid()
            locks._held.clear()  # as another process sees it
            with pytest.raises(locks.LockedError, match=f"pid {os.getpid()}"), locks.lock(target):
                pass
        store.invalidate_cache()
        assert not store.exists(f"{bucket}/.folder.lock")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of half a megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.parametrize("command", ALL)
def test_a_full_disk(world, small_disk, command):
    """One line that names a file, no half output, and the same command works once there is space."""
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(b"x" * 4096)
    code, errors = world.call(command, *world.words(command, small_disk / "out"))
    assert code == 1 and os.strerror(errno.ENOSPC) in errors and "free space" in errors and "Traceback" not in errors, errors
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    code, errors = world.call(command, *world.words(command, small_disk / "out"))
    assert code == 0, errors


@pytest.mark.parametrize("command", ALL)
def test_a_disk_that_nobody_may_write(world, small_disk, command):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    code, errors = world.call(command, *world.words(command, small_disk / "out"))
    assert code == 1 and os.strerror(errno.EROFS) in errors and "Traceback" not in errors, errors


def began(out):
    """Whether something is there or being written."""
    return any(path.name.startswith((".out", "out")) and not path.name.endswith(".lock") for path in out.parent.iterdir())


@pytest.mark.parametrize("command", ["convert", "prepare", "mine", "report"])
def test_sigkill_leaves_nothing_that_stops_the_next(world, tmp_path, command):
    """Killed as soon as something is on the disk; the same command then gives what an undisturbed one gives."""
    out = tmp_path / "out"
    command_line = [sys.executable, "-m", f"f2llm_jax.{command}", *world.words(command, out)]
    process = subprocess.Popen(command_line, env=environment(), stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not began(out):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    code, errors = world.call(command, *world.words(command, out))
    assert code == 0, errors
    assert not [path.name for path in tmp_path.iterdir() if "partial" in path.name or "lock" in path.name]
    assert not folders.damage(out)


@pytest.mark.parametrize("command", ["convert", "prepare", "mine", "cache_teacher", "embed"])
def test_ctrl_c_is_one_line_and_130(world, tmp_path, command):
    command_line = [sys.executable, "-m", f"f2llm_jax.{command}", *world.words(command, tmp_path / "out")]
    process = subprocess.Popen(command_line, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not any(tmp_path.iterdir()) and process.poll() is None and not loaded(process.pid):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 130 and "interrupted" in errors and "Traceback" not in errors, errors


def loaded(pid):
    """Whether a process has come as far as importing numpy."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps") as maps:
        return "numpy" in maps.read()
    return False
