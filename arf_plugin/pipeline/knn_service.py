"""Client of a clip-retrieval service (``clip-retrieval back``): nearest neighbours over HTTP.

The service takes one vector per request and answers 500 to almost every mistake, so :meth:`KnnClient.check` asks at
the start whether it is set up for our queries. What is tried again, with exponential backoff and jitter:

- Connection errors, timeouts, truncated replies and 429/502/503/504: until nobody has had an answer from the service
  for ``patience`` seconds, or 30 times for one query.
- 500: twice before the service has answered a query like this one, since it then means a mistake. Afterwards it
  cannot be one of those, so it counts as a passing fault, and is given up at the tenth 500 to one query.

A query is answered in full or the search stops with an error, so faults cost time and never change a result. The
service is not trusted: a reply has a deadline as a whole and a largest size, and no address that it names (a redirect,
an ``url`` in a hit) is ever fetched.
"""

from __future__ import annotations

import http.client
import json
import math
import random
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from http.cookiejar import DefaultCookiePolicy
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import requests
import urllib3
from requests.adapters import HTTPAdapter

from arf_plugin.errors import ServiceError
from arf_plugin.untrusted import utf8

TRIES, TRIES_500, TRIES_500_AT_START = 30, 10, 3  # for one query
LONGEST_PAUSE = 10.0  # seconds between two tries
LARGEST_ROW = 1 << 62
LARGEST_SIMILARITY = 1.1  # compressed indexes overshoot a little
# Widths of published CLIP models and of the small ones of this project.
DIMENSIONS = (128, 256, 384, 512, 640, 768, 896, 1024, 1152, 1280, 1408, 1536)
_SAID = ("image_path", "url", "caption", "sha256")
_PASSING = (
    requests.exceptions.ConnectionError,
    requests.exceptions.Timeout,
    requests.exceptions.ChunkedEncodingError,
    requests.exceptions.ContentDecodingError,
)


class PassingFault(Exception):
    """A fault that may be gone at the next try."""


class ServerFault(PassingFault):
    """HTTP 500."""


class Hit(NamedTuple):
    """A neighbour: the pool sample's key, its row in the service's index, and its inner product with the query.

    What else the service has said of it is there where a client wants links; the key may be missing then.
    """

    key: str
    row: int
    similarity: float
    url: str | None = None
    caption: str | None = None
    sha256: str | None = None


