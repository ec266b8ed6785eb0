"""Client of a clip-retrieval service (``clip-retrieval back``): nearest neighbours over HTTP.

The service takes one vector per request and answers 500 to almost every mistake, so queries are checked here before
they are sent, and :mod:`arf_plugin.pipeline.knn_service_check` asks at the start whether it is set up for them.

What is tried again, with exponential backoff and jitter:

- Connection errors, timeouts, truncated replies and 429/502/503/504: until nobody has had an answer from the service
  for ``patience`` seconds, or 30 times for one query.
- 500: twice before the service has answered a query like this one, since it then means a mistake. Afterwards it
  cannot be one of those, so it counts as a passing fault, and is given up at the tenth 500 to one query.

A reply that has not arrived whole within ``timeout`` counts as a timeout, however it is spread over that time: what
drips a byte now and then keeps nobody waiting (:mod:`arf_plugin.pipeline.knn_connection`).

A query is answered in full or the search stops with an error, so faults cost time and never change a result.
Addresses that the service names (a redirect, an ``url`` in a hit) are never fetched.
"""

from __future__ import annotations

import http.client
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from arf_plugin.errors import FlagError, MissingDependencyError, PoolError, ServiceError
from arf_plugin.pipeline.knn_replies import (
    Hit,
    PassingFault,
    ServerFault,
    answer,
    largest_reply,
    parse_hits,
    read,
    shown,
)

if TYPE_CHECKING:
    import tenacity

    from arf_plugin.pipeline.knn_connection import Session

TRIES = 30
TRIES_500_AT_START = 3
TRIES_500 = 10


