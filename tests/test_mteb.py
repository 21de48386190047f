"""mteb through this project's encoder: its scores are those of mteb's own sentence-transformers wrapper; prompts, cache, refusals."""

import json
import os
import random

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import jax
import jax.numpy as jnp
import mteb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import threadpoolctl
import tiny
import torch
from mteb.models import ModelMeta
from mteb.models.instruct_wrapper import InstructSentenceTransformerModel
from mteb.types import PromptType

from f2llm_jax import evaluate
from f2llm_jax.cli.command import INTERRUPTED
from f2llm_jax.errors import UserError
from f2llm_jax.evaluation import instructions
from f2llm_jax.evaluation.local_tasks import _whole_gains, read_manifest
from f2llm_jax.inference import encode
from f2llm_jax.inference.encode import load_encoder
from f2llm_jax.inference.vector_cache import CachedEncoder
from f2llm_jax.release import hf_folder
from f2llm_jax.storage.files import FileError
from f2llm_jax.text import INSTRUCTION_TEMPLATE
from f2llm_jax.weights.digest import model_digest

TOPICS = {"cat": ["purr", "claw", "whisker"], "dog": ["bark", "leash", "bone"], "mat": ["floor", "woven", "yoga"]}
QUICK = ("Retrieval", "BitextMining", "STS", "PairClassification")  # the others fit classifiers and clusters
pytestmark = pytest.mark.filterwarnings("default")


def sentence(topic, rng):
    return f"the {topic} {rng.choice(TOPICS[topic])} {rng.choice(TOPICS[topic])} {rng.randrange(1000)}"


