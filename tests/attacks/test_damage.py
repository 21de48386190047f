"""A byte flipped, a file cut, missing, empty, put in another's place: named, never used."""

import io
import shutil

import numpy as np
import pytest
import world as worlds
from small_runs import metrics

from f2llm_jax.data import records
from f2llm_jax.data.teacher_cache import TeacherCache
from f2llm_jax.errors import UserError
from f2llm_jax.inference.vector_cache import VectorCache
from f2llm_jax.storage import files, folders
from f2llm_jax.weights.checkpoint_check import checkpoint_damage, good_steps
from f2llm_jax.weights.models import find_model

pytestmark = [
    *(pytest.mark.filterwarnings(f"ignore:::{module}") for module in ("tensorflow_datasets", "apache_beam")),
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.slow,
]

SOURCES = ("labels", "pairs", "topics")
TABLES = ("train.query_length", "train.documents", "validation.query_length", "validation.documents", "corpus.length")
SHARES = (0.1, 0.5, 0.9, 0.999999)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("how", ["flipped", "cut", "empty", "missing", "of another source", "unsealed"])
def test_a_table_of_a_dataset(world, tmp_path, source, table, how):
    """Found when the table is opened, by whichever command."""
    data = worlds.copy(world.data, tmp_path / "data")
    path = data / "tables" / source / f"{table}.npy"
    if how == "flipped":
        worlds.flip(path, 0.7)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "missing":
        path.unlink()
    elif how == "of another source":
        shutil.copy(data / "tables" / SOURCES[SOURCES.index(source) - 1] / f"{table}.npy", path)
    else:
        array = np.load(path)
        np.save(path, array)
    split = "validation" if table.startswith("validation") else "train"
    with pytest.raises(UserError, match=table):
        records.load_dataset(data).tables(source, split)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("split", ["train", "validation", "corpus"])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_record_file(world, tmp_path, source, split, share):
    """By checksum with --verify; without, by ArrayRecord's own where the record is read, or not at all where no record is touched."""
    data = worlds.copy(world.data, tmp_path / "data")
    (path,) = data.glob(f"f2llm/{source}/1.0.0/*{split}.array_record*")
    worlds.flip(path, share)
    assert any(str(path) in problem for problem in folders.damage(data))
    dataset = records.load_dataset(data)
    count = dataset.sources[source].documents if split == "corpus" else dataset.sources[source].rows[split]
    with_whole = records.load_dataset(world.data).reader(source, split).read(range(count))
    try:
        found = dataset.reader(source, split).read(range(count))
    except UserError as error:
        assert str(path.parent) in str(error)
    else:
        assert all(np.array_equal(a, b) for a, b in zip(found, with_whole, strict=True))


@pytest.mark.parametrize("how", ["cut", "missing"])
@pytest.mark.parametrize("source", SOURCES)
def test_a_record_file_of_another_size_is_found_at_the_start(world, tmp_path, source, how):
    data = worlds.copy(world.data, tmp_path / "data")
    (path,) = data.glob(f"f2llm/{source}/1.0.0/*corpus.array_record*")
    path.write_bytes(path.read_bytes()[:-9]) if how == "cut" else path.unlink()
    code, errors = world.train(tmp_path / "run", data=data)
    assert code == 1 and str(path) in errors and "prepare" in errors.lower(), errors
    assert not (tmp_path / "run" / "checkpoints").exists() or not any((tmp_path / "run" / "checkpoints").iterdir())


def test_verify_reads_the_data_whole(world, tmp_path):
    data = worlds.copy(world.data, tmp_path / "data")
    (path,) = data.glob("f2llm/pairs/1.0.0/*corpus.array_record*")
    worlds.flip(path)
    code, errors = world.train(tmp_path / "run", "--verify", data=data)
    assert code == 1 and str(path) in errors, errors


JSON = ("dataset.json", "settings.json", "summary.json", "tables/pairs/source.json")
BROKEN = {
    "empty": b"",
    "half": b'{"format_version": 2, "sour',
    "list": b"[]",
    "null": b"null",
    "number": b"3",
    "deep": b"[" * 200_000,
    "binary": b"\xff\xfe\x00",
    "unsealed": b"{}",
}


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize("how", [*BROKEN, "flipped"])
def test_json_of_a_dataset(world, tmp_path, name, how):
    data = worlds.copy(world.data, tmp_path / "data")
    worlds.flip(data / name) if how == "flipped" else (data / name).write_bytes(BROKEN[how])
    with pytest.raises(UserError, match=name):
        files.read_json(data / name, sealed=True)
    if name == "dataset.json":
        code, errors = world.train(tmp_path / "run", data=data)
        assert code == 1 and name in errors and errors.count("Traceback") == 0, errors


