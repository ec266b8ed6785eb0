"""One HTTP request to a service that is not trusted: with a deadline for the whole, and an end to what it may say.

The timeout of requests is one for each wait for bytes, which a service that sends one byte now and then never exceeds,
in the middle of a header, too. Here a timer cuts the connection itself, whatever is being waited for. Nobody is
redirected, no cookie is kept, and a reply is neither larger nor unpacks to more than was asked for.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.cookiejar import DefaultCookiePolicy
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter

from arf_plugin.errors import ServiceError

_CHUNK = 1 << 16
_PASSING = (
    requests.exceptions.ConnectionError,
    requests.exceptions.Timeout,
    requests.exceptions.ChunkedEncodingError,
    requests.exceptions.ContentDecodingError,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
)


class PassingFault(Exception):
    """A fault that may be gone at the next try."""


class ServerFault(PassingFault):
    """HTTP 500."""


class Session(requests.Session):
    """A session of one thread with one service.

    Args:
        address: of the service.
    """

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
        """Sends a request once and returns the JSON of its reply; NaN, which clip-retrieval writes, becomes None.

        Args:
            method: GET or POST.
            url: where to.
            body: JSON to send.
            timeout: seconds for a whole answer.
            largest: bytes that the reply may have.

        Raises:
            PassingFault: for what may be gone at the next try.
            ServiceError: for anything else.
        """
        late = threading.Event()
        lateness = f"{url} did not answer in full within {timeout:g} s"
        asked: dict[str, Any] = {"json": body, "timeout": timeout, "stream": True, "allow_redirects": False}
        try:
            with self._deadline(timeout, late), self.request(method, url, **asked) as reply:
                content = _read(reply, largest)
            if late.is_set():  # cut off between two parts of a reply that has no length
                raise PassingFault(lateness)
        except _PASSING as cause:
            raise PassingFault(lateness if late.is_set() else shown(str(cause), 400)) from cause
        except requests.exceptions.RequestException as cause:
            raise ServiceError(f"{url} cannot be asked: {shown(str(cause), 400)}") from cause
        except (OSError, ValueError) as cause:
            raise PassingFault(f"{url} broke off: {shown(str(cause), 400)}") from cause
        return _answer(url, reply, content)

    @contextmanager
    def _deadline(self, seconds: float, late: threading.Event) -> Iterator[None]:
        """Cuts the connection if the block has not ended after so many seconds."""
        done = threading.Event()

        def cut() -> None:
            if not done.is_set():
                late.set()
            # Between two tries to connect there is nothing to cut, and then there may be again.
            while not done.wait(0.05):
                self._adapter.cut()

        timer = threading.Timer(seconds, cut)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            done.set()
            timer.cancel()


class _Adapter(HTTPAdapter):
    """Remembers the socket of its latest connection, to cut it off."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self._watch(self.poolmanager)

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        return self._watch(super().proxy_manager_for(*args, **kwargs))

    def _watch(self, manager: urllib3.PoolManager) -> urllib3.PoolManager:
        """Makes a manager's connections known to this adapter; those through a proxy are of other classes."""
        pools: dict[str, Any] = manager.pool_classes_by_scheme
        if not all(hasattr(pool, "watched") for pool in pools.values()):
            manager.pool_classes_by_scheme = {name: self._watched(pool) for name, pool in pools.items()}
        return manager

    def _watched(self, pool: Any) -> Any:
        adapter = self

        class Connection(pool.ConnectionCls):
            def _new_conn(self) -> socket.socket:
                connected: socket.socket = super()._new_conn()
                # A second handle: the first is taken over by TLS, and forgotten by http.client.
                adapter._remember(connected.dup())
                return connected

        return type(pool.__name__, (pool,), {"ConnectionCls": Connection, "watched": True})

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
            f"{reply.url} answered with the Content-Encoding {shown(encoding)}, which was not asked for."
        )
    unpack = zlib.decompressobj(zlib.MAX_WBITS | 32) if encoding not in ("", "identity") else None
    parts, size = [], 0
    for part in reply.raw.stream(_CHUNK, decode_content=False):
        if unpack is not None:
            try:
                part = unpack.decompress(part, largest - size + 1)
            except zlib.error as cause:
                raise PassingFault(f"{reply.url} answered what cannot be unpacked ({cause})") from cause
        parts.append(part)
        size += len(part)
        if size > largest:
            raise ServiceError(
                f"{reply.url} answered more than {largest >> 20} MiB. Expected a few kilobytes per hit; look at what "
                "the service returns (--columns_to_return), or ask for fewer hits: --k"
            )
    if unpack is not None and size and not unpack.eof:
        raise PassingFault(f"{reply.url} answered what cannot be unpacked (it is cut off)")
    return b"".join(parts)


def _answer(url: str, reply: requests.Response, content: bytes) -> Any:
    """JSON of a reply."""
    status, said = reply.status_code, shown(content[:200].decode("utf-8", "replace").strip())
    if status == 500:
        raise ServerFault(f"{url} answered 500 {said}")
    if status in (429, 502, 503, 504):
        raise PassingFault(f"{url} answered {status}")
    if 300 <= status < 400:
        raise ServiceError(
            f"{url} redirects to {shown(reply.headers.get('Location'))}, which is not followed. If that is the "
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
            f"{url} answered broken JSON ({len(content)} bytes: {shown(str(cause))})"
        ) from cause
    except RecursionError:
        problem = "is nested too deeply"
    except ValueError:
        problem = "has a number of thousands of digits"
    raise ServiceError(
        f"{url} answered JSON that {problem}: {said}. Is this the address of clip-retrieval back?"
    )


def shown(value: Any, longest: int = 120) -> str:
    """A foreign value for a message: short, and without control characters."""
    text = value if isinstance(value, str) else ""
    for piece in () if isinstance(value, str) else json.JSONEncoder(default=repr).iterencode(value):
        text += piece[: longest + 1]
        if len(text) > longest:
            break
    text = "".join(c if c.isprintable() else " " for c in text[: longest + 1])
    return text if len(text) <= longest else text[: longest - 3] + "..."