def write(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path.name


def write_manifest(folder, types=()):
    """A task of each type, small and not trivial; or of these types alone."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    topics = [list(TOPICS)[i % 3] for i in range(60)]
    judged = {
        "query-id": [f"q{i // 2}" for i in range(60)],
        "corpus-id": [f"d{i}" for i in range(60)],
        "score": [1 + i % 2 for i in range(60)],
    }
    texts, others = ([sentence(topic, rng) for topic in topics] for _ in range(2))
    labels = [topic == rng.choice(list(TOPICS)) for topic in topics]
    tasks = [
        {
            "name": "LocalRetrieval", "type": "Retrieval",
            "corpus": write(folder / "corpus.parquet", id=[f"d{i}" for i in range(60)], text=texts, title=["", "a title"] * 30),
            "queries": write(folder / "queries.parquet", id=[f"q{i}" for i in range(30)], text=others[:30]),
            "qrels": write(folder / "qrels.parquet", **judged),
        },
        {
            "name": "LocalBitext", "type": "BitextMining",
            "file": write(folder / "bitext.parquet", sentence1=texts, sentence2=[text.upper() for text in texts]),
        },
        {
            "name": "LocalClassification", "type": "Classification", "instruction": "Classify the animal.",
            "train": write(folder / "train.parquet", text=texts, label=topics),
            "test": write(folder / "test.parquet", text=others, label=topics),
        },
        {"name": "LocalClustering", "type": "Clustering", "file": write(folder / "clusters.parquet", sentences=texts, labels=topics)},
        {
            "name": "LocalSTS", "type": "STS",
            "file": write(folder / "sts.parquet", sentence1=texts, sentence2=others, score=[rng.random() for _ in texts]),
        },
        {
            "name": "LocalPairs", "type": "PairClassification",
            "file": write(folder / "pairs.parquet", sentence1=texts, sentence2=others, labels=[int(label) for label in labels]),
        },
    ]  # fmt: skip
    path = folder / "tasks.json"
    path.write_text(json.dumps({"tasks": [task for task in tasks if not types or task["type"] in types]}))
    return path


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Fits of 60 texts, and torch on a model so small, spend their time waiting for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpoolctl.threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_manifest(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    return tiny.origin(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def folder(origin, tmp_path_factory):
    out = tmp_path_factory.mktemp("release") / "model"
    hf_folder.export(origin, out, hf_folder.ReleaseForm(golden=False))
    return out


@pytest.fixture(scope="module")
def evaluated(folder, manifest, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    flags = ["--model", str(folder), "--manifest", str(manifest), "--dims", "16,full", "--out", str(out), "--name", "us/tiny"]
    flags += ["--mesh", "2,2,2"]
    assert evaluate.main(flags) == 0
    return out


def results(out, dim=None):
    """Every score of each task's result file, flat."""
    (revision,) = (out / "results" / "us__tiny").iterdir()
    where = revision / "experiments" / f"embed_dim_{dim}" if dim else revision
    found = {}
    for file in sorted(where.glob("Local*.json")):
        (scores,) = json.loads(file.read_text())["scores"]["test"]
        found[file.stem] = {key: value for key, value in scores.items() if isinstance(value, float)}
    return found


def test_every_type_scores_as_through_mtebs_own_wrapper(evaluated, folder, manifest, tmp_path):
    """Task by task, dim by dim, measure by measure, to 1e-4."""
    tasks, own = read_manifest(manifest)
    assert own == {"LocalClassification": "Classify the animal."}
    table = instructions.published() | own
    for dim in (None, 16):
        peer = InstructSentenceTransformerModel(
            str(folder), None, device="cpu", instruction_template=INSTRUCTION_TEMPLATE, prompts_dict=table,
            apply_instruction_to_passages=False, embed_dim=dim,
        )  # fmt: skip
        peer.mteb_model_meta = ModelMeta.create_empty({"name": "their/wrapper"})
        ours = results(evaluated, dim)
        assert set(ours) == {task.metadata.name for task in tasks}
        for task in read_manifest(manifest)[0]:
            kwargs = {"batch_size": 32, "normalize_embeddings": True}  # which sentence-transformers does after truncation
            found = mteb.evaluate(peer, task, cache=None, co2_tracker=False, encode_kwargs=kwargs).task_results[0].scores["test"][0]
            mine = ours[task.metadata.name]
            assert mine["main_score"] not in (0.0, 1.0) and len(mine) >= 4
            for measure, value in mine.items():
                close = np.isclose(value, found[measure], rtol=0, atol=1e-4, equal_nan=True)  # nauc is NaN where all is found
                assert close, (task.metadata.name, dim, measure)
    assert results(evaluated) != results(evaluated, 16)


def test_results_are_those_that_mteb_loads_and_the_meta_is_code(evaluated, origin):
    loaded = mteb.ResultCache(str(evaluated)).load_results(
        models=["us/tiny"], tasks=["LocalSTS", "LocalPairs"], load_experiments="match_name"
    )
    assert len(loaded.model_results) == 2  # the widths
    namespace = {}
    exec((evaluated / "model_meta.py").read_text(), namespace)  # as it would stand in mteb
    meta = namespace["tiny"]
    assert meta.name == "us/tiny" and meta.revision == model_digest(origin)[:16] and meta.embed_dim == [16, 32, 64]
    assert meta.max_tokens == 96 and meta.loader is InstructSentenceTransformerModel
    assert meta.loader_kwargs["prompts_dict"] == instructions.published()


def test_instructions_are_those_of_mtebs_wrapper_for_every_task_it_has():
    peer = object.__new__(InstructSentenceTransformerModel)
    peer.prompts_dict, peer.instruction_template = instructions.published(), INSTRUCTION_TEMPLATE
    tasks = [task.metadata for task in mteb.get_tasks(modalities=["text"], exclusive_modality_filter=True)]
    assert len(tasks) > 900
    for task in tasks:
        for kind in (None, PromptType.query):
            if kind is None and isinstance(task.prompt, dict):
                continue  # a task of queries and documents never asks so, and the wrapper would print the dictionary
            assert instructions.prompt(peer.prompts_dict, task, kind) == peer.get_task_instruction(task, kind), task.name
        assert instructions.prompt(peer.prompts_dict, task, PromptType.document) == ""


def test_a_killed_evaluation_encodes_only_what_is_missing(folder, tmp_path, monkeypatch):
    manifest = write_manifest(tmp_path / "tasks", QUICK)
    flags = ["--model", str(folder), "--manifest", str(manifest), "--out", str(tmp_path), "--name", "us/tiny"]
    monkeypatch.setattr(encode, "BLOCK_TEXTS", 16)
    blocks, seen, limit = encode.TextEncoder.encode_blocks, [], 128

    def counted(self, texts, prompt=""):
        for vectors in blocks(self, texts, prompt):
            if len(seen) >= limit:
                raise KeyboardInterrupt
            yield vectors
            seen.extend(prompt + text for text in texts[: len(vectors)])  # the cache has them now
            texts = texts[len(vectors) :]

    monkeypatch.setattr(encode.TextEncoder, "encode_blocks", counted)
    assert evaluate.main(flags) == INTERRUPTED
    first, limit = list(seen), float("inf")
    assert evaluate.main(flags) == 0
    assert 128 <= len(first) < 144 < len(seen) == len(set(seen))  # nothing twice, before or after the kill or between tasks
    scores = results(tmp_path)
    before = len(seen)
    assert evaluate.main([*flags, "--dims", "8,16,full"]) == 0
    assert len(seen) == before and results(tmp_path) == scores
    assert evaluate.main([*flags, "--dtype", "bfloat16"]) == 0
    assert len(seen) == 2 * before
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"STS": "Find the same."}))
    assert evaluate.main([*flags, "--instructions", str(own)]) == 0
    assert all(text.startswith("Instruct: Find the same.\nQuery: ") for text in seen[2 * before :]) and len(seen) > 2 * before


