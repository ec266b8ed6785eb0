"""Asks HTTP services that may fail and are not trusted; what is common to the knn service and caption endpoints.

What is tried again, with exponential backoff and jitter, or after as long as the service asks for (``Retry-After``):

- Connection errors, timeouts, truncated replies, 408, 429 and 5xx but for 500 and 501: until nobody has had an answer
  from the service for ``patience`` seconds, or 30 times for one request.
- 500: twice before the service has proven that it answers such requests, since it then means a mistake. Afterwards it
  cannot be one of those, so it counts as a passing fault, and is given up at the tenth 500 to one request.

A request is answered in full or ends with an error, so faults cost time and never change a result. A reply has a
deadline as a whole and a largest size, and no address that it names (a redirect) is ever fetched.
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
from contextlib import contextmanager, suppress
from http.cookiejar import DefaultCookiePolicy
from typing import Any, ClassVar

import requests
import urllib3
from requests.adapters import HTTPAdapter

from arf_plugin.errors import ServiceError

TRIES, TRIES_500, TRIES_500_AT_START = 30, 10, 3  # for one request
LONGEST_PAUSE = 10.0  # seconds between two tries, unless the service asks for more
_PASSING = (
    requests.exceptions.ConnectionError,
    requests.exceptions.Timeout,
    requests.exceptions.ChunkedEncodingError,
    requests.exceptions.ContentDecodingError,
)


class PassingFault(Exception):
    """A fault that may be gone at the next try, after so many seconds if the service says so."""

    def __init__(self, text: str, after: float = 0.0) -> None:
        super().__init__(text)
        self.after = after


class ServerFault(PassingFault):
    """HTTP 500."""


class Refused(ServiceError):
    """Another HTTP status than 200 that trying again does not change."""

    def __init__(self, text: str, status: int, said: str) -> None:
        super().__init__(text)
        self.status, self.said = status, said


class ServiceClient:
    """Asks one service, from any number of threads.

    Args:
        url: address of the service, which the paths of requests follow.
        timeout: seconds for a whole answer, from the connection to its last byte.
        patience: seconds without any answer after which the service is given up.
        headers: of every request.

    Attributes:
        retries: requests that were sent again.
        proven: whether the service has answered a request like those to come.
        expected, too_large, on_500: sentences for messages: what should be at the address, what to do about a reply
            that is too large, and what a 500 to one request may mean.
    """

    expected: ClassVar[str]
    too_large: ClassVar[str]
    on_500: ClassVar[str] = ""

    def __init__(
        self, url: str, timeout: float, patience: float, headers: dict[str, str] | None = None
    ) -> None:
        self.url, self._timeout, self._patience, self._headers = url, timeout, patience, headers or {}
        self.retries, self.proven = 0, False
        self._local = threading.local()
        self._last_answer = -math.inf
        self._stop = threading.Event()

    def halt(self) -> None:
        """Makes all requests under way fail soon, until :meth:`resume`."""
        self._stop.set()

    def resume(self) -> None:
        """Allows requests again."""
        self._stop.clear()

    def ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        what: str = "",
        largest: int,
        tries: int | None = None,
    ) -> Any:
        """Sends a request until there is an answer worth having; the module's docstring says how often.

        Args:
            method: GET or POST.
            path: after the service's address.
            body: JSON.
            what: the request is called in messages.
            largest: bytes of a reply.
            tries: in place of those of the module's docstring.

        Returns:
            The JSON of the reply; NaN, which Python's servers write, becomes None.

        Raises:
            PassingFault: a fault that `tries` tries did not outlast, or a 500 before the service has proven itself.
            ServiceError: anything else; a :class:`Refused` for a status.
        """
        if not hasattr(self._local, "session"):  # requests does not promise that threads can share one
            self._local.session = _Session(self.url, self._headers, self._stop)
        url = self.url + path
        started, attempts, faults = time.monotonic(), 0, 0
        while True:
            try:
                reply, content = self._local.session.ask(method, url, body, self._timeout, largest)
                found = self._answer(url, reply, content, largest)
                self._last_answer = time.monotonic()
                return found
            except PassingFault as cause:
                attempts += 1
                is_500 = isinstance(cause, ServerFault)
                faults += is_500
                if is_500:
                    lasts = faults >= (TRIES_500 if self.proven else TRIES_500_AT_START)
                else:
                    lasts = time.monotonic() - max(started, self._last_answer) > self._patience
                if not (lasts or attempts >= (tries or TRIES) or self._stop.is_set()):
                    self.retries += 1
                    pause = random.uniform(0, min(LONGEST_PAUSE, 0.1 * 2 ** (attempts - 1)))
                    self._stop.wait(max(pause, min(cause.after, self._patience)))
                    continue
                if tries is not None or (is_500 and not self.proven):
                    raise
                if is_500:
                    raise ServiceError(
                        f"{url} answered {faults} times with 500 to {what}, while it answers others. Look at the "
                        f"service's log{self.on_500}. What is found so far is kept; repair the service and run the "
                        "same command again."
                    ) from cause
                raise ServiceError(
                    f"{self.url} gave no answer for {time.monotonic() - started:.0f} s; at last: {cause}.\n"
                    "Is the service running, and can this machine reach it? What is found so far is kept: once it "
                    "answers again, run the same command again."
                ) from cause

    def _answer(self, url: str, reply: requests.Response, content: bytes | None, largest: int) -> Any:
        """JSON of a reply; `content` is None if there was more than `largest`."""
        if content is None:
            raise ServiceError(f"{url} answered more than {largest >> 20} MiB. {self.too_large}")
        status, said = reply.status_code, shown(content[:400].decode("utf-8", "replace").strip(), 200)
        if status == 500:
            raise ServerFault(f"{url} answered 500 {said}")
        if status in (408, 429) or status > 501:
            raise PassingFault(f"{url} answered {status} {said}", _retry_after(reply))
        if 300 <= status < 400:
            raise ServiceError(
                f"{url} redirects to {shown(reply.headers.get('Location'))}, which is not followed. {self.expected}"
            )
        if status != 200:
            raise Refused(f"{url} answered {status} {said}. {self.expected}", status, said)
        if "json" not in reply.headers.get("Content-Type", ""):
            kind = shown(reply.headers.get("Content-Type") or "something without a type")
            raise ServiceError(f"{url} answered {kind}, not JSON: {said}. {self.expected}")
        try:
            return json.loads(content.decode("utf-8-sig"), parse_constant=lambda name: None)
        except (json.JSONDecodeError, UnicodeDecodeError) as cause:  # it may have been cut
            raise PassingFault(
                f"{url} answered broken JSON ({len(content)} bytes: {shown(str(cause))})"
            ) from cause
        except (RecursionError, ValueError) as cause:
            nested = isinstance(cause, RecursionError)
            problem = "is nested too deeply" if nested else "has a number of thousands of digits"
            raise ServiceError(f"{url} answered JSON that {problem}: {said}. {self.expected}") from cause


class _Session(requests.Session):
    """A session of one thread with one service: nobody is redirected, no cookie is kept."""

    def __init__(self, address: str, headers: dict[str, str], stop: threading.Event) -> None:
        super().__init__()
        self._stop, self._adapter = stop, _Adapter()
        for scheme in ("http://", "https://"):
            self.mount(scheme, self._adapter)
        # Proxies and certificates of the environment, looked up once: requests would do so for every query.
        found = self.merge_environment_settings(address, {}, None, None, None)
        self.proxies, self.verify, self.cert = found["proxies"], found["verify"], found["cert"]
        self.trust_env = False
        self.headers.update({"Accept-Encoding": "identity, gzip;q=0.5, deflate;q=0.5"} | headers)
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """None: where a reply leads to is not even looked at."""
        return None

    def ask(
        self, method: str, url: str, body: dict[str, Any] | None, timeout: float, largest: int
    ) -> tuple[requests.Response, bytes | None]:
        """Sends a request once and reads the reply; in place of more than so many bytes, None.

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
                raise ServiceError(f"{url} cannot be asked: {shown(str(cause), 400)}") from cause
            raise PassingFault(shown(str(cause), 400)) from cause
        return reply, content

    @contextmanager
    def _deadline(self, seconds: float, late: threading.Event) -> Iterator[None]:
        """Cuts the connection if the block has not ended after so many seconds, or soon if all is to stop.

        The timeout of requests is one for each wait for bytes, which a service that sends one byte now and then never
        exceeds, in the middle of a header, too.
        """
        done, end = threading.Event(), time.monotonic() + seconds

        def cut() -> None:
            # Again and again: between two tries to connect there is nothing to cut, and then there is again.
            while not done.wait(min(0.25, max(0.05, end - time.monotonic()))):
                if self._stop.is_set() or time.monotonic() >= end:
                    late.set()
                    self._adapter.cut()

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


