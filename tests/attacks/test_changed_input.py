"""Another input where the same was expected: refused by name, and nothing is changed by the attempt."""

import pytest
import world as worlds

from f2llm_jax.data import records
from f2llm_jax.storage import files

pytestmark = [
    *(pytest.mark.filterwarnings(f"ignore:::{module}") for module in ("tensorflow_datasets", "apache_beam")),
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.slow,
]

# Each changes the order of the data or what is trained.
REFUSED = {
    "seed": 1,
    "dtype": "bfloat16",
    "table_rank": 8,
    "batch.size": 16,
    "batch.max_length": 40,
    "batch.row_tokens": 64,
    "batch.row_texts": 4,
    "batch.negatives.retrieval": 2,
    "batch.negatives.clustering": 3,
    "batch.negatives_per_sample": "row",
    "objective.temperature": 0.1,
    "objective.matryoshka": "False",
    "objective.matryoshka_minimum": 32,
    "objective.layer_matryoshka": "True",
    "objective.in_batch_pool": "positives_and_negatives",
    "objective.hard_weight": 0.5,
    "objective.in_batch_passage_grad": "none",
    "objective.mask_false_negatives": "True",
    "objective.false_negative_margin": 0.2,
    "objective.distillation": "cosine",
    "objective.distillation_weight": 0.5,
    "objective.spread_out_weight": 0.1,
    "optimizer.warmup_steps": 2,
    "optimizer.beta1": 0.8,
    "optimizer.beta2": 0.9,
    "optimizer.weight_decay": 0.1,
    "optimizer.clip_norm": 0.5,
}
ALLOWED = {
    "steps": 5,
    "optimizer.learning_rate": 1e-3,
    "log_every": 1,
    "max_skipped_steps": 3,
    "hang_minutes": 0.0,
    "eval.batches": 1,
    "checkpoint.keep": 4,
    "batch.microbatch_rows": 8,
    "batch.chunk_rows": 4,
    "data.threads": 1,
    "data.ahead": 2,
}


@pytest.mark.parametrize(("field", "value"), REFUSED.items())
def test_a_run_resumes_only_as_itself(world, tmp_path, field, value):
    run = worlds.copy(world.run, tmp_path / "run")
    before = {name: content for name, content in worlds.snapshot(run).items() if not name.startswith("logs")}
    code, errors = world.train(run, **{field: value})
    after = {name: content for name, content in worlds.snapshot(run).items() if not name.startswith("logs")}
    assert code == 1 and "is another run" in errors and f"{field}: " in errors, errors
    assert after == before


@pytest.mark.parametrize(("field", "value"), ALLOWED.items())
def test_what_may_change_is_told_and_kept(world, tmp_path, field, value):
    run = worlds.copy(world.run, tmp_path / "run")
    code, errors = world.train(run, **{field: value})
    assert code == 0 and f"{field}: " in errors, errors
    history = files.read_json(run / "config.json", sealed=True)["history"]
    assert [list(entry["changes"]) for entry in history][-1].count(field) == 1 and history[-1]["step"] == worlds.STEPS


def test_rows_in_another_order_are_other_data(world, tmp_path):
    one, other = records.load_dataset(world.data), records.load_dataset(world.other)
    assert [source.rows for source in one.sources.values()] == [source.rows for source in other.sources.values()]
    assert one.tokenizer_fingerprint == other.tokenizer_fingerprint and one.digest != other.digest
    run = worlds.copy(world.run, tmp_path / "run")
    code, errors = world.train(run, data=world.other)
    assert code == 1 and "content of the data" in errors, errors
    code, errors = world.train(tmp_path / "new", data=world.other, teacher_cache=world.cache)
    assert code == 1 and "made from other data" in errors, errors


def test_data_that_was_moved_is_the_same_data(world, tmp_path):
    run, data = worlds.copy(world.run, tmp_path / "run"), worlds.copy(world.data, tmp_path / "moved")
    code, errors = world.train(run, data=data)
    assert code == 0 and "data.folder" in errors, errors


def test_changes_that_are_meant_are_recorded(world, tmp_path):
    run = worlds.copy(world.run, tmp_path / "run")
    code, errors = world.train(run, "--resume_with_changes", seed=1, steps=5)
    assert code == 0, errors
    (entry,) = files.read_json(run / "config.json", sealed=True)["history"]
    assert entry["changes"]["seed"] == {"before": 0, "now": 1} and entry["step"] == worlds.STEPS


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_fewer_updates_than_the_checkpoint_has(world, tmp_path, steps):
    run = worlds.copy(world.run, tmp_path / "run")
    before = worlds.snapshot(run / "checkpoints") | {"config": (run / "config.json").read_bytes()}
    code, errors = world.train(run, **{"steps": steps, "optimizer.warmup_steps": 0}, **{})
    assert code == 1 and ("has made 4 updates" in errors or "is another run" in errors), errors
    assert worlds.snapshot(run / "checkpoints") | {"config": (run / "config.json").read_bytes()} == before


@pytest.mark.parametrize("step", [0, 2])
def test_an_older_checkpoint_by_name(world, tmp_path, step):
    """Resumed from any of its checkpoints, a run ends as it did, to the byte."""
    run = worlds.copy(world.run, tmp_path / "run")
    code, errors = world.train(run, "--resume_from", step)
    assert (code == 0 and f"resumes at step {step}" in errors) or step == 0, errors
    assert (run / "metrics.jsonl").read_text().count('"loss"') == (world.run / "metrics.jsonl").read_text().count('"loss"')


@pytest.mark.parametrize("step", [1, 3, 99])
def test_a_checkpoint_that_is_not_there(world, tmp_path, step):
    run = worlds.copy(world.run, tmp_path / "run")
    code, errors = world.train(run, "--resume_from", step)
    assert code == 1 and f"no complete checkpoint of step {step}" in errors and "[0, 2, 4]" in errors, errors


@pytest.mark.parametrize("command", ["prepare", "mine", "cache_teacher"])
def test_an_output_of_other_inputs_is_not_taken_for_this_one(world, tmp_path, command):
    done = {"prepare": world.data, "mine": world.mined, "cache_teacher": world.cache}[command]
    out = worlds.copy(done, tmp_path / "out")
    words = world.words(command, out)
    words[words.index({"prepare": "--max-length", "mine": "--negatives", "cache_teacher": "--dims"}[command]) + 1] = "7"
    before = worlds.snapshot(out)
    code, errors = world.call(command, *words)
    assert code == 1 and str(out) in errors, errors
    assert worlds.snapshot(out) == before