def cached(root, origin, **changed):
    return CachedEncoder(load_encoder(origin, **changed), root, model=model_digest(origin))


def test_nothing_is_served_for_another_prompt_dtype_limit_or_weight(origin, tmp_path):
    texts = tiny.TEXTS
    plain = cached(tmp_path, origin)
    want = plain.encode(texts)
    assert plain.encoded == len(set(texts))
    np.testing.assert_array_equal(cached(tmp_path, origin).encode(texts), want)
    again = cached(tmp_path, origin)
    np.testing.assert_array_equal(again.encode(texts[::-1], dim=16), want[::-1, :16])
    assert again.encoded == 0
    again.encode(texts, "Q: ")
    assert again.encoded == len(set(texts))
    for changed in ({"dtype": jnp.bfloat16}, {"max_length": 7}):
        other = cached(tmp_path, origin, **changed)
        assert not np.array_equal(other.encode(texts), want)
        assert other.encoded == len(set(texts))
    swapped = jax.tree.map(lambda x: x[..., ::-1], origin.load(None))  # the same numbers in another order
    other = cached(tmp_path, tiny.origin(tmp_path / "tokenizer", load=lambda mesh: swapped))
    other.encode(texts)
    assert other.encoded == len(set(texts))


def test_a_broken_segment_is_named(origin, tmp_path):
    cached(tmp_path, origin).encode(["a", "b"])
    (segment,) = tmp_path.glob("*/*.npy")
    segment.write_bytes(segment.read_bytes()[:100])
    with pytest.raises(FileError, match=segment.name):
        cached(tmp_path, origin).encode(["a"])


def test_changed_data_is_evaluated_again(folder, tmp_path):
    path = write_manifest(tmp_path / "tasks", QUICK)
    flags = ["--model", str(folder), "--manifest", str(path), "--out", str(tmp_path / "out"), "--name", "us/tiny"]
    assert evaluate.main(flags) == 0
    before = results(tmp_path / "out")
    table = pq.read_table(tmp_path / "tasks" / "sts.parquet").to_pydict()
    write(tmp_path / "tasks" / "sts.parquet", **table | {"score": table["score"][::-1]})
    assert evaluate.main(flags) == 0
    after = results(tmp_path / "out")
    assert {name for name in before if before[name] != after[name]} == {"LocalSTS"}


def test_a_beir_folder_is_read_as_the_parquet_files(manifest, tmp_path):
    (parquet, *_), _ = read_manifest(manifest)
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    for name in ("corpus", "queries"):
        rows = pq.read_table(manifest.parent / f"{name}.parquet").to_pylist()
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"_id": row.pop("id")} | row) + "\n" for row in rows))
    qrels = pq.read_table(manifest.parent / "qrels.parquet").to_pylist()
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row.values())) for row in qrels)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    (tmp_path / "tasks.json").write_text(json.dumps({"tasks": [{"name": "Beir", "type": "Retrieval", "beir": "beir"}]}))
    (beir,), _ = read_manifest(tmp_path / "tasks.json")
    beir.load_data()
    parquet.load_data()
    ours, theirs = beir.dataset["default"]["test"], parquet.dataset["default"]["test"]
    assert ours["relevant_docs"] == theirs["relevant_docs"]
    assert ours["corpus"].to_list() == theirs["corpus"].to_list() and ours["queries"].to_list() == theirs["queries"].to_list()