class KnnClient:
    """Asks a clip-retrieval service for neighbours.

    Args:
        url: address of ``clip-retrieval back``; with ``/knn-service``, too, which ClipClient's users are used to give.
        index: name of the index; None takes the only one.
        threads: requests under way at once.
        timeout: seconds for a whole answer, from the connection to its last byte.
        patience: seconds without any answer after which the service is given up.

    Attributes:
        index: the name of its index; :meth:`check_index` finds it out if there is only one.
        retries: requests that were sent again.
        wants: what a hit must say of a pair: ``image_path``, its key, or ``url``, its link.
    """

    wants = "image_path"

    def __init__(
        self,
        url: str,
        index: str | None = None,
        threads: int = 4,
        timeout: float = 60.0,
        patience: float = 300.0,
    ) -> None:
        self.url, self.index, self.retries = url.rstrip("/").removesuffix("/knn-service"), index, 0
        self.threads, self._timeout, self._patience = threads, timeout, patience
        self._proven = False  # has answered a query with this index, dimension and k
        self._local = threading.local()
        self._last_answer = -math.inf
        self._stop = threading.Event()

    def search(self, queries: np.ndarray, k: int) -> list[list[Hit]]:
        """Finds the k nearest neighbours, best first, of each query [n, d], finite and of unit norm.

        Raises:
            ServiceError: if the service fails for good or answers nonsense.
        """
        try:
            with ThreadPoolExecutor(self.threads) as pool:
                try:
                    asked = [
                        pool.submit(self.query, query, k, what=f"query {number} of this block")
                        for number, query in enumerate(queries)
                    ]
                    done, _ = wait(asked, return_when=FIRST_EXCEPTION)
                finally:
                    self._stop.set()  # threads that wait for their next try give up
                    pool.shutdown(wait=False, cancel_futures=True)
            return [answer.result() for answer in asked if answer in done]  # all, or raises the failure
        finally:
            self._stop.clear()

    def query(
        self,
        vector: np.ndarray,
        k: int,
        *,
        modality: str = "image",
        what: str = "a query",
        tries: int | None = None,
    ) -> list[Hit]:
        """Asks for the k neighbours of one vector [d], which messages call ``what``, in the index of a modality.

        The module's docstring says how often it tries, unless ``tries`` does.

        Raises:
            PassingFault: for a fault that ``tries`` tries did not outlast, or a 500 before the first success.
            ServiceError: for anything else.
        """
        body = {
            "embedding_input": np.asarray(vector, np.float32).tolist(),
            "modality": modality,
            "num_images": k,
            "num_result_ids": k,
            "indice_name": self.index,
            # The service's own client asks for these by default: they drop hits. It also weighs in an aesthetic
            # score unless aesthetic_score and aesthetic_weight are left out.
            "deduplicate": False,
            "use_safety_model": False,
            "use_violence_detector": False,
        }
        return _hits(self._ask("POST", "/knn-service", body, what, tries), k, self.wants)

    def _ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        what: str = "",
        tries: int | None = None,
    ) -> Any:
        """Sends a request until there is an answer worth having; returns its JSON."""
        # Bytes: 64 KiB for what the metadata have of a hit.
        largest = min(256 << 20, (4 << 20) + ((body["num_images"] if body else 0) << 16))
        if not hasattr(self._local, "session"):  # requests does not promise that threads can share one
            self._local.session = _Session(self.url)
        started, attempts, faults = time.monotonic(), 0, 0
        while True:
            try:
                found = self._local.session.ask(method, self.url + path, body, self._timeout, largest)
                self._last_answer = time.monotonic()
                return found
            except PassingFault as cause:
                attempts += 1
                is_500 = isinstance(cause, ServerFault)
                faults += is_500
                if is_500:
                    lasts = faults >= (TRIES_500 if self._proven else TRIES_500_AT_START)
                else:
                    lasts = time.monotonic() - max(started, self._last_answer) > self._patience
                if not (lasts or attempts >= (tries or TRIES) or self._stop.is_set()):
                    self.retries += 1
                    self._stop.wait(random.uniform(0, min(LONGEST_PAUSE, 0.1 * 2 ** (attempts - 1))))
                    continue
                if tries is not None or (is_500 and not self._proven):
                    raise
                if is_500:
                    raise ServiceError(
                        f"{self.url}{path} answered {faults} times with 500 to {what}, while it answers others. "
                        "Look at the service's log: perhaps its metadata has fewer rows than its index. What is found "
                        "so far is kept; repair the service and run the same command again."
                    ) from cause
                raise ServiceError(
                    f"{self.url} gave no answer for {time.monotonic() - started:.0f} s; at last: {cause}.\n"
                    "Is the service running, and can this machine reach it? What is found so far is kept: once it "
                    "answers again, run the same command again."
                ) from cause

    def check(self, probe: np.ndarray, k: int) -> list[Hit]:
        """Checks that the service is set up for queries such as a probe [d]; returns its k hits.

        Raises:
            ServiceError: saying what to change.
        """
        self.check_index()
        try:
            hits = self.query(probe, k)
        except ServerFault as cause:
            hits = self._second_look(probe, k, cause)
        self._proven = True
        return hits

    def check_index(self) -> None:
        """Checks that the service answers and has the index.

        Raises:
            ServiceError: saying what to change.
        """
        try:
            found = self._ask("GET", "/indices-list")
        except ServerFault as cause:
            raise ServiceError(f"{cause}. Expected a list of names; look at the service's log.") from cause
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise ServiceError(
                f"{self.url}/indices-list answered {_shown(found)}; expected a list of names. Is this the "
                "address of clip-retrieval back?"
            )
        choose = f"Choose one with --service-index: {_names(found)}"
        if not found:
            raise ServiceError(
                f"{self.url} serves no index. Start it with one: scripts/knn_service.sh --index DIR"
            )
        if self.index is None and len(found) > 1:
            raise ServiceError(f"{self.url} serves {len(found)} indices. {choose}")
        self.index = self.index or found[0]
        if self.index not in found:
            raise ServiceError(f"{self.url} has no index {self.index!r}. {choose}")

    def _second_look(self, probe: np.ndarray, k: int, cause: ServerFault) -> list[Hit]:
        """Finds out why the service answered 500 to the probe; returns its hits if that was a passing fault after all.

        It says 500 and nothing else to a wrong dimension, a missing image index or short metadata: a few more
        questions tell these apart.
        """
        where = f"Index {self.index!r} of {self.url}"
        if self._answers(probe, 1, "image"):
            if self._answers(probe, k, "image"):
                self._proven = True
                return self.query(probe, k)
            raise ServiceError(
                f"{where} answers for one neighbour and fails for {k}: its metadata has fewer rows than its index, or "
                f"{k} is more than it can do. Build the index folder again (arf index), or ask for fewer with --k."
            ) from cause
        if self._answers(probe, 1, "text"):
            raise ServiceError(
                f"{where} has a text index and no image index (image.index), so it cannot be asked for images. Build "
                "one: arf index --embeddings POOL --out DIR, and serve that."
            ) from cause
        for dimension in DIMENSIONS:
            if dimension != len(probe) and self._answers(np.eye(1, dimension)[0], 1, "image"):
                raise ServiceError(
                    f"{where} holds vectors of dimension {dimension}, the queries have {len(probe)}. Embed the queries "
                    "with the model that the index was built with, or serve an index of this model."
                ) from cause
        raise ServiceError(
            f"{where} fails (500) for a sound query of dimension {len(probe)}: {cause}. Its vectors have another "
            "dimension, its image.index is missing, or its metadata has fewer rows than the index or rows without an "
            "image_path; its log says which."
        ) from cause

    def _answers(self, vector: np.ndarray, k: int, modality: str) -> bool:
        """Whether the service answers at all, be it wrong in some other way."""
        try:
            self.query(vector, k, modality=modality, tries=2)
        except PassingFault:
            return False
        except ServiceError:
            return True
        return True


