"""The client of servers of chat completions: what it sends, what it tries again, and what it says.

The server here is a small one in this process, since most of these answers cannot be had from a real one; that one is
in tests/integration/pipeline/test_caption_endpoint.py.
"""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from email.utils import formatdate

import numpy as np
import pytest
from PIL import Image
from support.building import drawing
from support.chat_servers import SmallChat, completion, shown_image
from support.knn_servers import BOMB, DRIPS, JSON, FlakyProxy, Raw, once, send

from arf_plugin.errors import FlagError, ServiceError
from arf_plugin.pipeline.captioner import Endpoint, Generation

pytest.importorskip("requests")
from arf_plugin.pipeline import service as http_service
from arf_plugin.pipeline.endpoint import KEY, LARGEST_SENT, LONGEST_SIDE, EndpointCaptioner

SAMPLED = Generation(top_p=0.9, temperature=0.7, captions_per_image=3, prompt="Say it.")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_service, "LONGEST_PAUSE", 0.02)
    monkeypatch.delenv(KEY, raising=False)


def client_of(url: str, generation: Generation | None = None, **settings) -> EndpointCaptioner:
    endpoint = Endpoint(url, **({"timeout": 20.0, "patience": 20.0} | settings))
    return EndpointCaptioner(endpoint, "tiny", generation or Generation(prompt="What is it?"))


@contextmanager
def serving(change=None, generation: Generation | None = None, **settings):
    """A small server, and a client of it that waits only briefly."""
    with SmallChat(change) as server:
        yield server, client_of(server.url, generation, **settings)


def captions(client: EndpointCaptioner, encoded: bytes | None = None, name: str = "a/b") -> list[str]:
    encoded = encoded or drawing(0)
    return client.captions(name, encoded, Image.open(io.BytesIO(encoded)).convert("RGB"))


def test_what_is_asked_and_what_is_said():
    with serving() as (server, client):
        (caption,) = captions(client)
    (request,) = server.requests
    assert caption.startswith("a drawing in #")
    assert shown_image(request) == ("image/jpeg", drawing(0))
    text = request.pop("messages")[0]["content"][1]
    assert text == {"type": "text", "text": "What is it?"}
    assert request == {"model": "tiny", "max_tokens": 30, "temperature": 0.0}


def test_sampled_captions_have_seeds_of_their_own_that_depend_on_the_image_alone():
    with serving(generation=SAMPLED) as (server, client):
        first = captions(client)
        other = captions(client, name="a/c")
        assert captions(client) == first
    assert len({*first, *other}) == 6
    assert {(r["temperature"], r["top_p"]) for r in server.requests} == {(0.7, 0.9)}


def encoded(kind: str, size: tuple[int, int] = (40, 30), noise: bool = False) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    image = Image.fromarray(pixels) if noise else Image.new("RGB", size, "red")
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_common_kinds_are_sent_as_they_are(kind: str):
    with serving() as (server, client):
        captions(client, encoded(kind))
    assert shown_image(server.requests[0]) == (f"image/{kind.lower()}", encoded(kind))


@pytest.mark.parametrize(
    ("image", "size"),
    [
        (encoded("BMP"), (40, 30)),
        (encoded("PNG", (2 * LONGEST_SIDE, LONGEST_SIDE), noise=True), (LONGEST_SIDE, LONGEST_SIDE // 2)),
    ],
    ids=["of another kind", "too large"],
)
def test_others_become_a_jpeg(image: bytes, size: tuple[int, int]):
    with serving(timeout=60.0) as (server, client):
        captions(client, image)
    kind, sent = shown_image(server.requests[0])
    assert kind == "image/jpeg" and len(sent) < LARGEST_SENT
    assert Image.open(io.BytesIO(sent)).format == "JPEG" and Image.open(io.BytesIO(sent)).size == size


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", "of another service")
    with serving() as (server, client):
        captions(client)
        monkeypatch.setenv(KEY, "secret")
        captions(client_of(server.url))
    assert server.keys == {None, "Bearer secret"}
    monkeypatch.setenv(KEY, "sec\nret")
    with pytest.raises(FlagError, match=KEY) as error:
        client_of(server.url)
    assert "sec" not in str(error.value)


def test_addresses_as_people_write_them():
    with SmallChat() as server:
        for end in ("", "/", "/v1", "/v1/", "/v1/chat/completions"):
            captions(client_of(server.url + end))
    for url in ("127.0.0.1:8000", "ftp://host/v1", "http://", "http://["):
        with pytest.raises(FlagError, match="expected an address such as"):
            Endpoint(url)
    with pytest.raises(FlagError, match=KEY) as error:
        Endpoint("http://me:secret@host/v1")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504, 529])