@dataclass(frozen=True)
class Service:
    """Where the service is and how to talk to it.

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


class KnnClient:
    """Asks a clip-retrieval service for neighbours.

    Args:
        service: where it is.

    Raises:
        MissingDependencyError: without requests or tenacity.
    """

    def __init__(self, service: Service) -> None:
        try:
            import requests
            import tenacity
            import urllib3
        except ImportError as cause:
            name = cause.name or "requests"
            raise MissingDependencyError(name, "arf retrieve --backend service", "retrieval") from None
        self.service = service
        self.index = service.index
        self.proven = False  # has answered a query with this index, dimension and k
        self.retries = 0
        self._requests, self._tenacity, self._urllib3 = requests, tenacity, urllib3
        self._local = threading.local()
        self._last_answer = -math.inf
        self._stop = threading.Event()

    def indices(self) -> list[str]:
        """Names of the service's indices.

        Raises:
            ServiceError: if it does not answer as clip-retrieval does.
        """
        try:
            names = self._ask("GET", "/indices-list")
        except ServerFault as cause:
            raise ServiceError(f"{cause}. Expected a list of names; look at the service's log.") from cause
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ServiceError(
                f"{self.service.base}/indices-list answered {shown(names)}; expected a list of names. Is this the "
                "address of clip-retrieval back?"
            )
        return names

    def search(self, queries: np.ndarray, k: int) -> Iterator[list[Hit]]:
        """Yields the k nearest neighbours of each query, best first, in the order of the queries.

        Args:
            queries: [n, d], finite and of unit norm.
            k: neighbours per query, at most the rows of the index.

        Raises:
            PoolError: for a bad query, before anything is sent.
            ServiceError: if the service fails for good or answers nonsense.
        """
        check_queries(queries)
        failures: list[Exception] = []

        def one(position: int) -> list[Hit]:
            if self._stop.is_set():
                return []
            try:
                return self.query(queries[position], k, what=f"query {position} of this block")
            except Exception as error:
                if not self._stop.is_set():  # else it was cut off because of another one
                    failures.append(error)
                    self._stop.set()
                raise

        try:
            with ThreadPoolExecutor(self.service.threads) as pool:
                try:
                    yield from pool.map(one, range(len(queries)))
                except (PassingFault, ServiceError):
                    raise failures[0] from None
                finally:
                    self._stop.set()  # threads that wait for their next try give up
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
        """Asks for the neighbours of one vector [d].

        Args:
            vector: the query.
            k: number of neighbours.
            modality: which of the service's indices.
            what: how messages call the query.
            tries: number of tries; by default as the module's docstring says.

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
        return parse_hits(self._ask("POST", "/knn-service", body, what, tries), k)

    def _ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        what: str = "",
        tries: int | None = None,
    ) -> Any:
        """Sends a request until there is an answer worth having; returns its JSON."""
        started = time.monotonic()
        faults = 0

        def stop(state: tenacity.RetryCallState) -> bool:
            nonlocal faults
            error = state.outcome.exception() if state.outcome else None
            if self._stop.is_set() or state.attempt_number >= (tries or TRIES):
                return True
            if isinstance(error, ServerFault):
                faults += 1
                return faults >= (TRIES_500 if self.proven else TRIES_500_AT_START)
            silence = time.monotonic() - max(started, self._last_answer)
            return silence > self.service.patience

        def count(state: tenacity.RetryCallState) -> None:
            self.retries += 1

        retrying = self._tenacity.Retrying(
            retry=self._tenacity.retry_if_exception_type(PassingFault),
            wait=self._tenacity.wait_random_exponential(multiplier=0.1, max=self.service.longest_pause),
            stop=stop,
            before_sleep=count,
            sleep=self._tenacity.sleep_using_event(self._stop),
            reraise=True,
        )
        try:
            found = retrying(self._once, method, path, body)
        except PassingFault as cause:
            if tries is not None or (isinstance(cause, ServerFault) and not self.proven):
                raise
            seconds = time.monotonic() - started
            if not isinstance(cause, ServerFault):
                raise ServiceError(
                    f"{self.service.base} gave no answer for {seconds:.0f} s; at last: {cause}.\n"
                    "Is the service running, and can this machine reach it? What is found so far is kept: once it "
                    "answers again, run the same command again."
                ) from cause
            raise ServiceError(
                f"{self.service.base}{path} answered {faults} times with 500 to {what}, while it answers others. "
                "Look at the service's log: perhaps its metadata has fewer rows than its index. What is found so "
                "far is kept; mend the service and run the same command again."
            ) from cause
        self._last_answer = time.monotonic()
        return found

    def _once(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """Sends a request once."""
        url = self.service.base + path
        errors = self._requests.exceptions
        passing = (
            errors.ConnectionError,
            errors.Timeout,
            errors.ChunkedEncodingError,
            errors.ContentDecodingError,
        )
        session, timeout = self._session(), self.service.timeout
        try:
            with (
                session.deadline(timeout),
                session.request(
                    method, url, json=body, timeout=timeout, stream=True, allow_redirects=False
                ) as reply,
            ):
                content = read(reply, largest_reply(body["num_images"] if body else 0))
            if session.is_late:  # cut off between two parts of a reply that has no length
                raise PassingFault(session.lateness(url))
        except (*passing, self._urllib3.exceptions.HTTPError, http.client.HTTPException) as cause:
            raise PassingFault(
                session.lateness(url) if session.is_late else shown(str(cause), 400)
            ) from cause
        except errors.RequestException as cause:
            raise ServiceError(f"{url} cannot be asked: {shown(str(cause), 400)}") from cause
        except (OSError, ValueError) as cause:
            raise PassingFault(f"{url} broke off: {shown(str(cause), 400)}") from cause
        return answer(url, reply, content)

    def _session(self) -> Session:
        """This thread's session; requests does not promise that threads can share one."""
        if not hasattr(self._local, "session"):
            from arf_plugin.pipeline.knn_connection import Session

            self._local.session = Session(self.service.base)
        session: Session = self._local.session
        return session


def check_queries(queries: np.ndarray) -> None:
    """Checks that queries [n, d] are finite and of unit norm, to the precision of fp16.

    The service answers an empty list to NaN, and wrong similarities to other norms.
    """
    norms = np.linalg.norm(np.asarray(queries, np.float32), axis=1)
    bad = np.flatnonzero(~(np.abs(norms - 1) < 0.01))
    if len(bad):
        raise PoolError(
            f"Query {bad[0]} has norm {norms[bad[0]]:g}; expected finite vectors of unit norm. Embed the queries again."
        )
