"""Teachers behind an OpenAI-compatible endpoint, over real HTTP: order, retries, keys; and an endpoint that fails half-way."""

import contextlib
import http.server
import json
import threading

import made_vectors
import numpy as np
import pytest

from f2llm_jax import cache_teacher
from f2llm_jax.data import teacher_cache
from f2llm_jax.data.teacher_cache import TeacherCache
from f2llm_jax.errors import UserError
from f2llm_jax.teachers.endpoint import EndpointModel
from f2llm_jax.teachers.texts import StoredText

TEXTS = [StoredText("document", None, f"text {i} é") for i in range(10)]
KEY = "s3cret-key"


class Server(http.server.ThreadingHTTPServer):
    """Serves `made_vectors` under the name "made"; `failures` are answered first, one a request, and `answer` may alter what is given."""

    def __init__(self):
        self.failures, self.asked, self.requests, self.key, self.up = [], [], 0, "", 10**9
        self.answer = lambda data: data
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        server = self.server
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests += 1
            failure = server.failures.pop(0) if server.failures else None
            if server.requests > server.up:
                failure = 503
        if failure == "cut":
            self.close_connection = True
            return
        if failure is None and server.key and self.headers["Authorization"] != f"Bearer {server.key}":
            failure = 401
        if failure is None and (self.path, asked["model"]) != ("/v1/embeddings", "made"):
            failure = 404
        if failure:
            self.reply(failure, {"error": {"message": f"failure of kind {failure}"}})
            return
        with server.lock:
            server.asked += asked["input"]
        data = [{"index": i, "embedding": made_vectors.vector(text).tolist()} for i, text in enumerate(asked["input"])]
        self.reply(200, {"object": "list", "data": server.answer(data[::-1])})

    def reply(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield running
        running.shutdown()


def model(server, **options):
    return EndpointModel(server.url, "made", **{"batch": 3, "at_once": 2, "backoff": 0.001, **options})


def test_vectors_come_in_the_order_asked_for(server):
    np.testing.assert_array_equal(model(server).encode(TEXTS), np.stack([made_vectors.vector(text.text) for text in TEXTS]))
    assert model(server).width == 6 and model(server, batch=64).encode(TEXTS[:1]).shape == (1, 6)
    np.testing.assert_array_equal(EndpointModel(server.url + "/embeddings/", "made").encode(TEXTS[:2]), model(server).encode(TEXTS[:2]))
    prompted = [StoredText("query", "q: ", "who")]
    np.testing.assert_array_equal(model(server).encode(prompted)[0], made_vectors.vector("q: who"))


def test_what_passes_is_tried_again(server):
    server.failures = [429, 500, "cut", 503, 429, 502, "cut"]
    np.testing.assert_array_equal(model(server).encode(TEXTS), np.stack([made_vectors.vector(text.text) for text in TEXTS]))
    assert server.requests == 7 + 4 + 1 and sorted(server.asked) == sorted([*(text.text for text in TEXTS), "width"])


def without(field):
    return lambda data: [{key: value for key, value in item.items() if key != field} for item in data]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda data: data[1:], "2 vectors for 3 texts"),
        (lambda data: [*data, data[0]], "4 vectors for 3 texts"),
        (lambda data: [dict(item, index=0) for item in data], "3 vectors for 3 texts"),
        (without("index"), "no answer of OpenAI's protocol"),
        (without("embedding"), "no answer of OpenAI's protocol"),
        (lambda data: [dict(item, embedding="AAAA") for item in data], "no answer of OpenAI's protocol"),
        (lambda data: [dict(item, embedding=item["embedding"][: 6 - item["index"]]) for item in data], "no answer of OpenAI's protocol"),
        (lambda data: "none", "no answer of OpenAI's protocol"),
    ],
)
def test_an_answer_of_another_form_is_refused(server, answer, message):
    asking = model(server, batch=3)
    assert asking.width == 6
    server.answer = answer
    with pytest.raises(UserError, match=message):
        asking.encode(TEXTS[:3])


