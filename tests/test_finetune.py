"""From a file of pairs and a model to a verified release by one command, in steps that resume; sizes from the data and the devices."""

import json
import os
import re
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from small_runs import environment

from f2llm_jax import api, finetune, sharding
from f2llm_jax.chain import finetune as chain
from f2llm_jax.configs import finetune as config_file
from f2llm_jax.data.pipeline import BatchConfig
from f2llm_jax.data.records import load_dataset
from f2llm_jax.errors import UserError
from f2llm_jax.evaluation import held_out
from f2llm_jax.model.decoder import REMAT_POLICIES, count_parameters
from f2llm_jax.model.sizes import SIZES
from f2llm_jax.release import hf_folder
from f2llm_jax.training import automatic

# TFDS and Beam use what protobuf, asyncio and Python are about to drop; none of it is ours.
pytestmark = [pytest.mark.filterwarnings(f"ignore:::{module}") for module in ("tensorflow_datasets", "apache_beam")]
QUESTIONS = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    hf_folder.export(tiny.origin(folder / "tiny"), folder / "base", hf_folder.ReleaseForm())
    rows = [{"question": f"the cat {i % QUESTIONS}", "answer": f"die Katze {i % QUESTIONS} part {i // QUESTIONS}"} for i in range(150)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(folder, *flags):
    command = [sys.executable, "-m", "f2llm_jax.finetune", "--model", "base", "--data", "pairs.jsonl", "--out", "model", *flags]
    runs_in = environment(1, folder / "compiled")
    return subprocess.run(command, cwd=folder, env=runs_in, capture_output=True, text=True, timeout=900)


STEPS = ("--config.steps=6", "--config.optimizer.learning_rate=1e-3")


@pytest.fixture(scope="module")
def done(folder):
    done = run(folder, *STEPS)
    assert done.returncode == 0, done.stderr
    return done


def test_one_command_makes_a_verified_release(folder, done):
    commands = re.findall(r"\[\d/\d\] \S+: (python -m .*)", done.stderr)
    assert [re.search(r"f2llm_jax\.(\w+)", one)[1] for one in commands] == ["prepare", "main", "convert", "recall", "convert"]
    assert "recall@10" in done.stdout and re.search(r"worst cosine \d", done.stdout)
    (figures,) = (folder / "model.work").glob("recall-*.json")
    figures = json.loads(figures.read_text())
    assert [set(of_model["pairs"]["full"]) for of_model in figures.values()] == [{"recall@1", "recall@10"}] * 2
    assert api.load(folder / "model").encode("a").shape == (64,)


def test_no_question_is_on_both_sides(folder, done):
    (data,) = (folder / "model.work").glob("data-*")
    dataset = load_dataset(data)
    sides = [
        {ids.tobytes() for ids in dataset.reader("pairs", split).read(range(rows))} for split, rows in dataset.sources["pairs"].rows.items()
    ]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == QUESTIONS
    assert 0.02 < len(sides[1]) / QUESTIONS < 0.25


def test_the_same_command_again_does_nothing_and_other_settings_keep_the_data(folder, done):
    before = {path: path.stat().st_mtime_ns for path in (folder / "model.work").rglob("*") if path.is_file() and path.name != "chain.lock"}
    again = run(folder, *STEPS)
    assert again.returncode == 0 and "python -m" not in again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "model.work").rglob("*") if path in before}
    refused = run(folder, "--config.steps=7")
    assert refused.returncode == 1 and "remove it or choose another --out" in refused.stderr
    named_otherwise = run(folder, "--model", "./base", "--data", str(folder / "pairs.jsonl"), *STEPS)
    assert named_otherwise.returncode == 0 and "python -m" not in named_otherwise.stderr
    plan = run(folder, "--out", "other", "--work", "model.work", "--plan", *STEPS)  # the same run once more, for a release elsewhere
    assert "2 of 5 done" in plan.stdout and " changed " not in plan.stdout
    plan = run(folder, "--config.steps=7", "--out", "other", "--work", "model.work", "--plan")
    assert plan.returncode == 0 and len(re.findall(r"^ +\d+  done .*f2llm_jax\.prepare", plan.stdout, re.MULTILINE)) == 1
    assert "1 of 5 done" in plan.stdout and not (folder / "other").exists()