def test_a_busy_server_is_asked_again(status: int):
    left = iter(range(6))
    busy = (status, JSON, b"{}")
    with serving(lambda _, reply: busy if next(left, None) is not None else reply) as (_, client):
        assert captions(client) and client.retries == 6


@pytest.mark.parametrize(
    ("value", "least"), [("1", 1.0), ("date", 1.0), ("soon", 0), ("9" * 5000, 0.0), ("-5", 0)]
)
def test_a_server_says_after_how_long_it_wants_to_be_asked_again(value: str, least: float):
    first = threading.Event()

    def busy(request, reply):
        if first.is_set():
            return reply
        first.set()
        after = formatdate(time.time() + 3, usegmt=True) if value == "date" else value  # whole seconds
        return 429, JSON | {"Retry-After": after}, b"{}"

    with serving(busy) as (_, client):
        started = time.monotonic()
        assert captions(client) and client.retries == 1
        assert time.monotonic() - started >= least


def test_a_server_cannot_ask_for_more_than_the_patience():
    busy = (429, JSON | {"Retry-After": "86400"}, b"{}")
    expected = pytest.raises(ServiceError, match=r"gave no answer for \d+ s; at last.*429")
    with serving(lambda q, r: busy, patience=0.1) as (_, client), expected:
        captions(client)


def test_500_and_back():
    count = {"failures": 2}

    def failing(_, reply):
        count["failures"] -= 1
        return (500, JSON, b'{"error": "CUDA"}') if count["failures"] >= 0 else reply

    with serving(failing) as (server, client):
        client.check()
        assert len(server.requests) == 3
        count["failures"] = 9
        assert captions(client)
        count["failures"] = 10
        with pytest.raises(ServiceError, match="answered 10 times with 500 to the image a/b"):
            captions(client)
    count["failures"] = 99
    expected = pytest.raises(ServiceError, match=r'answered 500 {"error": "CUDA"}.*--captioner-url')
    with serving(failing) as (_, client), expected:
        client.check()


@pytest.mark.parametrize(("parts", "drip"), DRIPS.values(), ids=DRIPS)
def test_a_reply_that_drips_is_given_up(parts, drip):
    with Raw(parts, pause=0.05, for_ever=drip) as server:
        client = client_of(server.url, timeout=0.25, patience=0.3)
        with pytest.raises(ServiceError) as error:  # or it would never end
            captions(client)
    said = str(error.value)
    assert any(words in said for words in ("gave no answer", "redirects to", "more than 100 headers"))


@pytest.mark.parametrize(
    "change",
    [
        lambda q, r: None,
        lambda q, r: (200, JSON, json.dumps(r).encode()[:40]),
        lambda q, r: (200, JSON, b""),
        lambda q, r: (200, JSON, b'{"choices": "\xff"}'),
    ],
    ids=["broken off", "half", "empty", "bytes"],
)
def test_what_may_be_a_fault_on_the_way_is_asked_again(change):
    with serving(once(change)) as (_, client):
        assert captions(client) and client.retries == 1
    with serving(change, patience=0.3) as (_, client), pytest.raises(ServiceError, match="gave no answer"):
        captions(client)


