"""A small world to attack: raw data, two datasets, a model as release and as trained workdir, cached and mined vectors."""

import contextlib
import dataclasses
import io
import pathlib
import shutil
import subprocess

import pyarrow as pa
import pyarrow.parquet as pq
import small_data
import tiny
from small_runs import environment, train_command

from f2llm_jax import cache_teacher, convert, embed, main, mine, prepare, prune, report
from f2llm_jax.release import hf_folder

COMMANDS = {
    module.__name__.rpartition(".")[2]: module.main for module in (cache_teacher, convert, embed, main, mine, prepare, prune, report)
}
STEPS, LENGTH = 4, small_data.MAX_LENGTH


@dataclasses.dataclass(frozen=True)
class World:
    """Folders by name, all below one."""

    root: pathlib.Path
    raw: pathlib.Path
    tokenizer: pathlib.Path
    data: pathlib.Path
    other: pathlib.Path  # the same rows in another order: equal counts, lengths and tokenizer
    model: pathlib.Path  # a release
    run: pathlib.Path  # trained, with checkpoints 0, 2 and 4
    cache: pathlib.Path  # teacher vectors of `data` by `model`
    texts: pathlib.Path
    pairs: pathlib.Path
    mined: pathlib.Path

    def words(self, command, out):
        """The words of a command that writes `out`."""
        words = {
            "cache_teacher": [
                "--model",
                self.model,
                "--data",
                self.data,
                "--out",
                out,
                "--dims",
                16,
                "--max-length",
                small_data.MAX_LENGTH,
            ],
            "convert": ["to-hf", self.run, out],
            "embed": ["--model", self.model, "--input", self.texts, "--output", out],
            "main": train_command(self.data, out, steps=STEPS)[3:],
            "mine": ["--model", self.model, "--queries", self.pairs, "--out", out, "--negatives", 2, "--max-score", "none"],
            "prepare": [
                "--raw",
                self.raw,
                "--tokenizer",
                self.tokenizer,
                "--out",
                out,
                "--max-length",
                small_data.MAX_LENGTH,
                "--workers",
                1,
            ],
            "prune": ["--model", self.run, "--target", "hidden=64,ffn=128", "--data", self.data, "--calibration-rows", 64, "--out", out],
            "report": [self.run, "--out", out],
        }
        return [str(word) for word in words[command]]

    def call(self, command, *words):
        """Exit code and stderr of a command, run here."""
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            code = COMMANDS[command]([str(word) for word in words])
        return code, errors.getvalue()

    def train(self, workdir, *flags, **overrides):
        """Resumes or starts a run here."""
        overrides = {"steps": STEPS, "checkpoint.every": 2, "eval.every": 2, **overrides}
        data = overrides.pop("data", self.data)
        return self.call("main", *train_command(data, workdir, *flags, **overrides)[3:])


def build(root):
    """Makes the world by the real commands."""
    data = small_data.write(root / "first").folder
    world = World(
        root=root,
        raw=root / "first/raw",
        tokenizer=root / "first/tokenizer",
        data=pathlib.Path(data),
        other=root / "other",
        model=root / "model",
        run=root / "run",
        cache=root / "cache",
        texts=root / "texts.txt",
        pairs=root / "pairs.parquet",
        mined=root / "mined",
    )
    turned = root / "turned"
    turned.mkdir()
    for file in world.raw.iterdir():
        if file.suffix == ".parquet":
            table = pq.read_table(file)
            pq.write_table(table.take(list(range(len(table)))[::-1]), turned / file.name)
        else:
            shutil.copy(file, turned / file.name)
    words = world.words("prepare", world.other)
    words[1] = str(turned)
    expect(world, "prepare", words)
    hf_folder.export(tiny.origin(root / "model_tokenizer"), world.model, hf_folder.ReleaseForm(golden=False))
    done = subprocess.run(
        train_command(world.data, world.run, steps=STEPS, checkpoint__every=2, eval__every=2),
        env=environment(1, root / "compiled"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    world.texts.write_text("one\ntwo\nthree\n")
    rows = [f"text {i} of a kind" for i in range(40)]
    pq.write_table(pa.table({"query": rows, "passage": [f"answer {i}" for i in range(40)]}), world.pairs)
    expect(world, "cache_teacher", world.words("cache_teacher", world.cache))
    expect(world, "mine", world.words("mine", world.mined))
    return world


def expect(world, command, words):
    code, errors = world.call(command, *words)
    assert code == 0, errors


def snapshot(folder):
    """Every file below a folder with its content."""
    folder = pathlib.Path(folder)
    return (
        {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        if folder.exists()
        else {}
    )


def flip(path, share=0.5):
    """Changes one bit of a file."""
    content = bytearray(path.read_bytes())
    content[min(len(content) - 1, int(len(content) * share))] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


def copy(folder, to):
    shutil.copytree(folder, to)
    return to