class _Session(requests.Session):
    """A session of one thread with one service: nobody is redirected, no cookie is kept."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._adapter = _Adapter()
        for scheme in ("http://", "https://"):
            self.mount(scheme, self._adapter)
        # Proxies and certificates of the environment, looked up once: requests would do so for every query.
        found = self.merge_environment_settings(address, {}, None, None, None)
        self.proxies, self.verify, self.cert = found["proxies"], found["verify"], found["cert"]
        self.trust_env = False
        self.headers["Accept-Encoding"] = "identity, gzip;q=0.5, deflate;q=0.5"
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """None: where a reply leads to is not even looked at."""
        return None

    def ask(self, method: str, url: str, body: dict[str, Any] | None, timeout: float, largest: int) -> Any:
        """Sends a request once and returns the JSON of its reply, of at most so many bytes.

        Raises:
            PassingFault: for what may be gone at the next try.
            ServiceError: for anything else.
        """
        late = threading.Event()
        asked: dict[str, Any] = {"json": body, "timeout": timeout, "stream": True, "allow_redirects": False}
        try:
            with self._deadline(timeout, late), self.request(method, url, **asked) as reply:
                content = _read(reply, largest)
            if late.is_set():  # cut off between two parts of a reply that has no length
                raise TimeoutError
        except (OSError, ValueError, urllib3.exceptions.HTTPError, http.client.HTTPException) as cause:
            if late.is_set():
                raise PassingFault(f"{url} did not answer in full within {timeout:g} s") from cause
            if isinstance(cause, requests.exceptions.RequestException) and not isinstance(cause, _PASSING):
                raise ServiceError(f"{url} cannot be asked: {_shown(str(cause), 400)}") from cause
            raise PassingFault(_shown(str(cause), 400)) from cause
        return _answer(url, reply, content)

    @contextmanager
    def _deadline(self, seconds: float, late: threading.Event) -> Iterator[None]:
        """Cuts the connection if the block has not ended after so many seconds.

        The timeout of requests is one for each wait for bytes, which a service that sends one byte now and then never
        exceeds, in the middle of a header, too.
        """
        done = threading.Event()

        def cut() -> None:
            pause = seconds
            while not done.wait(pause):
                late.set()
                self._adapter.cut()
                pause = 0.05  # between two tries to connect there is nothing to cut, and then there is again

        threading.Thread(target=cut, daemon=True).start()
        try:
            yield
        finally:
            done.set()


class _Adapter(HTTPAdapter):
    """Remembers the socket of its latest connection, to cut it off."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        super().__init__()

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        adapter = self
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
        if not hasattr(pool.ConnectionCls, "watched"):  # it depends on the address, and on the proxy

            class Connection(pool.ConnectionCls):
                watched = True

                def _new_conn(self) -> socket.socket:
                    connected: socket.socket = super()._new_conn()
                    # A second handle: the first is taken over by TLS, and forgotten by http.client.
                    adapter._remember(connected.dup())
                    return connected

            pool.ConnectionCls = Connection
        return pool

    def _remember(self, handle: socket.socket | None) -> None:
        with self._lock:
            if self._socket is not None:
                self._socket.close()
            self._socket = handle

    def cut(self) -> None:
        """Ends the connection: whoever waits for its bytes gets none, at once."""
        with self._lock, suppress(OSError):  # already ended
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        super().close()
        self._remember(None)