@pytest.mark.parametrize("item", ["params", "optimizer"])
@pytest.mark.parametrize("share", SHARES[:3])
def test_an_array_of_a_checkpoint(world, tmp_path, item, share):
    run = worlds.copy(world.run, tmp_path / "run")
    path = max((run / f"checkpoints/4/{item}").rglob("d/*"), key=lambda file: file.stat().st_size)
    worlds.flip(path, share)
    assert checkpoint_damage(files.absolute(run / "checkpoints/4")) and good_steps(files.absolute(run), 4) == [2, 0]
    code, errors = world.train(run, **{"steps": 5})
    assert code == 1 and "is damaged" in errors and "--resume_from 2" in errors, errors
    code, errors = world.train(run, "--resume_from", 2)
    assert code == 0, errors
    assert [line["step"] for line in metrics(run)] == [line["step"] for line in metrics(world.run)]
    if item == "params":
        again = worlds.copy(world.run, tmp_path / "again")
        worlds.flip(max((again / "checkpoints/4/params").rglob("d/*"), key=lambda file: file.stat().st_size), share)
        code, errors = world.call("convert", "to-hf", again, tmp_path / "out")
        assert code == 1 and "is damaged" in errors and not (tmp_path / "out").exists(), errors


@pytest.mark.parametrize("how", [*BROKEN, "flipped"])
def test_metadata_of_a_checkpoint(world, tmp_path, how):
    run = worlds.copy(world.run, tmp_path / "run")
    path = run / "checkpoints/4/_CHECKPOINT_METADATA"
    if how == "flipped":
        path.write_bytes(
            path.read_bytes().replace(b'"max_length": 48', b'"max_length": 49').replace(b'"max_length":48', b'"max_length":49')
        )
    else:
        path.write_bytes(BROKEN[how])
    code, errors = world.call("convert", "to-hf", run, tmp_path / "out")
    assert code == 1 and "Traceback" not in errors and not (tmp_path / "out").exists(), errors


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("command", ["embed", "convert"])
def test_weights_of_a_release(world, tmp_path, command, share):
    model = worlds.copy(world.model, tmp_path / "model")
    worlds.flip(model / "model.safetensors", share)
    out = tmp_path / "out"
    words = ["--model", model, "--input", world.texts, "--output", out] if command == "embed" else ["to-hf", model, out]
    code, errors = world.call(command, *words)
    assert code == 1 and "model.safetensors" in errors and not out.exists(), errors


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_imported_weights(world, tmp_path, share):
    """Those of from-hf and of prune lie in chunks with a CRC-32C each; what is left of an older tree of chunks is not read."""
    worlds.expect(world, "convert", ["from-hf", world.model, tmp_path / "imported"])
    refused = 0
    for number, path in enumerate((tmp_path / "imported/checkpoints/0/params").rglob("d/*")):
        run = worlds.copy(tmp_path / "imported", tmp_path / f"run-{number}")
        worlds.flip(run / path.relative_to(tmp_path / "imported"), share)
        out = tmp_path / f"out-{number}"
        code, errors = world.call("convert", "to-hf", run, out)
        if code:
            assert code == 1 and "Traceback" not in errors and not out.exists(), errors
            refused += 1
        else:
            assert (out / "model.safetensors").read_bytes() == (world.model / "model.safetensors").read_bytes()
    assert refused


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(world, tmp_path, value):
    from safetensors.numpy import load_file, save_file

    model = worlds.copy(world.model, tmp_path / "model")
    weights = {name: array.copy() for name, array in load_file(model / "model.safetensors").items()}
    weights["norm.weight"][3] = value
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    (model / folders.MADE).unlink()  # as other software would leave it
    for command, words in (
        ("embed", ["--model", model, "--input", world.texts, "--output", tmp_path / "x.npy"]),
        ("convert", ["to-hf", model, tmp_path / "released"]),
        ("convert", ["from-hf", model, tmp_path / "imported"]),
    ):
        code, errors = world.call(command, *words)
        assert code == 1 and "not finite" in errors, errors
    assert not any((tmp_path / name).exists() for name in ("x.npy", "released", "imported"))


