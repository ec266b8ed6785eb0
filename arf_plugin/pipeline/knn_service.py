"""Client of a clip-retrieval service (``clip-retrieval back``): nearest neighbours over HTTP.

The service takes one vector per request and answers 500 to almost every mistake, so :meth:`KnnClient.check` asks at
the start whether it is set up for our queries. :mod:`arf_plugin.pipeline.service` says what is tried again. A ``url``
in a hit is never fetched.
"""

from __future__ import annotations

import math
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from arf_plugin.errors import ServiceError
from arf_plugin.pipeline.service import PassingFault, ServerFault, ServiceClient, names, shown
from arf_plugin.untrusted import utf8

LARGEST_ROW = 1 << 62
LARGEST_SIMILARITY = 1.1  # compressed indexes overshoot a little
# Widths of published CLIP models and of the small ones of this project.
DIMENSIONS = (128, 256, 384, 512, 640, 768, 896, 1024, 1152, 1280, 1408, 1536)
_SAID = ("image_path", "url", "caption", "sha256")


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


class KnnClient(ServiceClient):
    """Asks a clip-retrieval service for neighbours.

    Args:
        url: address of ``clip-retrieval back``; with ``/knn-service``, too, which ClipClient's users are used to give.
        index: name of the index; None takes the only one.
        threads: requests under way at once.
        timeout: seconds for a whole answer, from the connection to its last byte.
        patience: seconds without any answer after which the service is given up.

    Attributes:
        index: the name of its index; :meth:`check_index` finds it out if there is only one.
        wants: what a hit must say of a pair: ``image_path``, its key, or ``url``, its link.
    """

    expected = (
        "Expected clip-retrieval back at this address, not its front end; give it as --service-url without a path, "
        "such as http://127.0.0.1:1234"
    )
    too_large = (
        "Expected a few kilobytes per hit; look at what the service returns (--columns_to_return), or ask for fewer "
        "hits: --k"
    )
    on_500 = ": perhaps its metadata has fewer rows than its index"
    wants = "image_path"

    def __init__(
        self,
        url: str,
        index: str | None = None,
        threads: int = 4,
        timeout: float = 60.0,
        patience: float = 300.0,
    ) -> None:
        super().__init__(url.rstrip("/").removesuffix("/knn-service"), timeout, patience)
        self.index, self.threads = index, threads

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
                    self.halt()
                    pool.shutdown(wait=False, cancel_futures=True)
            return [answer.result() for answer in asked if answer in done]  # all, or raises the failure
        finally:
            self.resume()

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

        :mod:`arf_plugin.pipeline.service` says how often it tries, unless ``tries`` does.

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
        largest = min(256 << 20, (4 << 20) + (k << 16))  # 64 KiB for what the metadata have of a hit
        reply = self.ask("POST", "/knn-service", body, what=what, largest=largest, tries=tries)
        return _hits(reply, k, self.wants)

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
        self.proven = True
        return hits

    def check_index(self) -> None:
        """Checks that the service answers and has the index.

        Raises:
            ServiceError: saying what to change.
        """
        try:
            found = self.ask("GET", "/indices-list", largest=4 << 20)
        except ServerFault as cause:
            raise ServiceError(f"{cause}. Expected a list of names; look at the service's log.") from cause
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise ServiceError(
                f"{self.url}/indices-list answered {shown(found)}; expected a list of names. Is this the "
                "address of clip-retrieval back?"
            )
        choose = f"Choose one with --service-index: {names(found)}"
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
                self.proven = True
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


def _hits(reply: Any, k: int, wants: str) -> list[Hit]:
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
            f"The service's hit {row} has no '{wants}' (found: {names(sorted(hit)) or 'nothing'}), so nobody can "
            "tell which pair it is. "
            "Serve an index folder whose metadata/*.parquet have that column, filled for every row (arf index copies "
            "them, clip-retrieval index too unless --copy_metadata False), and let the service return it: "
            'clip-retrieval back --columns_to_return \'["image_path","caption","url","sha256"]\''
        )
    if utf8(key) != key:  # a half of a surrogate pair, which JSON can spell and nothing can store
        raise ServiceError(
            f"The service's hit {row} has the '{wants}' {shown(key)}, which is no text. Expected the "
            "key of a pair; build the index folder again with: arf index"
        )
    similarity = float(similarity) if abs(similarity) < 1e300 else math.inf
    if wants == "image_path":
        return Hit(key, row, similarity)
    said = [value if isinstance(value := fields.get(name), str) else "" for name in _SAID]
    name, url, caption, sha256 = (utf8(value) or None for value in said)
    return Hit(name or str(row), row, similarity, url, caption, sha256)