def _read(reply: requests.Response, largest: int) -> bytes:
    """Reads a reply, which must not be endless, nor become so when it is unpacked."""
    encoding = reply.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise ServiceError(
            f"{reply.url} answered with the Content-Encoding {_shown(encoding)}, which was not asked for."
        )
    content = bytearray()
    for part in reply.iter_content(1 << 16):
        content += part
        if len(content) > largest:
            raise ServiceError(
                f"{reply.url} answered more than {largest >> 20} MiB. Expected a few kilobytes per hit; look at what "
                "the service returns (--columns_to_return), or ask for fewer hits: --k"
            )
    return bytes(content)


def _answer(url: str, reply: requests.Response, content: bytes) -> Any:
    """JSON of a reply; NaN, which clip-retrieval writes, becomes None."""
    status, said = reply.status_code, _shown(content[:200].decode("utf-8", "replace").strip())
    if status == 500:
        raise ServerFault(f"{url} answered 500 {said}")
    if status in (429, 502, 503, 504):
        raise PassingFault(f"{url} answered {status}")
    if 300 <= status < 400:
        raise ServiceError(
            f"{url} redirects to {_shown(reply.headers.get('Location'))}, which is not followed. If that is the "
            "service, give its address with --service-url."
        )
    if status != 200:
        raise ServiceError(
            f"{url} answered {status} {said}. Expected clip-retrieval back at this address; give it "
            "as --service-url without a path, such as http://127.0.0.1:1234"
        )
    if "json" not in reply.headers.get("Content-Type", ""):
        raise ServiceError(
            f"{url} answered {reply.headers.get('Content-Type') or 'something without a type'}, not JSON: "
            f"{said}. Is this the address of clip-retrieval back, not of its front end?"
        )
    try:
        return json.loads(content.decode("utf-8-sig"), parse_constant=lambda name: None)
    except (json.JSONDecodeError, UnicodeDecodeError) as cause:  # it may have been cut
        raise PassingFault(
            f"{url} answered broken JSON ({len(content)} bytes: {_shown(str(cause))})"
        ) from cause
    except (RecursionError, ValueError) as cause:
        nested = isinstance(cause, RecursionError)
        problem = "is nested too deeply" if nested else "has a number of thousands of digits"
        raise ServiceError(
            f"{url} answered JSON that {problem}: {said}. Is this the address of clip-retrieval back?"
        ) from cause


