"""Whatever a service answers: hits or a caption as they were sent, or one of two errors."""

from __future__ import annotations

import json

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.knn_servers import JSON, LoopbackServer, send

from arf_plugin.errors import ServiceError

pytest.importorskip("requests")

from arf_plugin.pipeline.captioner import Endpoint, Generation
from arf_plugin.pipeline.endpoint import EndpointCaptioner
from arf_plugin.pipeline.knn_service import Hit, KnnClient
from arf_plugin.pipeline.service import PassingFault

K = 2
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(min_value=-(10**30), max_value=10**30)
    | st.floats()
    | st.text(st.characters(), max_size=8)  # lone surrogates and control characters among them
)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=4), inner))
HITS = st.fixed_dictionaries(
    {},
    optional={
        "id": st.integers(0, 99) | LEAVES,
        "similarity": st.floats(-1, 1) | LEAVES,
        "image_path": st.text(max_size=8) | LEAVES,
        "caption": VALUES,
    },
)
REPLIES = VALUES | st.lists(HITS | VALUES, max_size=K + 1) | st.lists(HITS, min_size=K, max_size=K)


class Answering(LoopbackServer):
    """Gives the answer that it has been told."""

    reply: tuple[int, dict[str, str], bytes]

    def answer(self, handler, method, path, body):
        send(handler, self.reply)


@pytest.fixture(scope="module")
def service():
    with Answering() as server:
        yield server


def ask(service: Answering) -> list[Hit] | None:
    client = KnnClient(service.url, "pool", timeout=5.0)
    try:
        return client.query(np.eye(1, 4)[0], K, tries=1)
    except PassingFault:
        return None
    except ServiceError as error:
        said = str(error)
        assert len(said) < 1000 and said.isprintable()
        said.encode()
        return None


def check(hits: list[Hit] | None) -> None:
    for hit in hits or ():
        hit.key.encode()
        np.array([hit.row], np.int64)
        assert type(hit.row) is int and type(hit.similarity) is float and abs(hit.similarity) <= 1.1


@given(reply=REPLIES)
def test_any_json(service, reply):
    service.reply = 200, JSON, json.dumps(reply).encode()
    check(ask(service))


@given(
    content=st.binary(max_size=64) | st.text(max_size=64).map(lambda text: text.encode("utf-16")),
    status=st.integers(200, 599),
    headers=st.dictionaries(
        st.sampled_from(
            ["Content-Type", "Content-Encoding", "Location", "Set-Cookie", "Retry-After", "Connection"]
        ),
        st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=12)
        | st.sampled_from(["application/json", "gzip", "deflate", "identity", "close"]),
    ),
)
def test_any_bytes_under_any_headers(service, content, status, headers):
    service.reply = status, headers, content
    check(ask(service))


@given(data=st.data())
def test_honest_hits_arrive_as_they_are(service, data):
    values = data.draw(
        st.lists(st.floats(-1, 1), min_size=K, max_size=K).map(lambda v: sorted(v, reverse=True))
    )
    keys = data.draw(
        st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=K, max_size=K)
    )
    rows = data.draw(st.lists(st.integers(0, 1 << 40), min_size=K, max_size=K))
    hits = [
        {"id": row, "similarity": value, "image_path": key}
        for row, value, key in zip(rows, values, keys, strict=True)
    ]
    service.reply = 200, JSON, json.dumps(hits, ensure_ascii=data.draw(st.booleans())).encode()
    assert ask(service) == [Hit(key, row, value) for row, value, key in zip(rows, values, keys, strict=True)]


CHOICES = st.fixed_dictionaries(
    {},
    optional={
        "message": st.fixed_dictionaries({}, optional={"content": LEAVES}) | LEAVES,
        "finish_reason": st.just("length") | LEAVES,
    },
)


@given(reply=VALUES | st.fixed_dictionaries({"choices": VALUES | st.lists(CHOICES | VALUES, max_size=2)}))
def test_any_json_in_place_of_a_caption(service, reply):
    service.reply = 200, JSON, json.dumps(reply).encode()
    image = PIL.Image.new("RGB", (1, 1))
    try:
        captions = EndpointCaptioner(Endpoint(service.url), "m", Generation()).captions("a", b"", image)
    except (ServiceError, ValueError) as error:
        said = str(error)
        assert len(said) < 1000 and said.isprintable()
        said.encode()
    else:
        assert [type(caption) for caption in captions] == [str]
        captions[0].encode()
