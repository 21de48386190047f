"""A network that fails: a proxy on loopback in front of an HTTP service, which answers 503 and cuts connections now and then."""

import collections
import contextlib
import http.client
import http.server
import random
import socket
import struct
import threading

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade"}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _serve(self):
        if self.server.delay:
            threading.Event().wait(self.server.delay)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if "chunked" not in self._coding() else self._chunks()
        fault = self.server.draw()
        if fault == "503":
            self._answer(503, [], b"busy")
        elif fault == "cut before":  # the service never heard of it
            self._cut()
        else:
            status, headers, content = self._ask(body)
            if fault == "cut after":  # it has done it, and nobody knows
                self._cut()
            else:
                self.server.count("bytes", len(content))
                self._answer(status, headers, content)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = _serve

    def _coding(self):
        return self.headers.get("Transfer-Encoding", "").lower()

    def _chunks(self):
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _ask(self, body):
        connection = http.client.HTTPConnection(*self.server.behind, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP | {"content-length"}}
        with contextlib.closing(connection):
            connection.request(self.command, self.path, body or None, headers | {"Content-Length": str(len(body))})
            answer = connection.getresponse()
            content = answer.read()
            return answer.status, [(n, v) for n, v in answer.getheaders() if n.lower() not in HOP_BY_HOP], content

    def _answer(self, status, headers, content):
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() != "content-length":
                self.send_header(name, value)
        length = next((v for n, v in headers if n.lower() == "content-length"), len(content)) if self.command == "HEAD" else len(content)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _cut(self):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST instead of FIN
        self.connection.close()
        self.close_connection = True
        self.wfile = self.rfile = open(  # noqa: SIM115 - what the server flushes and closes instead
            "/dev/null", "r+b", buffering=0
        )


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, behind, share, seed, delay):
        super().__init__(("localhost", 0), _Handler)
        self.behind, self.share, self.delay, self.counts = behind, share, delay, collections.Counter()
        self._dice, self._lock = random.Random(seed), threading.Lock()

    def draw(self):
        with self._lock:
            fault = self._dice.choice(["503", "503", "cut before", "cut after"]) if self._dice.random() < self.share else "none"
            self.counts[fault] += 1
            return fault

    def count(self, name, number):
        with self._lock:
            self.counts[name] += number

    def handle_error(self, request, client_address):
        pass  # a client that is killed in the middle of a request


@contextlib.contextmanager
def between(behind, share, seed=0, delay=0.0):
    """A proxy in front of `behind` (host, port) that lets `share` of the requests fail and each wait for `delay` seconds.

    Yields its address and its counts: requests by fault ("none" for those that were served), and the "bytes" of their answers.
    """
    server = _Server(behind, share, seed, delay)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://localhost:{server.server_address[1]}", server.counts
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