@pytest.mark.parametrize("number", [None, float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(tmp_path, server, small_dataset, number):
    server.answer = lambda data: [dict(item, embedding=[number, *item["embedding"][1:]]) for item in data]
    with pytest.raises(UserError, match="made: the vector of 'labels 0 cat' is not finite"):
        made_vectors.fill(model(server, batch=64), small_dataset, tmp_path, 48)
    assert not list(tmp_path.rglob("*.npy"))


def test_vectors_of_two_widths_are_refused(server):
    server.answer = lambda data: [dict(item, embedding=item["embedding"][: 7 - len(data)]) for item in data]
    with pytest.raises(UserError, match="6 numbers, and some of 4"):
        model(server).encode(TEXTS)


@pytest.mark.parametrize("failure", [400, 401, 404])
def test_a_refusal_is_told_in_the_servers_words_and_not_tried_again(server, failure):
    server.failures = [failure]
    with pytest.raises(UserError, match=rf"HTTP {failure} \(.*failure of kind {failure}.*the same command resumes") as refused:
        model(server, key=KEY).encode(TEXTS[:1])
    assert server.requests == 1 and KEY not in str(refused.value)


def test_no_endpoint(server):
    nowhere = f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"does not answer \(.*check the URL"):
        EndpointModel(nowhere, "made", retries=1, backoff=0.001).encode(TEXTS[:1])


@contextlib.contextmanager
def small_shards(texts):
    whole, teacher_cache.SHARD_TEXTS = teacher_cache.SHARD_TEXTS, texts
    yield
    teacher_cache.SHARD_TEXTS = whole


def test_an_endpoint_that_fails_half_way(tmp_path, server, small_dataset, capsys, monkeypatch):
    """Nothing of it is used before it is whole; the same command asks for no text twice, and with the key that it asks for."""
    monkeypatch.setenv("MADE_KEY", KEY)
    server.key = KEY
    out = tmp_path / "cache"
    words = ["--endpoint", server.url, "--endpoint-model", "made", "--data", small_dataset.folder, "--out", out, "--max-length", 48]
    words = [str(word) for word in [*words, "--endpoint-batch", 100, "--endpoint-requests", 4]]
    assert cache_teacher.main(words) == 1
    assert "HTTP 401" in (told := capsys.readouterr().err) and "--api-key-variable" in told
    words += ["--api-key-variable", "MADE_KEY"]
    with small_shards(512):
        server.failures, server.up = [], server.requests + 12
        monkeypatch.setattr("f2llm_jax.teachers.endpoint.RETRIED", (429,))  # a server that is gone for good
        assert cache_teacher.main(words) == 1
        told = capsys.readouterr().err
        assert "HTTP 503 (" in told and "the same command resumes" in told and KEY not in told
        with pytest.raises(UserError, match="no complete teacher cache"):
            TeacherCache(out, small_dataset, 48, None)
        stored = [shard for shard in teacher_cache.shards(small_dataset) if list(out.rglob(f"{shard.name}.npy"))]
        assert 0 < len(stored) < len(teacher_cache.shards(small_dataset))
        server.up, server.asked = 10**9, []
        assert cache_teacher.main(words) == 0
        texts = sum(shard.stop - shard.start for shard in teacher_cache.shards(small_dataset) if shard not in stored)
        assert len(server.asked) == texts + 2  # the width, and whether the model is still the same
        cache = TeacherCache(out, small_dataset, 48, None)
        cache.verify()
    [text] = small_dataset.tokenizer().backend.decode_batch([small_dataset.reader("pairs", "train").read([5])[0][:-1].tolist()])
    with small_shards(512):
        np.testing.assert_allclose(cache.read("pairs", "train", np.array([5]))[0], made_vectors.vector(text), atol=2e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--endpoint", "http://x/v1"], "--endpoint and --endpoint-model go together"),
        (["--endpoint", "http://x/v1", "--endpoint-model", "m", "--api-key-variable", "NOT_SET_HERE"], "NOT_SET_HERE: there is no such"),
        (["--model", "M", "--api-key-variable", "HOME"], "goes with --endpoint alone"),
        (["--model", "M", "--query-prompt", "q: "], "pass --retokenize"),
        (["--vectors", "V", "--document-prompt", "{instruction}: "], "documents have none"),
        (["--vectors", "V", "--retokenize"], "goes with --model alone"),
        (["--model", "M", "--vectors-of", "T"], "goes with --vectors alone"),
    ],
)
def test_flags_that_do_not_go_together(words, message, capsys):
    assert cache_teacher.main([*words, "--data", "D", "--out", "O", "--max-length", "8"]) == 1
    assert message in capsys.readouterr().err
