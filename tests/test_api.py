"""The Python API: one text or many, objectives and metrics of one's own, callbacks, and no trace left in the process."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_data
import tiny
from small_runs import environment

from f2llm_jax import api, objectives
from f2llm_jax.errors import UserError
from f2llm_jax.objectives import ContrastiveConfig, Objective, mean_of
from f2llm_jax.release import hf_folder
from f2llm_jax.training import program, provenance
from f2llm_jax.weights.embedding_config import DEFAULT_PROMPTS

# TFDS and Beam use what protobuf, asyncio and Python are about to drop; none of it is ours.
pytestmark = [pytest.mark.filterwarnings(f"ignore:::{module}") for module in ("tensorflow_datasets", "apache_beam")]
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("api")


@pytest.fixture(scope="module")
def base(folder):
    hf_folder.export(tiny.origin(folder / "tiny"), folder / "base", hf_folder.ReleaseForm())
    return str(folder / "base")


@pytest.fixture(scope="module")
def data(folder):
    return small_data.write(folder)


@pytest.fixture(scope="module")
def encoder(base):
    return api.load(base)


def test_importing_the_package_is_light():
    heavy = "import sys, f2llm_jax; assert not {'jax', 'numpy', 'tensorflow_datasets'} & set(sys.modules); assert f2llm_jax.api.load"
    assert subprocess.run([sys.executable, "-c", heavy]).returncode == 0


def test_a_string_is_one_text(encoder):
    one, several = encoder.encode("the cat"), encoder.encode(["the cat", "a dog", ""])
    assert one.shape == (encoder.width,) and several.shape == (3, encoder.width) and one.dtype == np.float32
    np.testing.assert_allclose(one, several[0], atol=1e-6)
    assert encoder.encode([]).shape == (0, encoder.width)
    assert encoder.encode(("the cat",)).shape == (1, encoder.width)


def test_a_mistyped_prompt_is_refused(encoder):
    for mistyped in ("qeury", "s2p-query", "web_search"):
        with pytest.raises(UserError, match=f"no prompt '{mistyped}'; it has query, document"):
            encoder.encode("the cat", prompt=mistyped)
    np.testing.assert_allclose(encoder.encode("cat", prompt="the "), encoder.encode("the cat"), atol=1e-6)


def test_vectors_are_those_of_sentence_transformers(base, encoder):
    """Normalised, with the release's prompts, truncated and normalised again."""
    import sentence_transformers

    model = sentence_transformers.SentenceTransformer(base, device="cpu")
    texts = [*tiny.TEXTS, "a" * 400]
    for prompt in ("query", "document"):
        with pytest.warns(UserWarning, match=r"\d of 10 texts are longer than 96 tokens and were truncated"):
            vectors = encoder.encode(texts, prompt=prompt)
        np.testing.assert_allclose(vectors, model.encode(texts, prompt_name=prompt), atol=2e-5)
    short = texts[:-3]
    np.testing.assert_allclose(encoder.encode(short, dim=16), model.encode(short, truncate_dim=16, normalize_embeddings=True), atol=2e-5)
    np.testing.assert_array_equal(encoder.encode("a", prompt="query"), encoder.encode("a", prompt=DEFAULT_PROMPTS["query"]))


def test_raw_vectors_on_request(encoder):
    raw = encoder.encode(["the cat", "a dog"], normalize=False)
    assert not np.allclose(np.linalg.norm(raw, axis=1), 1)
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), encoder.encode(["the cat", "a dog"]), atol=1e-6)
    assert encoder.encode("the cat", dim=8, normalize=False).shape == (8,)


def test_texts_may_be_anything_that_gives_texts(encoder):
    texts = ["the cat", "a dog"]
    expected = encoder.encode(texts)
    for same in (np.array(texts), np.array(texts, object), (text for text in texts), dict.fromkeys(texts).keys()):
        np.testing.assert_array_equal(encoder.encode(same), expected)
    np.testing.assert_array_equal(encoder.encode(np.array(texts)[0], prompt=None), expected[0])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (None, "texts is a NoneType"),
        (b"the cat", "texts is a bytes"),
        ({"query": "the cat"}, "texts is a dict; give one text"),  # its keys were encoded
        ({"the cat"}, "texts is a set"),
        (np.array([["the cat", "a dog"]]), "texts is a ndarray"),
        (["the cat", None], r"texts\[1\] is None \(NoneType\), not a str"),
        (["the cat", float("nan")], r"texts\[1\] is nan \(float\)"),
        ([["the cat", "a dog"]], r"texts\[0\] is \['the cat', 'a dog'\] \(list\)"),
        (["\ud800"], r"texts\[0\] is no Unicode text"),
    ],
)
def test_what_is_no_text_is_refused(encoder, texts, message):
    with pytest.raises(UserError, match=message):
        encoder.encode(texts)