def test_flags_of_the_data_reach_the_commands_that_read_it(folder, tmp_path):
    """What an error of `prepare` or `mine` tells to type can be typed; paths in the commands are absolute."""
    (tmp_path / "pairs.jsonl").write_bytes((folder / "pairs.jsonl").read_bytes())
    (tmp_path / "held.jsonl").write_bytes((folder / "pairs.jsonl").read_bytes())
    flags = ["--columns=query=question", "--ignore-columns=id,*_scores", "--skip-invalid", "--validation=held.jsonl", "--plan", "--mine"]
    command = [sys.executable, "-m", "f2llm_jax.finetune", "--model", os.path.relpath(folder / "base", tmp_path), "--data", "pairs.jsonl"]
    plan = subprocess.run([*command, "--out", "out", *flags], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert plan.returncode == 0, plan.stderr
    mine, prepare = re.findall(r"f2llm_jax\.(?:mine|prepare) .*", plan.stdout)
    assert "--columns=query=question '--ignore-columns=id,*_scores'" in mine and "--columns" not in prepare
    assert (
        "--skip-invalid" in prepare and f"--validation {tmp_path / 'held.jsonl'}" in prepare and f"--tokenizer {folder / 'base'}" in prepare
    )


def test_its_commands_run_alone(folder, done):
    """As they are printed, from another folder."""
    command = re.search(r"\S+: python (-m f2llm_jax\.recall .*)", done.stderr)[1]
    alone = subprocess.run([sys.executable, *shlex.split(command)], cwd="/", env=environment(), capture_output=True, text=True, timeout=300)
    assert alone.returncode == 0 and "recall@10" in alone.stdout, alone.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "absent.jsonl"], "absent.jsonl does not exist or is empty"),
        (["--model", "absent"], "absent"),
        (["--out", "gs://bucket/out"], "give a local folder for that, --work WORK"),
        (["--config.lr=1"], "did you mean config.optimizer.learning_rate"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(folder, flags, message, tmp_path):
    failed = run(folder, "--out", str(tmp_path / "out"), *flags)
    assert failed.returncode == 1 and message in failed.stderr and len(failed.stderr.strip().splitlines()) == 1, failed.stderr
    assert not list(tmp_path.iterdir())


def test_mining_comes_first_where_it_is_asked_for(folder):
    fields = {
        "model": "M",
        "digest": "0",
        "tokenizer": "M",
        "fingerprint": "t",
        "out": folder / "m",
        "root": folder / "m.work",
        "max_length": 64,
        "validation": 0.1,
    }
    plan = chain.Finetune(data=folder / "pairs.jsonl", mine=True, **fields)
    links = chain.finetune_links(plan)
    assert [link.module.removeprefix("f2llm_jax.") for link in links] == ["mine", "prepare", "main", "convert", "recall", "convert"]
    assert links[1].arguments[1] == str(folder / "m.work" / links[0].name)


def test_the_content_of_the_data_names_what_is_made_of_it(folder, tmp_path):
    def names(data, **more):
        fields = {
            "model": "M",
            "digest": "0",
            "tokenizer": "M",
            "fingerprint": "t",
            "out": tmp_path / "o",
            "root": tmp_path,
            "max_length": 64,
            "validation": 0.1,
        } | more
        return [link.name for link in chain.finetune_links(chain.Finetune(data=data, **fields))][:2]

    copy = tmp_path / "pairs.jsonl"
    copy.write_bytes((folder / "pairs.jsonl").read_bytes())
    assert names(copy) == names(folder / "pairs.jsonl")
    data, training = names(copy)
    for changed in ({"settings": "epochs=9"}, {"digest": "1"}):  # another configuration, other weights under the same name
        assert names(copy, **changed)[0] == data and names(copy, **changed)[1] != training
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_bytes(copy.read_bytes())
    before = names(copy, validation=held_out)[0]
    held_out.write_bytes(copy.read_bytes() * 2)  # other rows under the same name, and another tokenizer
    assert len({data, before, names(copy, validation=held_out)[0], names(copy, fingerprint="other")[0]}) == 4
    (tmp_path / "tasks.json").write_text('{"pairs": "retrieval"}')  # is read, too
    assert names(copy)[0] != data
    (tmp_path / "tasks.json").unlink()
    copy.write_text(copy.read_text() + '{"question": "new", "answer": "neu"}\n')
    assert names(copy)[0] != data and names(copy)[1] != training


@pytest.mark.parametrize(("samples", "size"), [(10, 8), (1_800 * 3, 32), (6_400, 64), (51_199, 256), (51_200, 512), (10**7, 512)])
def test_the_batch_leaves_a_hundred_updates(samples, size):
    assert automatic._batch_size(samples) == size


def test_learning_rates_follow_the_published_ones():
    """Within a factor of two at every published size, and exactly at the smallest."""
    from f2llm_jax.configs.common import LEARNING_RATE

    for size, published in LEARNING_RATE.items():
        assert 0.5 < automatic.learning_rate(count_parameters(SIZES[size])) / published < 2, size


def test_rows_at_once_are_those_that_compile_check_found():
    """Of two published sizes on the slices of configs/common.py, within a factor of 1.7, by the memory of their chips."""
    from f2llm_jax.configs.common import MICROBATCH_ROWS, REMAT, SLICE

    memory = {"v5e": 16 * 2**30, "v6e": 32 * 2**30, "v5p": 95 * 2**30}

    class Device:
        def __init__(self, limit):
            self.limit = limit

        def memory_stats(self):
            return {"bytes_limit": self.limit}

    class Mesh:
        def __init__(self, limit, shape):
            self.devices, self.shape = np.array([Device(limit)], object), shape

    from f2llm_jax.configs.common import FSDP

    for size in ("0.6b", "1.7b"):
        kind, _, topology = SLICE[size].partition(":")
        chips = int(np.prod([int(n) for n in topology.split("x")]))
        fsdp = FSDP.get(size, chips)
        mesh = Mesh(memory[kind], {"data": chips // fsdp, "fsdp": fsdp, "tensor": 1})
        rows = automatic.tokens_that_fit(SIZES[size], mesh, REMAT.get(size, "full")) // 1024 * chips
        assert 0.6 < rows / MICROBATCH_ROWS[size] < 1.7, (size, rows)


def test_open_fields_are_chosen_and_given_ones_kept(folder, done):
    (data,) = (folder / "model.work").glob("data-*")
    dataset = load_dataset(data)
    mesh = sharding.make_mesh(devices=jax.devices()[:2])
    config = config_file.get_config()
    chosen = automatic.schedule(automatic.batch(config, tiny.CONFIG, dataset, mesh), 57)
    assert chosen.batch.max_length == dataset.longest() and chosen.batch.row_tokens == 128
    assert (chosen.batch.size, chosen.dtype, chosen.eval.every, chosen.checkpoint.every) == (8, "float32", 5, 5)
    assert chosen.batch.microbatch_rows % 2 == 0 and config.batch.size == 0
    config.batch.update({"size": 24, "microbatch_rows": 6, "row_tokens": 256, "max_length": 100})
    config.eval.every = 3
    kept = automatic.schedule(automatic.batch(config, tiny.CONFIG, dataset, mesh), 57)
    assert (kept.batch.to_dict(), kept.eval.every) == (config.batch.to_dict(), 3)


@pytest.mark.parametrize("given", [{}, {"batch.chunk_rows": 7}, {"remat": "none"}, {"remat": "full", "batch.chunk_rows": 1}])
def test_rows_that_are_chosen_can_be_split_over_any_mesh(folder, done, given):
    (data,) = (folder / "model.work").glob("data-*")
    dataset = load_dataset(data)
    for devices in (1, 2, 8):
        config = config_file.get_config()
        config.update_from_flattened_dict(given)
        chosen = automatic.batch(config, tiny.CONFIG, dataset, sharding.make_mesh(devices=jax.devices()[:devices]))
        shape = BatchConfig(**chosen.batch.to_dict()).rows(devices)
        assert shape.chunk_rows == chosen.batch.chunk_rows and chosen.remat in REMAT_POLICIES
        assert shape.chunk_rows * shape.group_chunks == chosen.batch.microbatch_rows


def test_a_remat_that_is_not_there_is_refused(folder, done):
    (data,) = (folder / "model.work").glob("data-*")
    config = config_file.get_config()
    config.remat = "dot"
    with pytest.raises(UserError, match=r"there is no config\.remat='dot'; take none, dots, attention, full"):
        automatic.batch(config, tiny.CONFIG, load_dataset(data), sharding.make_mesh(devices=jax.devices()[:1]))


def test_search_is_the_plain_definition(folder, done):
    """recall@k of held-out queries among all documents, by sorting cosines of texts encoded one by one."""
    (data,) = (folder / "model.work").glob("data-*")
    dataset, encoder = load_dataset(data), api.load(folder / "model")
    tokenizer = dataset.tokenizer()
    rows = dataset.sources["pairs"].rows["validation"]
    queries = [tokenizer.decode(ids[:-1]) for ids in dataset.reader("pairs", "validation").read(range(rows))]
    documents = [tokenizer.decode(ids[:-1]) for ids in dataset.reader("pairs", "corpus").read(range(dataset.sources["pairs"].documents))]
    right = {}
    for query, row in zip(queries, np.asarray(dataset.tables("pairs", "validation").documents)[:, 0], strict=True):
        right.setdefault(query, set()).add(int(row))
    vectors = encoder.encode(documents)
    found = held_out.search(encoder._encoder, dataset, "pairs", ks=(1, 3, 10))
    assert (found.queries, found.documents) == (len(right), len(documents))
    for k, recall in found.recalls.items():
        nearest = {query: set(np.argsort(-(vectors @ encoder.encode(query)), kind="stable")[:k].tolist()) for query in right}
        assert recall == pytest.approx(np.mean([len(nearest[query] & own) / len(own) for query, own in right.items()]), abs=1e-9), k


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        finetune.main(["--help"])
    assert ended.value.code == 0 and "--plan" in capsys.readouterr().out
