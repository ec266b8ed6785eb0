"""The client of clip-retrieval's service: what it sends, what it tries again, and what it says.

The service here is a small HTTP server in this process that speaks the protocol, since most of these answers cannot be
had from the real one; that one is in tests/integration/pipeline/test_knn_service.py.

One module, because all of it talks to the same small server.
"""

from __future__ import annotations

import gzip
import json
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from support.building import unit_vectors
from support.knn_servers import (
    BOMB,
    DRIPS,
    HEAD,
    JSON,
    FlakyProxy,
    LoopbackServer,
    Raw,
    SmallService,
    once,
    packed,
    send,
)

from arf_plugin.errors import FlagError, ServiceError
from arf_plugin.pipeline.knn_backends import Search

pytest.importorskip("requests")
from arf_plugin.pipeline import knn_service
from arf_plugin.pipeline import service as http_service
from arf_plugin.pipeline.knn_service import KnnClient

POOL, QUERIES = unit_vectors(200, 16, seed=2), unit_vectors(40, 16, seed=1).astype(np.float32)
KEYS = [f"key-{i:03d}" for i in range(200)]
NEAREST = np.argsort(-(QUERIES @ POOL.astype(np.float32).T), axis=1, kind="stable")[:, :5]


@contextmanager
def serving(change=None, **settings):
    """A small service and a client of it that waits only briefly."""
    with SmallService(POOL, KEYS, change) as service:
        yield service, client_of(service.url, **settings)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_service, "LONGEST_PAUSE", 0.02)


def client_of(url: str, **settings) -> KnnClient:
    defaults = {"timeout": 0.5, "patience": 20.0, "index": "pool"}
    return KnnClient(url, **(defaults | settings))


def rows_of(client: KnnClient, queries=QUERIES, k=5) -> list[list[int]]:
    return [[hit.row for hit in hits] for hits in client.search(queries, k)]


def refusal(change, k=5) -> str:
    """What the client says to a changed reply."""
    with serving(change) as (_, client), pytest.raises(ServiceError) as error:
        rows_of(client, QUERIES[:1], k)
    return str(error.value)


def test_hits_come_in_the_order_of_the_queries():
    with serving(threads=7) as (service, client):
        found = list(client.search(QUERIES, 5))
    assert [[hit.row for hit in hits] for hits in found] == NEAREST.tolist()
    assert [[hit.key for hit in hits] for hits in found] == [[KEYS[i] for i in row] for row in NEAREST]
    expected = np.take_along_axis(QUERIES @ POOL.astype(np.float32).T, NEAREST, axis=1)
    np.testing.assert_allclose([[hit.similarity for hit in hits] for hits in found], expected, atol=1e-6)
    assert len(service.requests) == 40 and client.retries == 0


def test_the_services_defaults_are_switched_off():
    with serving() as (service, client):
        rows_of(client, QUERIES[:1])
    (request,) = service.requests
    vector = request.pop("embedding_input")
    np.testing.assert_array_equal(np.array(vector, np.float32), QUERIES[0])
    # No aesthetic_score, aesthetic_weight or use_mclip: their presence changes the query.
    assert request == {
        "modality": "image", "num_images": 5, "num_result_ids": 5, "indice_name": "pool",
        "deduplicate": False, "use_safety_model": False, "use_violence_detector": False,
    }  # fmt: skip


@pytest.mark.parametrize(("flag", "value"), [("timeout", 0), ("timeout", float("nan")), ("patience", -1.0)])
def test_waits_must_be_possible(flag: str, value: float):
    with pytest.raises(FlagError, match=f"--service-{flag}"):
        Search("service", service_url="http://127.0.0.1:1", **{f"service_{flag}": value})


