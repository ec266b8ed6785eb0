"""Servers of OpenAI's chat completions, on 127.0.0.1: a small one in this process, and ``transformers serve``."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from support.environments import ROOT, make_environment, pip
from support.knn_servers import JSON, LoopbackServer, send
from support.knn_service import free_port

_EXTRAS = (
    "accelerate==1.15.0",
    "fastapi==0.165.0",
    "openai==3.57.0",
    "uvicorn==0.54.0",
)  # serving, but for torch
_START = 600  # seconds


class SmallChat(LoopbackServer):
    """Says of an image which colour its middle has; the same for the same image, and the seed if there is one.

    It is there for answers that a real server cannot be made to give.

    Args:
        change: called with the request's JSON and the honest reply's JSON; returns another JSON value, a whole reply
            (status, headers, content), or None to break the connection.
        pause: seconds before each answer.
    """

    def __init__(self, change: Callable | None = None, pause: float = 0.0):
        super().__init__()
        self.change, self.pause = change, pause
        self.requests: list[dict] = []
        self.at_once, self.most_at_once, self._lock = 0, 0, threading.Lock()
        self.keys: set[str | None] = set()

    def answer(self, handler, method, path, body):
        self.keys.add(handler.headers.get("Authorization"))
        with self._lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self.pause)
        with self._lock:
            self.at_once -= 1
        if (method, path) != ("POST", "/v1/chat/completions"):
            return send(handler, (404, JSON, b'{"detail": "Not Found"}'))
        request = json.loads(body)
        self.requests.append(request)
        reply = completion(f"a drawing in {colour(request)} {request.get('seed', '')}")
        if self.change is not None:
            reply = self.change(request, reply)
        if reply is None:
            handler.close_connection = True
            return None
        return send(handler, reply if isinstance(reply, tuple) else (200, JSON, json.dumps(reply).encode()))


def completion(text: object, finish_reason: str = "stop") -> dict:
    """The reply with a text."""
    message = {"role": "assistant", "content": text}
    return {"object": "chat.completion", "choices": [{"message": message, "finish_reason": finish_reason}]}


def shown_image(request: dict) -> tuple[str, bytes]:
    """Media type and bytes of the image in a request."""
    (message,) = request["messages"]
    image, _ = message["content"]
    head, data = image["image_url"]["url"].split(";base64,")
    return head.removeprefix("data:"), base64.b64decode(data)


def colour(request: dict) -> str:
    image = Image.open(io.BytesIO(shown_image(request)[1])).convert("RGB")
    return "#" + "".join(f"{value:02x}" for value in image.getpixel((image.width // 2, image.height // 2)))


@contextmanager
def transformers_serve(model: str, log: Path) -> Iterator[str]:
    """Runs ``transformers serve`` with a model and yields its address; skips the test where it cannot be had."""
    pytest.importorskip("transformers.cli.serving", reason="transformers without `transformers serve`")
    folder = ROOT / ".venvs" / "transformers-serving"
    if not folder.is_dir():
        partial = folder.with_suffix(".incomplete")
        python = make_environment(partial)
        try:
            pip(python, "install", *_EXTRAS)
        except AssertionError as cause:
            pytest.skip(f"the extras of `transformers serve` cannot be installed: {str(cause)[-300:]}")
        partial.rename(folder)
    port = free_port()
    words = [
        "-m",
        "transformers.cli.transformers",
        "serve",
        model,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with log.open("w") as file:
        process = subprocess.Popen(
            [folder / "bin" / "python", *words, "--device", "cpu"], stdout=file, stderr=file
        )
    try:
        url, last = f"http://127.0.0.1:{port}", time.monotonic() + _START
        while not _healthy(url):
            assert process.poll() is None and time.monotonic() < last, log.read_text()
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as reply:
            return reply.status == 200
    except OSError:
        return False