def _hits(reply: Any, k: int, wants: str) -> list[Hit]:
    """Checks a reply of /knn-service.

    Raises:
        ServiceError: saying what to change.
    """
    if not isinstance(reply, list):
        raise ServiceError(
            f"The service answered {_shown(reply)}; expected a list of hits. Is another program (a proxy, another "
            "version) at this address? The address should be that of clip-retrieval back."
        )
    if not reply:
        raise ServiceError(
            "The service found nothing at all for a sound query: its index is empty. Build it again with: arf index"
        )
    hits = [_hit(hit, wants) for hit in reply]
    if len(hits) != k:
        raise ServiceError(
            f"The service returned {len(hits)} hits, {k} were asked for. Either its index holds fewer vectors than "
            "--pool has rows, or it is approximate and looks at too few of them: ask for fewer neighbours with --k, "
            "raise the index's efSearch (HNSW) or nprobe (IVF), or search without the service: --backend exact"
        )
    values = [hit.similarity for hit in hits]
    if any(low < high - 1e-6 for low, high in pairwise(values)):
        raise ServiceError(
            f"The service's hits do not fall in similarity ({values[0]:.3f}, then {max(values[1:]):.3f}): its index "
            "measures distances. Expected one with inner product, as written by: arf index, or clip-retrieval index"
        )
    if max(abs(value) for value in values) > LARGEST_SIMILARITY:
        raise ServiceError(
            f"The service returned a similarity of {max(values, key=abs):.3f}; a cosine lies between -1 and 1. Its "
            "index holds vectors that are not of unit norm, or measures distances. Build it again with: arf index"
        )
    return hits


def _hit(hit: Any, wants: str) -> Hit:
    fields: dict[str, Any] = hit if isinstance(hit, dict) else {}
    row, key = fields.get("id"), fields.get(wants)
    similarity: Any = fields.get("similarity")
    # To isinstance a bool would be a number, too.
    if type(row) is not int or type(similarity) not in (int, float):
        raise ServiceError(
            f"The service answered the hit {_shown(hit)}; expected numbers 'id' and 'similarity'. A similarity that is "
            "not a number (NaN) comes from NaN vectors in its index: build it again with arf index, which refuses them."
        )
    if not 0 <= row <= LARGEST_ROW:
        raise ServiceError(
            f"The service answered the hit {_shown(hit)}; its 'id' is the number of a row of the index, from 0. Faiss "
            "writes -1 for neighbours that it has not found: ask for fewer with --k, or build the index again."
        )
    if not isinstance(key, str) or not key:
        raise ServiceError(
            f"The service's hit {row} has no '{wants}' (found: {_names(sorted(hit)) or 'nothing'}), so nobody can "
            "tell which pair it is. "
            "Serve an index folder whose metadata/*.parquet have that column, filled for every row (arf index copies "
            "them, clip-retrieval index too unless --copy_metadata False), and let the service return it: "
            'clip-retrieval back --columns_to_return \'["image_path","caption","url","sha256"]\''
        )
    if utf8(key) != key:  # a half of a surrogate pair, which JSON can spell and nothing can store
        raise ServiceError(
            f"The service's hit {row} has the '{wants}' {_shown(key)}, which is no text. Expected the "
            "key of a pair; build the index folder again with: arf index"
        )
    similarity = float(similarity) if abs(similarity) < 1e300 else math.inf
    if wants == "image_path":
        return Hit(key, row, similarity)
    said = [value if isinstance(value := fields.get(name), str) else "" for name in _SAID]
    name, url, caption, sha256 = (utf8(value) or None for value in said)
    return Hit(name or str(row), row, similarity, url, caption, sha256)


def _names(values: Sequence[str]) -> str:
    """Names that the service gave, for a message."""
    return ", ".join(_shown(value) for value in values[:10]) + (", ..." if len(values) > 10 else "")


def _shown(value: Any, longest: int = 120) -> str:
    """A foreign value for a message: short, and without control characters."""
    text = value if isinstance(value, str) else ""
    for piece in () if isinstance(value, str) else json.JSONEncoder(default=repr).iterencode(value):
        text += piece[: longest + 1]
        if len(text) > longest:
            break
    text = "".join(c if c.isprintable() else " " for c in text[: longest + 1])
    return text if len(text) <= longest else text[: longest - 3] + "..."