@pytest.mark.process  # waits for seconds
@pytest.mark.parametrize("seed", range(2))
def test_faults_on_a_third_of_the_requests_change_nothing(seed: int):
    with SmallService(POOL, KEYS) as service, FlakyProxy(service.url, 0.3, delay=0.7, seed=seed) as proxy:
        client = client_of(proxy.url, threads=8, index=None)
        client.check(QUERIES[0], 5)
        many = np.concatenate([QUERIES] * 4)
        assert rows_of(client, many) == NEAREST.tolist() * 4
    assert all(proxy.counts[fault] > 2 for fault in FlakyProxy.FAULTS), proxy.counts
    total = proxy.counts.total()
    assert client.retries == total - 162  # 160 queries, the probe and the list of indices
    assert 0.2 < 1 - proxy.counts["none"] / total < 0.4


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_service_is_asked_again(status: int):
    left = iter(range(6))
    with serving(lambda _, reply: (status, JSON, b"{}") if next(left, None) is not None else reply) as (
        _,
        client,
    ):
        assert rows_of(client) == NEAREST.tolist()
    assert client.retries == 6


def test_500_is_asked_again_twice_before_the_first_success_and_longer_after():
    count = {"failures": 2}

    def failing(_, reply):
        count["failures"] -= 1
        return (500, JSON, b"{}") if count["failures"] >= 0 else reply

    with serving(failing) as (service, client):
        assert [hit.row for hit in client.check(QUERIES[0], 5)] == NEAREST[0].tolist()
        assert len(service.requests) == 3
        count["failures"] = 9
        assert rows_of(client, QUERIES[:1]) == NEAREST[:1].tolist()
        count["failures"] = 10
        with pytest.raises(
            ServiceError, match="answered 10 times with 500 to query 0 of this block, while it answers"
        ):
            rows_of(client, QUERIES[:1])


def test_one_query_that_always_fails_ends_the_search_with_its_own_error():
    bad = QUERIES[17].tolist()

    def failing(request, reply):
        return (500, JSON, b"{}") if request["embedding_input"] == bad else reply

    with serving(failing, threads=3) as (_, client):
        client.check(QUERIES[0], 5)
        with pytest.raises(ServiceError, match="to query 17 of this block"):
            rows_of(client)
        assert rows_of(client, QUERIES[:3]) == NEAREST[:3].tolist()  # the client is still good
    assert threading.active_count() < 10


def test_the_failure_that_ended_the_search_is_the_one_that_is_reported(monkeypatch: pytest.MonkeyPatch):
    """Query 0 is still being tried again when query 3 fails for good; the others stop at once."""
    busy, wrong = QUERIES[0].tolist(), QUERIES[3].tolist()

    def failing(request, reply):
        status = {str(busy): 503, str(wrong): 404}.get(str(request["embedding_input"]))
        return (status, JSON, b"{}") if status else reply

    monkeypatch.setattr(http_service, "LONGEST_PAUSE", 2)
    with serving(failing, threads=4) as (_, client):
        started = time.monotonic()
        with pytest.raises(ServiceError, match="answered 404"):
            rows_of(client)
        assert time.monotonic() - started < 15  # less than the patience


def test_a_service_that_is_gone_is_given_up_after_the_patience(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http_service, "LONGEST_PAUSE", 0.2)  # so that the patience ends before the tries
    with serving() as (_, client):
        pass
    client = client_of(client.url, patience=0.5)
    started = time.monotonic()
    with pytest.raises(
        ServiceError, match=r"gave no answer for \d+ s; at last.*Connection refused(.|\n)*run the same"
    ):
        rows_of(client)
    assert 0.5 < time.monotonic() - started < 15


@pytest.mark.parametrize(("parts", "drip"), DRIPS.values(), ids=DRIPS)
def test_a_reply_that_drips_is_given_up(parts, drip):
    """No wait for a byte is ever as long as the timeout; the reply as a whole is."""
    with Raw(parts, pause=0.05, for_ever=drip) as service:
        client = client_of(service.url, timeout=0.25, patience=0.3)
        started = time.monotonic()
        with pytest.raises(ServiceError) as error:
            rows_of(client, QUERIES[:1])
        assert time.monotonic() - started < 30  # it has no end
    assert any(
        said in str(error.value) for said in ("gave no answer", "redirects to", "more than 100 headers")
    )
    assert threading.active_count() < 20


def test_a_slow_reply_that_is_whole_in_time_is_taken():
    body = json.dumps([{"id": i, "similarity": 0.5, "image_path": f"k{i}"} for i in range(5)]).encode()
    parts = [
        HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode(),
        *(body[i : i + 40] for i in range(0, len(body), 40)),
    ]
    with Raw(parts, pause=0.05) as service:
        assert rows_of(client_of(service.url, timeout=5.0), QUERIES[:1]) == [[0, 1, 2, 3, 4]]