@pytest.mark.parametrize("options", [{"dtype": "float16"}, {"dtype": "half"}, {"max_length": 0}, {"max_length": 4.5}])
def test_what_a_model_is_not_loaded_with_is_refused(base, options):
    (name, value) = next(iter(options.items()))
    with pytest.raises(UserError, match=f"{name}={value!r}"):
        api.load(base, **options)


@pytest.mark.parametrize("dim", [0, -1, 65, 8.0, True, "8"])
def test_a_width_that_the_model_does_not_have_is_refused(encoder, dim):
    with pytest.raises(UserError, match=f"dim={dim!r} must be from 1 to the model's 64 dimensions"):
        encoder.encode("a", dim=dim)


def test_one_text_in_place_of_a_list_is_refused_further_down(encoder):
    """The class that the commands use takes a list; a string there was one text a letter."""
    with pytest.raises(TypeError, match="one string"):
        encoder._encoder.encode("hello")


def test_rows_and_files_are_prepared_alike(base, folder):
    rows = [{"frage": f"the cat {i // 2}", "antwort": f"die Katze {i}"} for i in range(80)]
    options = {"columns": {"query": "frage", "passage": "antwort"}, "instruction": "Find the cat.", "validation": 0.2, "workers": 1}
    dataset = api.prepare(rows, base, folder / "of_rows", **options)
    again = api.prepare(iter(rows), base, folder / "of_rows", **options)
    assert again.digest == dataset.digest == api.prepare(folder / "of_rows.rows", base, folder / "of_file", **options).digest
    info = dataset.sources["rows"]
    assert info.kind == "retrieval" and sum(info.rows.values()) == 80 and info.rows["train"] % 2 == 0  # both rows of a question on one side
    first = dataset.tokenizer().decode(dataset.reader("rows", "train").read([0])[0])
    assert first.startswith("Instruct: Find the cat.\nQuery: the cat")
    with pytest.raises(UserError, match="overwrite"):
        api.prepare(rows[:50], base, folder / "of_rows", **options)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", "b")], r"data\[0\] is \('a', 'b'\); a row is a dict"),
        ({"query": "a", "passage": "b"}, "data is a dict; give a list of rows"),
        (np.array([["a", "b"]]), "data is a ndarray"),
        ([{"query": "a", "passage": {1, 2}}], r"data has the value \{1, 2\} \(set\)"),
        ([{"query": "a", "passage": "b", "doc_id": "7"}], r"leave it out with ignore_columns=\[\"doc_id\"\]"),
        ([{"question": "a", "reply": "b"}], r"name the column that holds it with columns=\{\"passage\": \"NAME\"\}"),
    ],
)
def test_rows_that_are_none_are_refused_in_words_of_python(base, tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        api.prepare(rows, base, tmp_path / "data")


def test_arrays_and_other_columns_in_rows(base, tmp_path):
    rows = [
        {"query": f"cat {i}", "passage": np.str_(f"Katze {i}"), "negatives": np.array([f"dog {i}", "mat"]), "doc_id": i} for i in range(40)
    ]
    dataset = api.prepare(rows, base, tmp_path / "data", ignore_columns=["doc_id"], workers=1)
    assert dataset.sources["rows"].negatives == 2


@pytest.mark.parametrize(
    "options", [{"validation": 1.5}, {"validation": -1}, {"stage": 3}, {"cap": -1}, {"split_by": "text"}, {"max_length": 0}]
)
def test_recipes_that_are_none_are_refused(base, tmp_path, options):
    (name, value) = next(iter(options.items()))
    with pytest.raises(UserError, match=f"{name}={value!r} must be"):
        api.prepare([{"query": "a", "passage": "b"}] * 40, base, tmp_path / "data", **options)


SCRIPT = """
import pathlib, sys
from f2llm_jax import api

pathlib.Path("runs").open("a").write("once\\n")
print(sorted(api.prepare("raw", sys.argv[1], "data", workers=2).sources))
"""


@pytest.mark.slow
def test_a_script_without_a_guard_runs_once(base, tmp_path):
    """Workers are processes of their own, which by themselves would run the script again, its training included."""
    (tmp_path / "raw").mkdir()
    for name in ("one", "two"):
        rows = [{"query": f"{name} {i}", "passage": f"passage {i}"} for i in range(30)]
        (tmp_path / "raw" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py", base], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == "['one', 'two']\n", done.stderr
    assert (tmp_path / "runs").read_text() == "once\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "split='test': choose one of train, validation"),
        ({"sources": ["pairz"]}, "no source 'pairz'; there are: labels, pairs, topics"),
        ({"negatives": {"retrival": 3}}, "the task kind 'retrival'; there are: retrieval"),
        ({"max_length": 0}, "max_length=0 must be"),
        ({"epochs": 1.5}, "epochs=1.5 must be a whole number"),
        ({"epochs": 0}, "epochs=0 must be a whole number"),
    ],
)
def test_batches_of_what_is_not_there_are_refused(data, options, message):
    with pytest.raises(UserError, match=message):
        next(api.batches(data, **options))


