"""The table of forms by commands: every command on every form of file, the same rows and hence the same outcome, or a refusal by name."""

import json

import formats
import gcs
import numpy as np
import pyarrow.parquet as pq
import pytest
import sentence_transformers
import sklearn.metrics
import tiny
from etils import epath

from f2llm_jax import embed, evaluate, mine, prepare, recall
from f2llm_jax.data import records
from f2llm_jax.release import hf_folder
from f2llm_jax.text import DEFAULT_QUERY_INSTRUCTION, query_prompt

pytestmark = [
    pytest.mark.slow,
    *(pytest.mark.filterwarnings(f"ignore:::{module}") for module in ("tensorflow_datasets", "apache_beam")),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]
COMMANDS = ("prepare", "mine", "build", "recall", "evaluate", "embed")
# `prepare` reads in processes of its own, which the stand-in for the Hub does not reach.
CELLS = [(command, form) for command in COMMANDS for form in formats.FORMS if (command, form) != ("prepare", "hf://")]
PAIRS = {
    "query": [row[0] for row in formats.ROWS],
    "passage": [row[1] for row in formats.ROWS],
    "negative_1": [row[2][0] for row in formats.ROWS],
    "negative_2": [row[2][1] for row in formats.ROWS],
    "lang": [row[3] for row in formats.ROWS],
}
# By command: the columns that it reads, and the one that a partitioned folder has in its names.
READ = {
    "build": ({"text": [text for text, _ in formats.LABELS], "label": [label for _, label in formats.LABELS]}, "label"),
    "evaluate": ({"sentence1": PAIRS["query"], "sentence2": PAIRS["passage"], "part": PAIRS["lang"]}, "part"),
    "embed": ({"text": ["one", "", "two \u2028 parts", "007", "cat"], "part": ["a", "a", "b", "b", "b"]}, "part"),
}
# What a command cannot mean by a form, and what its refusal names.
REFUSED = {
    **{(command, form): "has no column" for command in ("mine", "recall", "build", "evaluate") for form in formats.LINES},
    **{("prepare", form): "has no column" for form in formats.LINES},
    **{(command, "lists"): "is a list, not a text" for command in ("build", "evaluate", "embed")},
    **{(command, "beir"): "is a BEIR folder" for command in ("build", "evaluate", "embed")},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    hf_folder.export(tiny.origin(folder / "tokenizer"), folder / "model", hf_folder.ReleaseForm(golden=False))
    return str(folder / "model")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Where each form lies, by command and form; `gs://` is an emulator, `hf://` fsspec's memory in the place of the Hub."""
    import fsspec
    from etils.epath import backend

    folder, hub = tmp_path_factory.mktemp("forms"), fsspec.filesystem("memory")
    original = backend.fsspec_backend.fs
    with pytest.MonkeyPatch.context() as patch, gcs.emulator() as bucket:
        patch.setattr(backend.fsspec_backend, "fs", lambda path: hub if str(path).startswith("hf://") else original(path))
        found = {}
        for command in COMMANDS:
            columns, partition = READ.get(command, (PAIRS, "lang"))
            (folder / command).mkdir()
            for form in formats.FORMS:
                name = form.replace(".", "_").replace("://", "")
                if form in ("gs://", "hf://"):
                    local = formats.write("parquet", columns, folder / command / f"local_{name}", partition)
                    remote = epath.Path(f"{bucket if form == 'gs://' else 'hf://datasets/us'}/{command}/{name}.parquet")
                    remote.write_bytes(local.read_bytes())
                    local.unlink()
                    found[command, form] = str(remote)
                else:
                    found[command, form] = str(formats.write(form, columns, folder / command / name, partition))
        yield found


def forms(command):
    return [form for form in formats.FORMS if (command, form) not in REFUSED]


def source(place):
    return epath.Path(place).name.split(".")[0]


def stored(dataset, name):
    """Query, documents and language of every row of a source, decoded."""
    decode, rows = dataset.tokenizer().decode, []
    for split in records.QUERY_SPLITS:
        reader, corpus = dataset.reader(name, split), dataset.reader(name, "corpus")
        for row, numbers in enumerate(dataset.tables(name, split).documents):
            texts = [decode(ids[:-1]) for ids in (*reader.read([row]), *corpus.read([n for n in numbers.tolist() if n >= 0]))]
            rows.append((*texts, reader.languages([row])[0]))
    return sorted(rows)


@pytest.fixture(scope="module")
def prepared(places, tmp_path_factory):
    """Rows of each source by form: one run over the folder of all, and one for each form that must be named."""
    folder = tmp_path_factory.mktemp("prepared")
    tiny.write_tokenizer(folder / "tokenizer")
    found = {}
    for form in ("parquet", "json", "gs://"):
        raw = str(epath.Path(places["prepare", form]).parent) if form == "parquet" else places["prepare", form]
        out = folder / form.replace("://", "")
        flags = ["--raw", raw, "--tokenizer", str(folder / "tokenizer"), "--out", str(out), "--workers", "1", "--cap", "0"]
        assert prepare.main(flags) == 0, form
        dataset = records.load_dataset(out)
        found |= {name: stored(dataset, name) for name in dataset.sources}
    return found


@pytest.fixture(scope="module")
def mined(model, places, tmp_path_factory):
    out = tmp_path_factory.mktemp("mined") / "out"
    loose = (
        "--negatives",
        "2",
        "--skip",
        "0",
        "--max-score",
        "none",
        "--max-relative",
        "none",
        "--near-duplicate",
        "2",
        "--instruction",
        "",
    )
    queries = [places["mine", form] for form in forms("mine")]
    assert mine.main(["--model", model, "--queries", *queries, "--out", str(out), *loose]) == 0
    return out


@pytest.fixture(scope="module")
def built(places, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "out"
    queries = [places["build", form] for form in forms("build")]
    flags = ["--build", "clustering", "--negatives", "1", "--instruction", "", "--queries", *queries, "--out", str(out)]
    assert mine.main(flags) == 0
    return out


@pytest.fixture(scope="module")
def recalled(model, places, tmp_path_factory):
    out = tmp_path_factory.mktemp("recalled") / "recall.json"
    pairs = [places["recall", form] for form in forms("recall")]
    assert recall.main(["--model", model, "--pairs", *pairs, "--dims", "full", "--json", str(out)]) == 0
    return json.loads(out.read_text())[model]


@pytest.fixture(scope="module")
def evaluated(model, places, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    more = {"type": "BitextMining", "instruction": "", "ignore_columns": ["part"]}
    tasks = [{"name": source(places["evaluate", form]), "file": places["evaluate", form], **more} for form in forms("evaluate")]
    (folder / "tasks.json").write_text(json.dumps({"tasks": tasks}))
    assert evaluate.main(["--model", model, "--manifest", str(folder / "tasks.json"), "--dims", "full", "--out", str(folder / "out")]) == 0
    return {
        path.stem: json.loads(path.read_text())["scores"]["test"][0]["f1"]
        for path in folder.rglob("out/**/*.json")
        if "scores" in path.read_text()
    }


@pytest.fixture(scope="module")
def peer(model):
    return sentence_transformers.SentenceTransformer(model, device="cpu")


def check_prepare(form, place, request):
    prompt = query_prompt(DEFAULT_QUERY_INSTRUCTION) if form == "beir" else ""
    rows = [
        (prompt + query, passage, *(negatives if form != "beir" else ()), language if form != "beir" else "")
        for query, passage, negatives, language in formats.ROWS
    ]
    assert request.getfixturevalue("prepared")[source(place)] == sorted(rows)


def check_mine(form, place, request):
    rows = pq.read_table(request.getfixturevalue("mined") / f"{source(place)}.parquet").to_pylist()
    found = {row["query"]: (row["passage"], row["negative_1"], row["negative_2"], row.get("lang")) for row in rows}
    if form == "beir":  # whose negatives are mined
        assert {query: texts[0] for query, texts in found.items()} == {query: passage for query, passage, _, _ in formats.ROWS}
        assert all({*texts[1:3]} <= set(PAIRS["passage"]) - {texts[0]} for texts in found.values())
    else:
        assert found == {query: (passage, *negatives, language) for query, passage, negatives, language in formats.ROWS}


def check_build(form, place, request):
    rows = pq.read_table(request.getfixturevalue("built") / f"{source(place)}.parquet").to_pylist()
    assert {(row["query"], row["passage"]) for row in rows} == {("one", "six"), ("six", "one")}  # 007 is neither 7 nor 1.0


def check_recall(form, place, request):
    peer = request.getfixturevalue("peer")
    prompt = query_prompt(DEFAULT_QUERY_INSTRUCTION) if form == "beir" else ""
    pool = PAIRS["passage"] if form == "beir" else PAIRS["passage"] + PAIRS["negative_1"] + PAIRS["negative_2"]
    scores = peer.encode([prompt + query for query in PAIRS["query"]]) @ peer.encode(pool).T
    hits = [pool[best] == passage for best, passage in zip(scores.argmax(1), PAIRS["passage"], strict=True)]
    assert request.getfixturevalue("recalled")[source(place)]["full"]["recall@1"] == pytest.approx(np.mean(hits))


def check_evaluate(form, place, request):
    peer = request.getfixturevalue("peer")
    best = (peer.encode(PAIRS["query"]) @ peer.encode(PAIRS["passage"]).T).argmax(1)
    want = sklearn.metrics.f1_score(range(len(best)), best, average="weighted", zero_division=0)
    assert request.getfixturevalue("evaluated")[source(place)] == pytest.approx(want)


def check_embed(form, place, request):
    out = request.getfixturevalue("tmp_path") / "vectors.npy"
    flags = ["--model", request.getfixturevalue("model"), "--input", place, "--output", str(out), "--ignore-columns", "part"]
    assert embed.main(flags) == 0
    theirs = request.getfixturevalue("peer").encode(READ["embed"][0]["text"])
    assert (np.load(out) * theirs).sum(1).min() >= 0.99999


def refusing(command, place, model, folder):
    """The flags of a command on one form alone."""
    if command == "evaluate":
        task = {"name": "One", "type": "BitextMining", "file": place, "ignore_columns": ["part"]}
        (folder / "tasks.json").write_text(json.dumps({"tasks": [task]}))
        return evaluate, ["--model", model, "--manifest", str(folder / "tasks.json"), "--out", str(folder / "out")]
    return {
        "prepare": (prepare, ["--raw", place, "--tokenizer", model, "--out", str(folder / "out")]),
        "mine": (mine, ["--model", model, "--queries", place, "--out", str(folder / "out")]),
        "build": (mine, ["--build", "clustering", "--queries", place, "--out", str(folder / "out")]),
        "recall": (recall, ["--model", model, "--pairs", place]),
        "embed": (embed, ["--model", model, "--input", place, "--output", str(folder / "out.npy")]),
    }[command]


@pytest.mark.parametrize(("command", "form"), CELLS)
def test_a_command_on_a_form(command, form, places, request, model, tmp_path, capsys):
    place = places[command, form]
    if (command, form) not in REFUSED:
        globals()[f"check_{command}"](form, place, request)
        return
    module, flags = refusing(command, place, model, tmp_path)
    assert module.main(flags) == 1
    message = capsys.readouterr().err
    assert REFUSED[command, form] in message and epath.Path(place).name in message