def test_a_packed_reply_is_unpacked():
    with serving(lambda q, r: packed(r)) as (_, client):
        assert rows_of(client, QUERIES[:1]) == NEAREST[:1].tolist()


def test_headers_that_are_wrong_about_the_length_do_not_disturb_the_next_query():
    def longer(request, reply):
        return 200, JSON, json.dumps(reply).encode() + b"  " * 50000

    with serving(longer) as (_, client):
        assert rows_of(client) == NEAREST.tolist()


def body(content: bytes):
    return lambda request, reply: (200, JSON, content)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (body(b"[" * 200_000), "nested too deeply"),
        (body(b'[{"id": ' + b"9" * 5000 + b"}]"), "a number of thousands of digits"),
        (lambda q, r: [h | {"id": 10**400} for h in r], "its 'id' is the number of a row"),
        (lambda q, r: [h | {"id": -1} for h in r], "its 'id' is the number of a row"),
        (lambda q, r: [h | {"id": True} for h in r], "expected numbers 'id' and 'similarity'"),
        (lambda q, r: [h | {"id": 1.5} for h in r], "expected numbers 'id' and 'similarity'"),
        (lambda q, r: [h | {"similarity": True} for h in r], "expected numbers 'id' and 'similarity'"),
        (lambda q, r: [h | {"similarity": -(10**400)} for h in r], "similarity of"),
        (lambda q, r: [h | {"image_path": "\ud800"} for h in r], "which is no text"),
        (lambda q, r: [h | {"image_path": ["x"]} for h in r], "has no 'image_path'"),
        (lambda q, r: {"\x1b[31m" * 50: [[[]]] * 100000}, "expected a list of hits"),
        (lambda q, r: BOMB, "answered more than 4 MiB"),
        (lambda q, r: (200, JSON, b" " * (6 << 20)), "answered more than 4 MiB"),
        (lambda q, r: packed(r, "br"), "the Content-Encoding br, which was not asked for"),
        (lambda q, r: packed(r, "gzip, gzip"), "the Content-Encoding gzip, gzip"),
        (lambda q, r: (302, JSON | {"Location": "http://["}, b""), "redirects to http://["),
        (lambda q, r: (302, JSON, b"x" * 1000), "redirects to null"),
    ],
)
def test_a_reply_that_is_no_answer_is_refused_at_once(change, expected: str):
    with serving(change) as (service, client), pytest.raises(ServiceError) as error:
        rows_of(client, QUERIES[:1])
    found = str(error.value)
    assert expected in found and found.isprintable() and len(found) < 600
    assert len(service.requests) == 1 and client.retries == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda q, r: (200, JSON, b'["\xff\xfe"]'),
        lambda q, r: (200, JSON, b""),
        lambda q, r: (200, JSON, b"\xed\xa0\x80"),
        lambda q, r: (200, JSON | {"Content-Encoding": "gzip"}, b"no gzip"),
        lambda q, r: (200, JSON | {"Content-Encoding": "gzip"}, gzip.compress(b"[]" * 99)[:-4]),
        lambda q, r: None,
    ],
    ids=["bytes", "empty", "surrogate", "no gzip", "cut gzip", "broken off"],
)
def test_what_may_be_a_fault_on_the_way_is_asked_again(change):
    """And given up after the patience, if it does not pass."""
    with serving(once(change)) as (_, client):
        assert rows_of(client, QUERIES[:1]) == NEAREST[:1].tolist() and client.retries == 1
    with serving(change, patience=0.3) as (_, client), pytest.raises(ServiceError, match="gave no answer"):
        rows_of(client, QUERIES[:1])