def _read(reply: requests.Response, largest: int) -> bytes | None:
    """Reads a reply, which must not be endless, nor become so when it is unpacked."""
    encoding = reply.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise ServiceError(
            f"{reply.url} answered with the Content-Encoding {shown(encoding)}, which was not asked for."
        )
    content = bytearray()
    for part in reply.iter_content(1 << 16):
        content += part
        if len(content) > largest:
            return None
    return bytes(content)


def _retry_after(reply: requests.Response) -> float:
    """Seconds after which the service wants to be asked again; 0 if it does not say so in a way that can be read."""
    with suppress(ValueError, OverflowError, urllib3.exceptions.HTTPError):
        return urllib3.Retry().parse_retry_after(reply.headers.get("Retry-After", "")) or 0.0
    return 0.0


def names(values: Sequence[str]) -> str:
    """Names that a service gave, for a message."""
    return ", ".join(shown(value) for value in values[:10]) + (", ..." if len(values) > 10 else "")


def shown(value: Any, longest: int = 120) -> str:
    """A foreign value for a message: short, and without control characters."""
    text = value if isinstance(value, str) else ""
    for piece in () if isinstance(value, str) else json.JSONEncoder(default=repr).iterencode(value):
        text += piece[: longest + 1]
        if len(text) > longest:
            break
    text = "".join(c if c.isprintable() else " " for c in text[: longest + 1])
    return text if len(text) <= longest else text[: longest - 3] + "..."