def test_an_epoch_has_every_row_once(data):
    seen = {}
    for step in api.batches(data, 16):
        seen.setdefault(step.plan.source, []).extend(step.plan.rows.tolist())
        assert step.batch.text_count == len(step.batch.samples.sample_mask) * (2 + step.batch.samples.negative_mask.shape[1])
    assert {source: sorted(rows) for source, rows in seen.items()} == {
        source: list(range(info.rows["train"])) for source, info in data.sources.items()
    }
    assert {step.plan.source for step in api.batches(str(data.folder), 16, sources=["pairs"])} == {"pairs"}
    assert {step.plan.source for step in api.batches(data, 16, sources="pairs")} == {"pairs"}


def settings(base, data, **more):
    fields = {"init": base, "data.folder": data.folder, "steps": STEPS, "batch.size": 16, "batch.microbatch_rows": 8, "remat": "none"}
    return (
        fields
        | {"data.weights": "labels=0,topics=0", "eval.batches": 8, "optimizer.learning_rate": 1e-3, "mesh.fsdp": 1, "mesh.data": -1}
        | more
    )


@pytest.fixture(scope="module")
def plain(base, data, folder):
    """A finished run of the package's own objective."""
    return folder / "plain", api.train(settings(base, data, **{"objective.matryoshka": False}), folder / "plain").values("loss")


def triplet(margin, embeddings, samples, teacher):
    """Each positive nearer than the hardest other passage by a margin; counts how often it is."""
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    cosines = unit(embeddings.query) @ unit(embeddings.passage).T
    own = jnp.diagonal(cosines)
    rival = (samples.passage_ids[:, None] != samples.passage_ids[None, :]) & (samples.sample_mask > 0)[None, :]
    hardest = jnp.max(jnp.where(rival, cosines, -1.0), axis=1)
    loss = mean_of(jax.nn.relu(margin - own + hardest), samples.sample_mask)
    return loss.value, {"triplet": loss, "far_enough": mean_of(own > hardest + margin, samples.sample_mask)}


def test_an_objective_and_metrics_of_ones_own(base, data, folder, quick_compilation):
    """On eight devices, by plain jax.numpy; its metrics come back by name, of training and of held-out rows."""
    seen = []
    record = api.train(
        settings(base, data),
        folder / "own",
        objective=functools.partial(triplet, 1.0),
        callbacks=[lambda step, values: seen.append((step, values))],
    )
    assert list(record.values("triplet")) == list(range(1, STEPS + 1)) == list(record.values("far_enough"))
    assert record.values("loss") == record.values("triplet")
    held_out = record.values("validation/objective")
    assert list(held_out) == list(range(STEPS + 1)) and held_out[STEPS] < held_out[0] and held_out == record.values("validation/triplet")
    assert {step: values["triplet"] for step, values in seen if "triplet" in values} == record.values("triplet")
    assert not jax.sharding.get_mesh().axis_names  # the process is as it was
    assert api.load(folder / "own").width == 64
    for other in (functools.partial(triplet, 0.5), lambda *arrays: triplet(1.0, *arrays), None):
        with pytest.raises(UserError, match="own objective: 'triplet:"):
            api.train(settings(base, data, steps=STEPS + 1), folder / "own", objective=other)