def infinite(reply) -> bytes:
    """A number that is valid JSON and infinite in Python."""
    return json.dumps([hit | {"similarity": "HUGE"} for hit in reply]).replace('"HUGE"', "1e999").encode()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda q, r: {"message": "no"}, 'answered {"message": "no"}; expected a list of hits'),
        (lambda q, r: [], "its index is empty"),
        (lambda q, r: r[:3], "returned 3 hits, 5 were asked for"),
        (lambda q, r: [r[0], "x", *r[2:]], "the hit x; expected numbers 'id' and 'similarity'"),
        (lambda q, r: [h | {"similarity": float("nan")} for h in r], "comes from NaN vectors in its index"),
        (lambda q, r: (200, JSON, infinite(r)), "similarity of inf"),
        (lambda q, r: [h | {"similarity": 3.5} for h in r], "similarity of 3.500; a cosine lies between"),
        (lambda q, r: r[::-1], "measures distances"),
        (lambda q, r: [{"id": h["id"], "similarity": h["similarity"]} for h in r], "(found: id, similarity)"),
        (
            lambda q, r: [h | {"image_path": float("nan")} for h in r],
            "has no 'image_path' (found: caption, id",
        ),
        (
            lambda q, r: (200, {"Content-Type": "text/html"}, b"<html>"),
            "answered text/html, not JSON: <html>",
        ),
        (lambda q, r: (404, JSON, b"{}"), "Expected clip-retrieval back at this address"),
        (lambda q, r: (418, JSON, b"\x1b[31mred"), "answered 418  [31mred"),  # no control characters
    ],
)
def test_what_is_wrong_with_a_reply_is_said_at_once(change, expected: str):
    assert expected in refusal(change)


def test_missing_metadata_that_is_not_needed_does_not_matter():
    with serving(lambda q, r: [h | {"caption": float("nan"), "url": float("nan")} for h in r]) as (_, client):
        assert rows_of(client) == NEAREST.tolist()


class Trap(LoopbackServer):
    """Counts who comes."""

    visits = 0

    def answer(self, handler, method, path, body):
        self.visits += 1
        send(handler, (200, JSON, json.dumps([]).encode()))


def test_no_address_that_the_service_names_is_fetched():
    with Trap() as trap:
        redirect = (307, JSON | {"Location": f"{trap.url}/knn-service"}, b"")
        assert f"redirects to {trap.url}/knn-service, which is not followed" in refusal(lambda q, r: redirect)
        with serving(lambda q, r: [h | {"url": f"{trap.url}/a.jpg"} for h in r]) as (_, client):
            rows_of(client)
        assert trap.visits == 0


def checked(service: SmallService, probe=QUERIES[0], k=5, **settings) -> str:
    with pytest.raises(ServiceError) as error:
        client_of(service.url, **settings).check(probe, k)
    return str(error.value)


def test_the_check_at_the_start_names_the_mistake(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        knn_service, "DIMENSIONS", (32, 16)
    )  # the small service's 16 is the width of no model
    with SmallService(POOL, KEYS) as service:
        assert "has no index 'pol'. Choose one with --service-index: pool" in checked(service, index="pol")
        assert "vectors of dimension 16" in checked(
            service, unit_vectors(1, 32, seed=0)[0].astype(np.float32)
        )
        service.names = ["pool", "other"]
        assert "serves 2 indices. Choose one with --service-index: pool, other" in checked(
            service, index=None
        )
        service.names = []
        assert "serves no index" in checked(service)
        service.names = {"message": "hello"}
        assert "Is this the address of clip-retrieval back?" in checked(service)
    text = SmallService(POOL, KEYS, lambda q, r: r if q["modality"] == "image" else [])
    text._search = lambda q: [] if q["modality"] == "text" else (500, JSON, b"{}")
    with text as service:
        assert "has a text index and no image index" in checked(service)
    with SmallService(POOL, KEYS, lambda q, r: r if q["num_images"] == 1 else (500, JSON, b"{}")) as service:
        assert "answers for one neighbour and fails for 5: its metadata has fewer rows" in checked(service)
    with SmallService(POOL, KEYS, lambda q, r: (500, JSON, b"{}")) as service:
        assert "fails (500) for a sound query of dimension 16" in checked(service)


def test_the_only_index_is_taken_and_the_address_may_name_the_endpoint():
    with serving() as (service, _):
        client = client_of(f"{service.url}/knn-service/", index=None)
        client.check(QUERIES[0], 5)
        assert client.index == "pool"
    for url in ("127.0.0.1:1234", "ftp://host", "http://"):
        with pytest.raises(FlagError, match="expected an address such as"):
            Search("service", service_url=url)