def with_content(value: object):
    return lambda request, reply: completion(value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda q, r: {"error": {"message": "no"}}, "expected choices[0].message.content"),
        (lambda q, r: "a caption", "expected choices[0].message.content"),
        (lambda q, r: [], "expected choices[0].message.content"),
        (lambda q, r: {"choices": {}}, "expected choices[0].message.content"),
        (lambda q, r: {"choices": []}, "expected choices[0].message.content"),
        (lambda q, r: {"choices": ["a caption"]}, "expected choices[0].message.content"),
        (lambda q, r: {"choices": [{"message": "a caption"}]}, "expected choices[0].message.content"),
        (lambda q, r: {"choices": [{"message": {"role": "assistant"}}]}, "expected choices[0].message.content"),
        (with_content(7), "expected choices[0].message.content"),
        (with_content(["a", "caption"]), "expected choices[0].message.content"),
        (lambda q, r: completion("a" * (2 << 20)), "answered more than 1 MiB"),
        (lambda q, r: BOMB, "answered more than 1 MiB"),
        (lambda q, r: (200, JSON, b"[" * 200_000), "nested too deeply"),
        (lambda q, r: (200, {"Content-Type": "text/html"}, b"<h1>vLLM</h1>"), "answered text/html, not JSON"),
        (lambda q, r: (401, JSON, b'{"error": "Unauthorized"}'), KEY),
        (lambda q, r: (404, JSON, b'{"message": "The model `tiny` does not exist."}'), "does not exist"),
        (lambda q, r: (418, JSON, b"\x1b[31mred"), "answered 418  [31mred"),
    ],
)  # fmt: skip
def test_what_is_no_answer_ends_the_stage_at_once(change, expected: str):
    with serving(change) as (server, client), pytest.raises(ServiceError) as error:
        captions(client)
    found = str(error.value)
    assert expected in found
    assert found.isprintable() and len(found) < 1000
    assert len(server.requests) == 1 and client.retries == 0


def test_no_redirect_is_followed():
    with SmallChat() as other:
        moved = (307, JSON | {"Location": f"{other.url}/v1/chat/completions"}, b"")
        with serving(lambda q, r: moved) as (_, client), pytest.raises(ServiceError, match="redirects to"):
            captions(client)
        assert not other.requests and not other.keys


def test_a_dead_server_is_given_up_after_the_patience():
    with serving() as (_, client):
        pass
    client = client_of(client.url, patience=0.3)
    with pytest.raises(ServiceError, match=r"gave no answer for .*Connection refused(.|\n)*run the same"):
        client.check()


@pytest.mark.parametrize("status", [400, 413, 422])
def test_one_image_that_the_server_refuses_is_set_aside(status: int):
    odd = base64.b64encode(drawing(3)).decode()

    def refusing(request, reply):
        return (status, JSON, b'{"message": "too odd"}') if odd in str(request) else reply

    with serving(refusing) as (_, client):
        client.check()
        with pytest.raises(ValueError, match=r"is refused by the server.*too odd"):
            captions(client, drawing(3))
        assert captions(client)
    expected = pytest.raises(ServiceError, match="no model of ours")
    with serving(lambda q, r: (status, JSON, b"no model of ours")) as (_, client), expected:
        captions(client)


def test_a_model_that_thinks_until_nothing_is_left_is_noticed():
    with serving(lambda q, r: completion(None, "length")) as (_, client):
        with pytest.raises(ServiceError, match="'tiny' said nothing within --max-new-tokens 30"):
            client.check()
        with pytest.raises(ValueError, match="said nothing"):
            captions(client)
    with serving(with_content(None)) as (_, client):
        assert captions(client) == [""]


def test_halves_of_characters_are_left_out():
    with serving(with_content("a \ud83d cat")) as (_, client):
        assert captions(client) == ["a  cat"]


def test_halting_ends_what_is_under_way():
    asked = threading.Event()

    class Silent(SmallChat):
        def answer(self, handler, method, path, body):
            asked.set()
            handler.connection.settimeout(60)
            handler.rfile.read(1)  # until the client has gone
            send(handler, (200, JSON, b"{}"))

    with Silent() as server:
        client = client_of(server.url, timeout=1e6, patience=1e6)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(captions, client)
            asked.wait(60)
            client.halt()
            assert isinstance(answer.exception(60), ServiceError)


@pytest.mark.process  # waits for seconds
def test_faults_on_a_third_of_the_requests_change_nothing():
    images = [drawing(n) for n in range(30)]
    with SmallChat() as server, FlakyProxy(server.url, 0.3, delay=0.7) as proxy:
        honest, client = client_of(server.url), client_of(proxy.url, timeout=0.5)
        honest.check()
        client.check()
        assert [captions(client, one) for one in images] == [captions(honest, one) for one in images]
        assert client.retries > 3