def test_labels_of_any_type_and_fractions_of_relevance_score_as_whole_numbers_do(folder, tmp_path):
    """Two labels that are texts (measures of two labels want numbers), truth values, and gains of halves, in other forms of file."""
    whole = write_manifest(tmp_path / "whole", ("Retrieval", "Classification", "Clustering", "PairClassification"))
    other = tmp_path / "other"
    other.mkdir()
    read = lambda name: pq.read_table(whole.parent / f"{name}.parquet").to_pylist()  # noqa: E731

    def lines(name, rows):
        (other / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    tasks = json.loads(whole.read_text())["tasks"]
    two = {"cat": "yes", "dog": "no", "mat": "no"}
    for name in ("train", "test"):
        write(whole.parent / f"{name}.parquet", **{key: [row[key] for row in read(name)] for key in ("text",)},
              label=[int(two[row["label"]] == "yes") for row in read(name)])  # fmt: skip
        lines(name, [{"text": row["text"], "label": "yes" if row["label"] else "no"} for row in read(name)])
    lines("clusters", [{"text": row["sentences"], "label": row["labels"]} for row in read("clusters")])
    lines("pairs", [row | {"labels": bool(row["labels"])} for row in read("pairs")])
    lines("corpus", [{key: value for key, value in row.items() if value} for row in read("corpus")])  # empty titles are absent
    lines("queries", read("queries"))
    rows = [f"{row['query-id']}\t{row['corpus-id']}\t{row['score'] / 2}\n" for row in read("qrels")]
    (other / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows))
    for task in tasks:
        names = {key: value for key, value in task.items() if value.endswith(".parquet")}
        task |= {key: value.replace(".parquet", ".tsv" if key == "qrels" else ".jsonl") for key, value in names.items()}
    (other / "tasks.json").write_text(json.dumps({"tasks": tasks}))
    found = []
    for manifest in (whole, other / "tasks.json"):
        out = tmp_path / f"out-{manifest.parent.name}"
        assert evaluate.main(["--model", str(folder), "--manifest", str(manifest), "--out", str(out), "--name", "us/tiny"]) == 0
        found.append(results(out))
    assert found[0].keys() == found[1].keys() == {"LocalRetrieval", "LocalClassification", "LocalClustering", "LocalPairs"}
    assert "ap" in found[0]["LocalClassification"] and found[0]["LocalRetrieval"]["ndcg_at_10"] not in (0, 1)
    for task, scores in found[0].items():
        exact = {measure: value for measure, value in scores.items() if task != "LocalClassification"}
        assert found[1][task] == pytest.approx(exact or found[1][task], nan_ok=True)


@pytest.mark.parametrize(
    ("gains", "whole"),
    [
        ([0.9, 0.5], [9, 5]),
        ([1.0, 2.0, 0.0], [1, 2, 0]),
        ([0.333333, 1.0], [333333, 10**6]),
        ([1e-9, 0.5, 3.0], [1, 500_000, 3 * 10**6]),
        ([-1, 0.5], [-2, 1]),
    ],
)
def test_gains_are_whole_numbers_in_the_same_proportion(gains, whole):
    judged = {"q": {f"d{i}": gain for i, gain in enumerate(gains)}}
    assert list(_whole_gains(judged)["q"].values()) == whole


QRELS = {"query-id": ["q0"], "corpus-id": ["d0"], "score": [1]}


