"""HTTP servers for tests of the clients of services; all on 127.0.0.1, all closed by their ``with`` block.

:class:`FlakyProxy` stands in front of a service, real or not, and disturbs a share of the requests.
:class:`SmallService` speaks the protocol of ``clip-retrieval back`` with an exact search behind it. It is there for
answers that the real service cannot be made to give, such as a 503 or a redirect; that the client and the real service
understand each other is tested in tests/integration/pipeline/test_knn_service.py.
"""

from __future__ import annotations

import gzip
import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import numpy as np

JSON = {"Content-Type": "application/json"}
Reply = tuple[int, dict[str, str], bytes]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
# Replies that never end, for Raw: what is sent first, and what comes for ever then.
DRIPS = {
    "length": ([HEAD + b"Content-Length: 100000\r\n\r\n["], b" "),
    "no length": ([HEAD + b"\r\n["], b" "),
    "chunks": ([HEAD + b"Transfer-Encoding: chunked\r\n\r\n"], b"1\r\n \r\n"),
    "header": ([HEAD], b"x"),
    "headers": ([HEAD], b"X: y\r\n"),
    "status": ([], b"H"),
    "continue": ([], b"HTTP/1.1 100 Continue\r\n\r\n"),
    "redirect": ([b"HTTP/1.1 307 Moved\r\nLocation: http://[\r\nContent-Length: 99999\r\n\r\n"], b"x"),
}


class LoopbackServer:
    """A server on a free port; `answer` is called for each request, in its thread."""

    def __init__(self):
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                owner.answer(self, self.command, self.path, body)

            do_POST = do_HEAD = do_GET

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, handler: BaseHTTPRequestHandler, method: str, path: str, body: bytes) -> None:
        raise NotImplementedError


def send(handler: BaseHTTPRequestHandler, reply: Reply, cut: int | None = None) -> None:
    """Sends a reply, or only its first bytes though its header promises all."""
    status, headers, content = reply
    try:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[:cut])
    except OSError:  # the client has not waited
        pass
    handler.close_connection = True


def once(change: Callable) -> Callable:
    """A change of the first reply alone."""
    first = threading.Event()

    def changed(request, reply):
        if first.is_set():
            return reply
        first.set()
        return change(request, reply)

    return changed


class Raw(LoopbackServer):
    """Sends given bytes, part by part, with a pause after each; then `for_ever`, again and again."""

    def __init__(self, parts: list[bytes], pause: float = 0.0, for_ever: bytes = b""):
        super().__init__()
        self.parts, self.pause, self.for_ever = parts, pause, for_ever

    def answer(self, handler, method, path, body):
        handler.close_connection = True
        try:
            for part in self.parts:
                handler.wfile.write(part)
                time.sleep(self.pause)
            while self.for_ever:
                handler.wfile.write(self.for_ever)
                time.sleep(self.pause)
        except OSError:  # the client has not waited
            pass


def packed(reply, encoding="gzip", pack=gzip.compress):
    return 200, JSON | {"Content-Encoding": encoding}, pack(json.dumps(reply).encode())


BOMB = packed(["x" * (80 << 20)])


class FlakyProxy(LoopbackServer):
    """Drops, delays, truncates or answers 500 to a share of the requests.

    Args:
        target: address of the service.
        share: fraction of disturbed requests.
        delay: seconds; longer than the client's timeout.
        seed: of the draw.
    """

    FAULTS = ("drop", "delay", "truncate", "half", "500")

    def __init__(self, target: str, share: float = 0.3, delay: float = 1.5, seed: int = 0):
        super().__init__()
        self._target, self._share, self._delay = urlsplit(target).netloc, share, delay
        self._rng, self._lock = random.Random(seed), threading.Lock()
        self.counts: Counter[str] = Counter()

    def answer(self, handler, method, path, body):
        with self._lock:
            fault = self._rng.choice(self.FAULTS) if self._rng.random() < self._share else "none"
            self.counts[fault] += 1
        if fault == "500":
            return send(handler, (500, JSON, b'{"message": "Internal Server Error"}'))
        reply = self._forward(method, path, body)
        if fault == "drop":
            handler.close_connection = True
            return None
        if fault == "delay":
            time.sleep(self._delay)
        if fault == "half":  # cut, and the length is that of the cut reply
            reply = (*reply[:2], reply[2][: len(reply[2]) // 2])
        return send(handler, reply, len(reply[2]) // 2 if fault == "truncate" else None)

    def _forward(self, method: str, path: str, body: bytes) -> Reply:
        connection = http.client.HTTPConnection(self._target, timeout=60)
        try:
            connection.request(method, path, body, JSON)
            reply = connection.getresponse()
            return reply.status, {"Content-Type": reply.headers["Content-Type"]}, reply.read()
        finally:
            connection.close()


class SmallService(LoopbackServer):
    """Exact search over a few vectors in the protocol of clip-retrieval.

    Args:
        vectors: [n, d] of the index `name`.
        keys: their `image_path`.
        change: called with the request's JSON and the honest reply's JSON; returns another JSON value, a whole reply
            (status, headers, content), or None to break the connection.
        name: of the index.
    """

    def __init__(
        self, vectors: np.ndarray, keys: list[str], change: Callable | None = None, name: str = "pool"
    ):
        super().__init__()
        self._vectors, self._keys, self._change = vectors.astype(np.float32), keys, change
        self.names: object = [name]
        self.requests: list[dict] = []

    def answer(self, handler, method, path, body):
        if path == "/indices-list":
            return send(handler, (200, JSON, json.dumps(self.names).encode()))
        if path != "/knn-service":
            return send(handler, (404, {"Content-Type": "text/html"}, b"<h1>Not Found</h1>"))
        request = json.loads(body)
        self.requests.append(request)
        reply = self._search(request)
        if self._change is not None:
            reply = self._change(request, reply)
        if reply is None:
            handler.close_connection = True
            return None
        return send(handler, reply if isinstance(reply, tuple) else (200, JSON, json.dumps(reply).encode()))

    def _search(self, request: dict):
        query = np.array(request["embedding_input"], np.float32)
        sound = request["indice_name"] in self.names and request["modality"] == "image"
        if not sound or len(query) != self._vectors.shape[1]:
            return (500, JSON, b'{"message": "Internal Server Error"}')
        scores = self._vectors @ query
        order = np.argsort(-scores, kind="stable")[: request["num_images"]]
        return [
            {"image_path": self._keys[i], "caption": "c", "id": int(i), "similarity": float(scores[i])}
            for i in order
        ]
