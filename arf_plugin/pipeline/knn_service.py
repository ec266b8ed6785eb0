"""Client of a clip-retrieval service (``clip-retrieval back``): nearest neighbours over HTTP.

The service takes one vector per request and answers 500 to almost every mistake, so queries are checked here before
they are sent, and :meth:`KnnClient.check` asks at the start whether it is set up for them.

What is tried again, with exponential backoff and jitter:

- Connection errors, timeouts, truncated replies and 429/502/503/504: until nobody has had an answer from the service
  for ``patience`` seconds, or 30 times for one query.
- 500: twice before the service has answered a query like this one, since it then means a mistake. Afterwards it
  cannot be one of those, so it counts as a passing fault, and is given up at the tenth 500 to one query.

A reply that has not arrived whole within ``timeout`` counts as a timeout (:mod:`arf_plugin.pipeline.knn_http`). A query
is answered in full or the search stops with an error, so faults cost time and never change a result. Addresses that
the service names (a redirect, an ``url`` in a hit) are never fetched.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import tenacity

from arf_plugin.errors import PoolError, ServiceError
from arf_plugin.pipeline.knn_address import Service
from arf_plugin.pipeline.knn_http import PassingFault, ServerFault, Session, shown

TRIES, TRIES_500, TRIES_500_AT_START = 30, 10, 3  # for one query
LARGEST_ROW = 1 << 62
LARGEST_SIMILARITY = 1.1  # compressed indexes overshoot a little
# Widths of published CLIP models and of the small ones of this project.
DIMENSIONS = (128, 256, 384, 512, 640, 768, 896, 1024, 1152, 1280, 1408, 1536)


class Hit(NamedTuple):
    """A neighbour: the pool sample's key, its row in the service's index, and its inner product with the query."""

    key: str
    row: int
    similarity: float


class KnnClient:
    """Asks a clip-retrieval service for neighbours.

    Args:
        service: where it is.

    Attributes:
        index: the name of its index; :meth:`check_index` finds it out if there is only one.
        retries: requests that were sent again.
    """

    def __init__(self, service: Service) -> None:
        self.service, self.index, self.retries = service, service.index, 0
        self._proven = False  # has answered a query with this index, dimension and k
        self._local = threading.local()
        self._last_answer = -math.inf
        self._stop = threading.Event()

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
        return _hits(self._ask("POST", "/knn-service", body, what, tries), k)

    def _ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        what: str = "",
        tries: int | None = None,
    ) -> Any:
        """Sends a request until there is an answer worth having; returns its JSON."""
        started, faults, service = time.monotonic(), 0, self.service
        hits = body["num_images"] if body else 0
        largest = min(
            256 << 20, (4 << 20) + (hits << 16)
        )  # bytes: 64 KiB for what the metadata have of a hit

        def stop(state: tenacity.RetryCallState) -> bool:
            nonlocal faults
            error = state.outcome.exception() if state.outcome else None
            if self._stop.is_set() or state.attempt_number >= (tries or TRIES):
                return True
            if isinstance(error, ServerFault):
                faults += 1
                return faults >= (TRIES_500 if self._proven else TRIES_500_AT_START)
            return time.monotonic() - max(started, self._last_answer) > service.patience

        def count(state: tenacity.RetryCallState) -> None:
            self.retries += 1

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(PassingFault),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=service.longest_pause),
            stop=stop,
            before_sleep=count,
            sleep=tenacity.sleep_using_event(self._stop),
            reraise=True,
        )
        if not hasattr(self._local, "session"):  # requests does not promise that threads can share one
            self._local.session = Session(service.base)
        try:
            found = retrying(
                self._local.session.ask, method, service.base + path, body, service.timeout, largest
            )
        except PassingFault as cause:
            if tries is not None or (isinstance(cause, ServerFault) and not self._proven):
                raise
            if not isinstance(cause, ServerFault):
                raise ServiceError(
                    f"{service.base} gave no answer for {time.monotonic() - started:.0f} s; at last: {cause}.\n"
                    "Is the service running, and can this machine reach it? What is found so far is kept: once it "
                    "answers again, run the same command again."
                ) from cause
            raise ServiceError(
                f"{service.base}{path} answered {faults} times with 500 to {what}, while it answers others. "
                "Look at the service's log: perhaps its metadata has fewer rows than its index. What is found so "
                "far is kept; repair the service and run the same command again."
            ) from cause
        self._last_answer = time.monotonic()
        return found

    def check(self, probe: np.ndarray, k: int) -> list[Hit]:
        """Is the service set up for our queries? Asks for the index's name and one query, before the first of them.

        Args:
            probe: [d], a query like those to come.
            k: neighbours per query.

        Returns:
            The probe's hits.

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
        address = self.service.base
        try:
            found = self._ask("GET", "/indices-list")
        except ServerFault as cause:
            raise ServiceError(f"{cause}. Expected a list of names; look at the service's log.") from cause
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise ServiceError(
                f"{address}/indices-list answered {shown(found)}; expected a list of names. Is this the "
                "address of clip-retrieval back?"
            )
        choose = f"Choose one with --service-index: {_names(found)}"
        if not found:
            raise ServiceError(
                f"{address} serves no index. Start it with one: scripts/knn_service.sh --index DIR"
            )
        if self.index is None and len(found) > 1:
            raise ServiceError(f"{address} serves {len(found)} indices. {choose}")
        self.index = self.index or found[0]
        if self.index not in found:
            raise ServiceError(f"{address} has no index {self.index!r}. {choose}")

    def _second_look(self, probe: np.ndarray, k: int, cause: ServerFault) -> list[Hit]:
        """Finds out why the service answered 500 to the probe; returns its hits if that was a passing fault after all.

        It says 500 and nothing else to a wrong dimension, a missing image index or short metadata: a few more
        questions tell these apart.
        """
        where = f"Index {self.index!r} of {self.service.base}"
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