def test_objectives_are_told_apart():
    """By name, code and what is bound to them; alike in another process, where addresses differ."""
    half, whole = (functools.partial(triplet, margin) for margin in (0.5, 1.0))
    closed = [(lambda bound: lambda *arrays: triplet(bound, *arrays))(margin) for margin in (0.5, 0.5, 1.0)]
    told = [provenance.described(one) for one in (triplet, half, whole, lambda *arrays: half(*arrays), *closed[1:], objectives.total)]
    assert len(set(told)) == len(told)
    assert provenance.described(closed[0]) == provenance.described(closed[1]) and "0x" not in "".join(told)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (jnp.float32(1), r"must return \(loss, metrics\)"),
        ((jnp.float32(1), None), r"must return \(loss, metrics\)"),
        ((jnp.ones(3), {}), "loss must be one number"),
        ((mean_of(jnp.ones(3), jnp.ones(3)), {}), "loss must be one number"),
        ((1, {}), "loss must be one number"),
        ((jnp.float32(1), {"mine": jnp.float32(1)}), "metric 'mine' must be a `mean_of"),
        ((jnp.float32(1), {"grad_norm": mean_of(jnp.ones(3), jnp.ones(3))}), "metric 'grad_norm' has the name of one"),  # it was dropped
    ],
)
def test_what_is_no_result_of_an_objective_is_refused(result, message):
    with pytest.raises(UserError, match=message):
        program._checked(result)


def test_a_metric_that_would_be_dropped_is_refused_before_the_first_step(base, data, tmp_path):
    with pytest.raises(UserError, match="metric 'loss' has the name"):
        api.train(
            settings(base, data),
            tmp_path / "run",
            objective=lambda e, s, t: (jnp.sum(e.query), {"loss": mean_of(s.sample_mask, s.sample_mask)}),
        )
    assert not (tmp_path / "run" / "checkpoints").exists() or not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.slow
def test_the_packages_objective_passed_as_ones_own_trains_the_same(base, data, folder, plain, quick_compilation):
    fields = settings(base, data, **{"objective.matryoshka": False})
    same = functools.partial(objectives.total, objective=Objective(contrastive=ContrastiveConfig(mask_false_negatives=True)))
    passed = api.train(fields, folder / "passed", objective=lambda e, s, t: same(e, s, teacher=t)).values("loss")
    np.testing.assert_allclose(list(passed.values()), list(plain[1].values()), rtol=2e-4)


def test_a_finished_run_says_so_and_changes_nothing(base, data, plain, capsys):
    workdir, _ = plain
    before = (workdir / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    api.train(settings(base, data, **{"objective.matryoshka": False}), workdir)
    said = capsys.readouterr().err
    assert f"finished: all {STEPS} steps are done" in said and "resumes" not in said and "compiling" not in said
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_a_release_from_python(folder, plain):
    api.release(plain[0], folder / "released", dtype="bfloat16")
    assert api.load(folder / "released").encode("a").shape == (64,)
    with pytest.raises(UserError, match="not empty"):
        api.release(plain[0], folder / "released")
    with pytest.raises(UserError, match="is read from there"):
        api.release(folder / "released", folder / "released", overwrite=True)
    (folder / "2026").symlink_to(plain[0])  # a workdir with a number for a name is no checkpoint
    np.testing.assert_array_equal(api.load(folder / "2026").encode("a"), api.load(plain[0]).encode("a"))


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({}, {"callbacks": print}, "callbacks=<built-in function print> must be a list of functions"),
        ({}, {"callbacks": ["wandb"]}, "must be a list of functions"),
        (None, {}, "config=None must be a configuration"),
    ],
)
def test_arguments_of_another_kind_are_refused(tmp_path, config, options, message):
    with pytest.raises(UserError, match=message):
        api.train(config, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_fields_that_do_not_exist_are_named(base, data, folder):
    with pytest.raises(UserError, match=r"did you mean config\.optimizer\.learning_rate"):
        api.train({"init": base, "lr": 1e-3}, folder / "refused")
    assert not (folder / "refused").exists()