@pytest.mark.parametrize(
    ("file", "columns", "message"),
    [
        ("corpus.parquet", None, "corpus.parquet does not exist"),
        ("qrels.parquet", {"query-id": [], "corpus-id": [], "score": []}, "qrels.parquet has no rows"),
        ("qrels.parquet", QRELS | {"corpus-id": ["nowhere"]}, "names the document 'nowhere', which .*corpus.parquet does not have"),
        ("qrels.parquet", QRELS | {"query-id": ["nobody"]}, "names the query 'nobody', which .*queries.parquet does not have"),
        ("qrels.parquet", QRELS | {"score": [0]}, "no row with a score above 0"),
        ("queries.parquet", {"id": ["q0", "q0"], "text": ["a", "b"]}, "row 1 has the id 'q0', as a row before it"),
        ("queries.parquet", {"id": ["q0"], "text": [None]}, "row 0, column 'text' is null"),
        ("pairs.parquet", {"sentence1": ["a"], "sentence2": ["b"], "labels": [2]}, "row 0 has the label '2'"),
        ("pairs.parquet", {"sentence1": ["a"], "sentence2": ["b"], "labels": [1]}, "both 0 and 1 must occur"),
        ("sts.parquet", {"sentence1": ["a"], "sentence2": ["b"], "score": [1.0]}, "all scores are equal"),
        ("test.parquet", {"text": ["a"], "label": ["bird"]}, "has the label 'bird'"),
        ("clusters.parquet", {"sentences": ["a"]}, "has no column 'labels'"),
        ("clusters.parquet", {"sentences": ["a", "b"], "labels": [1, 1]}, "one label only, so that any clustering is right"),
    ],
)
def test_files_that_cannot_be_evaluated_on(tmp_path, file, columns, message):
    path = write_manifest(tmp_path)
    (tmp_path / file).unlink() if columns is None else write(tmp_path / file, **columns)
    with pytest.raises(UserError, match=message):
        read_manifest(path)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([{"name": "a", "type": "Retrival", "beir": "x"}], "choose among Retrieval"),
        ([{"name": "a", "type": "Retrieval", "corpus": "x"}], "lacks queries, qrels"),
        ([{"name": "a", "type": "STS", "fiel": "x"}], "unknown field 'fiel'; did you mean 'file'"),
        ([{"name": "a/b", "type": "STS", "file": "x"}], "without a slash"),
        ([], "names no tasks"),
        ([{"name": "a", "type": ["STS"], "file": "x"}], r"task 'a' has type \['STS'\]; write a text"),
        ([{"name": "a", "type": "STS", "file": 3}], "has file 3; write a text"),
        ([{"name": "a", "type": "STS", "file": "x", "instruction": None}], "has instruction None; write a text, or leave it out"),
        ([{"name": "a", "type": "STS", "file": "x", "languages": "deu-Latn"}], "has languages 'deu-Latn'; write a list of texts"),
        ([{"name": "a", "type": "STS", "file": "x", "ignore_columns": "*"}], r"has ignore_columns '\*'; write a list of texts"),
        ([{"name": "a", "type": "STS", "file": "x", "columns": ["b"]}], r"has columns \['b'\]; write an object of texts"),
        ([{"name": "a", "type": "STS", "file": "x", "columns": {"score": 1}}], "has columns {'score': 1}; write an object of texts"),
    ],
)
def test_manifests_that_are_wrong(tmp_path, tasks, message):
    (tmp_path / "tasks.json").write_text(json.dumps({"tasks": tasks}))
    with pytest.raises(UserError, match=message):
        read_manifest(tmp_path / "tasks.json")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--benchmark", "MTEB(Multilingual, v3)"], "did you mean 'MTEB(Multilingual, v2)'"),
        (["--tasks", "Bankin77Classification"], "did you mean 'Banking77Classification'"),
        (["--manifest", "absent.json"], "absent.json does not exist"),
        (["--tasks", "STS12", "--dims", "65"], "has 64 dimensions"),
        (["--tasks", "STS12", "--mesh", "1,1,8"], "choose fsdp and tensor that divide it"),
        (["--tasks", "STS12", "--mesh", "3,1,1"], "mesh sizes (data, fsdp, tensor) = (3, 1, 1) do not fill 8 devices"),
        (
            ["--tasks", "STS12", "--instructions", "own.json"],
            "'Clasification' is no task, task type or 'query'; did you mean 'Classification'",
        ),
    ],
)
def test_errors_are_one_line_before_anything_is_encoded(folder, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.json").write_text(json.dumps({"Clasification": "x"}))
    assert evaluate.main(["--model", str(folder), "--out", str(tmp_path / "out"), *more]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
