"""What a clip-retrieval service answers: told apart into hits, faults that may pass, and mistakes to be explained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from arf_plugin.errors import ServiceError

if TYPE_CHECKING:
    import requests

LARGEST_REPLY = 256 << 20  # bytes
LARGEST_SIMILARITY = 1.1  # compressed indexes overshoot a little
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Hit:
    """A neighbour: the pool sample's key, its row in the service's index, and its inner product with the query."""

    key: str
    row: int
    similarity: float


class PassingFault(Exception):
    """A fault that may be gone at the next try."""


class ServerFault(PassingFault):
    """HTTP 500."""


def parse_hits(reply: Any, k: int) -> list[Hit]:
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
    hits = [_parse_hit(hit) for hit in reply]
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


def _parse_hit(hit: Any) -> Hit:
    row, similarity, key = (
        (hit.get("id"), hit.get("similarity"), hit.get("image_path"))
        if isinstance(hit, dict)
        else (None, None, None)
    )
    if not isinstance(row, int) or not isinstance(similarity, (int, float)):
        raise ServiceError(
            f"The service answered the hit {shown(hit)}; expected numbers 'id' and 'similarity'. A similarity that is "
            "not a number (NaN) comes from NaN vectors in its index: build it again with arf index, which refuses them."
        )
    if not isinstance(key, str) or not key:
        found = ", ".join(sorted(map(str, hit))) or "nothing"
        raise ServiceError(
            f"The service's hit {row} has no 'image_path' (found: {found}), so nobody can tell which pair it is. "
            "Serve an index folder whose metadata/*.parquet have that column, filled for every row (arf index copies "
            "them, clip-retrieval index too unless --copy_metadata False), and let the service return it: "
            'clip-retrieval back --columns_to_return \'["image_path","caption"]\''
        )
    return Hit(key, row, float(similarity))


def read(reply: requests.Response) -> bytes:
    """Reads a reply, which must not be endless."""
    parts, size = [], 0
    for part in reply.iter_content(_CHUNK):
        parts.append(part)
        size += len(part)
        if size > LARGEST_REPLY:
            raise ServiceError(
                f"{reply.url} answered more than {LARGEST_REPLY >> 20} MiB. Ask for fewer hits: --k"
            )
    return b"".join(parts)


def answer(url: str, reply: requests.Response, content: bytes) -> Any:
    """JSON of a reply. NaN, which clip-retrieval writes for missing metadata, becomes None."""
    status = reply.status_code
    if status == 500:
        raise ServerFault(f"{url} answered 500 {_shown_bytes(content)}")
    if status in (429, 502, 503, 504):
        raise PassingFault(f"{url} answered {status}")
    if 300 <= status < 400:
        raise ServiceError(
            f"{url} redirects to {shown(reply.headers.get('Location'))}, which is not followed. If that is the "
            "service, give its address with --service-url."
        )
    if status != 200:
        raise ServiceError(
            f"{url} answered {status} {_shown_bytes(content)}. Expected clip-retrieval back at this address; give it "
            "as --service-url without a path, such as http://127.0.0.1:1234"
        )
    if "json" not in reply.headers.get("Content-Type", ""):
        raise ServiceError(
            f"{url} answered {reply.headers.get('Content-Type') or 'something without a type'}, not JSON: "
            f"{_shown_bytes(content)}. Is this the address of clip-retrieval back, not of its front end?"
        )
    try:
        return json.loads(content, parse_constant=lambda name: None)
    except ValueError as cause:
        raise PassingFault(f"{url} answered broken JSON ({len(content)} bytes: {cause})") from cause


def _shown_bytes(content: bytes) -> str:
    return shown(content[:200].decode("utf-8", "replace").strip())


def shown(value: Any) -> str:
    """A foreign value for a message: short, and without control characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=True, default=repr)
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= 120 else text[:117] + "..."


def names(values: Sequence[str]) -> str:
    """Names that the service gave, for a message."""
    return ", ".join(shown(value) for value in values[:10]) + (", ..." if len(values) > 10 else "")