@pytest.mark.parametrize("how", ["flipped", "cut", "missing", "empty", "of another split", "another dtype", "another width", "fewer texts"])
@pytest.mark.parametrize("source", SOURCES)
def test_a_shard_of_cached_teacher_vectors(world, tmp_path, source, how):
    cache = worlds.copy(world.cache, tmp_path / "cache")
    (path,) = cache.glob(f"*/{source}/corpus/0.npy")
    array = np.load(path)
    if how == "flipped":
        worlds.flip(path)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "of another split":
        shutil.copy(path.parent.parent / "train" / "0.npy", path)
    else:
        changed = {"another dtype": array.astype(np.int8), "another width": array[:, :-1], "fewer texts": array[:-1]}[how]
        buffer = io.BytesIO()
        np.save(buffer, changed)
        path.write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match=r"0\.npy"):
        TeacherCache(cache, records.load_dataset(world.data), worlds.LENGTH, 16)


def test_a_teacher_vector_that_is_not_finite(tmp_path):
    cache = VectorCache(tmp_path, 4, model="m", prompt="", dtype="float32", max_length=8)
    with pytest.raises(UserError, match="not finite"):
        cache.add(["a"], np.array([[1, np.nan, 0, 0]], np.float32))
    assert not list(tmp_path.rglob("*.npy"))


@pytest.mark.parametrize("ending", [".npy", ".keys"])
@pytest.mark.parametrize("how", ["flipped", "cut", "empty"])
def test_vectors_of_an_evaluation(tmp_path, ending, how):
    options = {"model": "m", "prompt": "", "dtype": "float32", "max_length": 8}
    VectorCache(tmp_path, 4, **options).add(["a", "b"], np.ones((2, 4), np.float32))
    (path,) = tmp_path.rglob(f"*{ending}")
    if how == "flipped":
        worlds.flip(path, 0.7)
    else:
        path.write_bytes(path.read_bytes()[:-3] if how == "cut" else b"")
    with pytest.raises(UserError, match=path.name):
        VectorCache(tmp_path, 4, **options)


@pytest.mark.parametrize("how", ["flipped", "cut", "empty"])
@pytest.mark.parametrize("kind", ["vectors", "neighbours", "output"])
def test_what_mining_left(world, tmp_path, kind, how):
    cache, out = worlds.copy(world.root / "mined.cache", tmp_path / "cache"), tmp_path / "out"
    path = {"vectors": sorted(cache.rglob("*.npy")), "neighbours": sorted(cache.rglob("*.npz")), "output": [out / "pairs.parquet"]}[kind][0]
    if kind == "output":
        worlds.copy(world.mined, out)
    if how == "flipped":
        worlds.flip(path)
    else:
        path.write_bytes(path.read_bytes()[:-3] if how == "cut" else b"")
    code, errors = world.call("mine", *world.words("mine", out), "--cache", cache)
    assert code == 1 and path.name in errors, errors


@pytest.mark.parametrize("name", ["tokenizer.json"])
def test_another_tokenizer_next_to_data_and_weights(world, tmp_path, name):
    """One that makes other ids of the same texts."""
    for folder in (world.data, world.run):
        here = worlds.copy(folder, tmp_path / folder.name)
        path = here / "tokenizer" / name
        path.write_text(path.read_text().replace('"content": "<|im_end|>"', '"content": "<|im_End|>"').replace('"Ġcat"', '"Ġcaz"'))
        with pytest.raises(UserError):
            records.load_dataset(here).tokenizer() if folder == world.data else find_model(str(here))


@pytest.mark.parametrize("line", ["", "{", "nonsense", '{"step": }', "[1, 2]", "null", '{"no": 1}', "\x00\x01"])
def test_a_broken_line_of_metrics_drops_only_itself(world, tmp_path, line):
    run = worlds.copy(world.run, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    code, errors = world.train(run, **{"steps": 5})
    assert code == 0, errors
    after = (run / "metrics.jsonl").read_text().splitlines()
    assert after[: len(lines)] == lines and len(after) > len(lines)


@pytest.mark.parametrize("field", ["eval.batches"])
def test_no_validation(world, tmp_path, field):
    code, errors = world.train(tmp_path / "run", **{field: 0})
    assert code == 0 and "validation/" not in (tmp_path / "run/metrics.jsonl").read_text(), errors


@pytest.mark.parametrize("name", ["config.json", "dataset.json", "environment.json"])
@pytest.mark.parametrize("how", [*BROKEN, "flipped"])
def test_what_a_run_wrote_once(world, tmp_path, name, how):
    """Named by who reads it; never a traceback."""
    run = worlds.copy(world.run, tmp_path / "run")
    worlds.flip(run / name) if how == "flipped" else (run / name).write_bytes(BROKEN[how])
    code, errors = world.call("report", run, "--out", tmp_path / "report")
    assert code == 1 and name in errors and "Traceback" not in errors, errors