def _hits(reply: Any, k: int) -> list[Hit]:
    """Checks a reply of /knn-service.

    Raises:
        ServiceError: saying what to change.
    """
    if not isinstance(reply, list):
        raise ServiceError(
            f"The service answered {shown(reply)}; expected a list of hits. Is another program (a proxy, another "
            "version) at this address? The address should be that of clip-retrieval back."
        )
    if not reply:
        raise ServiceError(
            "The service found nothing at all for a sound query: its index is empty. Build it again with: arf index"
        )
    hits = [_hit(hit) for hit in reply]
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


def _hit(hit: Any) -> Hit:
    fields: dict[str, Any] = hit if isinstance(hit, dict) else {}
    row, key = fields.get("id"), fields.get("image_path")
    similarity: Any = fields.get("similarity")
    numbers = (int, float)  # and not bool, which is one of them to isinstance
    if type(row) is not int or type(similarity) not in numbers:
        raise ServiceError(
            f"The service answered the hit {shown(hit)}; expected numbers 'id' and 'similarity'. A similarity that is "
            "not a number (NaN) comes from NaN vectors in its index: build it again with arf index, which refuses them."
        )
    if not 0 <= row <= LARGEST_ROW:
        raise ServiceError(
            f"The service answered the hit {shown(hit)}; its 'id' is the number of a row of the index, from 0. Faiss "
            "writes -1 for neighbours that it has not found: ask for fewer with --k, or build the index again."
        )
    if not isinstance(key, str) or not key:
        raise ServiceError(
            f"The service's hit {row} has no 'image_path' (found: {_names(sorted(hit)) or 'nothing'}), so nobody can "
            "tell which pair it is. "
            "Serve an index folder whose metadata/*.parquet have that column, filled for every row (arf index copies "
            "them, clip-retrieval index too unless --copy_metadata False), and let the service return it: "
            'clip-retrieval back --columns_to_return \'["image_path","caption"]\''
        )
    try:
        key.encode()
    except UnicodeEncodeError:  # a half of a surrogate pair, which JSON can spell and nothing can store
        raise ServiceError(
            f"The service's hit {row} has the 'image_path' {shown(key)}, which is no text. Expected the "
            "key of a pair; build the index folder again with: arf index"
        ) from None
    try:
        return Hit(key, row, float(similarity))
    except OverflowError:  # a whole number of hundreds of digits
        return Hit(key, row, math.inf)


def _names(values: Sequence[str]) -> str:
    """Names that the service gave, for a message."""
    return ", ".join(shown(value) for value in values[:10]) + (", ..." if len(values) > 10 else "")
