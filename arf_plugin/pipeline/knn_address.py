"""Where a clip-retrieval service is and how long to wait for it; all that is known of it without its client."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from urllib.parse import urlsplit

from arf_plugin.errors import FlagError


@dataclass(frozen=True)
class Service:
    """Where a clip-retrieval service is and how to talk to it.

    Attributes:
        url: address of ``clip-retrieval back``, such as ``http://127.0.0.1:1234``.
        index: name of the index; None takes the only one.
        threads: requests under way at once.
        timeout: seconds for a whole answer, from the connection to its last byte.
        patience: seconds without any answer after which the service is given up.
        longest_pause: seconds between two tries, at most.
    """

    url: str
    index: str | None = None
    threads: int = 4
    timeout: float = 60.0
    patience: float = 300.0
    longest_pause: float = 10.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise FlagError(
                f"--service-url {self.url}: expected an address such as http://127.0.0.1:1234, where clip-retrieval "
                "back listens."
            )
        if self.threads < 1:
            raise FlagError(f"--service-threads {self.threads}: expected at least 1.")
        if not 0 < self.timeout < threading.TIMEOUT_MAX:
            raise FlagError(f"--service-timeout {self.timeout:g}: expected seconds, more than 0.")
        if not self.patience >= 0:
            raise FlagError(f"--service-patience {self.patience:g}: expected seconds, 0 or more.")

    @property
    def base(self) -> str:
        """The address without a trailing ``/knn-service``, which ClipClient's users are used to give."""
        return self.url.rstrip("/").removesuffix("/knn-service")
