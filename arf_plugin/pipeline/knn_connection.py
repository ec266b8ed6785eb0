"""HTTP connections to a service that is not trusted to end what it says: requests with a deadline for the whole.

The timeout of requests is one for each wait for bytes, which a service that sends one byte now and then never exceeds,
in the middle of a header, too. Here a timer cuts the connection itself, whatever is being waited for.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.cookiejar import DefaultCookiePolicy
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter


class Session(requests.Session):
    """A session of one thread with one service, which redirects nobody and leaves no cookies.

    Args:
        address: of the service.
    """

    def __init__(self, address: str) -> None:
        super().__init__()
        self.is_late = False  # whether the last request was cut off by its deadline
        self._seconds = 0.0
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

    @contextmanager
    def deadline(self, seconds: float) -> Iterator[None]:
        """Cuts the connection if the block has not ended after so many seconds."""
        self.is_late, self._seconds = False, seconds
        done = threading.Event()

        def cut() -> None:
            self.is_late = not done.is_set()
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

    def lateness(self, url: str) -> str:
        """What to say of a request that was cut off."""
        return f"{url} did not answer in full within {self._seconds:g} s"


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
                return adapter.remember(super()._new_conn())

        return type(pool.__name__, (pool,), {"ConnectionCls": Connection, "watched": True})

    def remember(self, connected: socket.socket) -> socket.socket:
        """Keeps a second handle of a connection: the first is taken over by TLS, and forgotten by http.client."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
            self._socket = connected.dup()
        return connected

    def cut(self) -> None:
        """Ends the connection: whoever waits for its bytes gets none, at once."""
        with self._lock, suppress(OSError):  # already ended
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        super().close()
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None
