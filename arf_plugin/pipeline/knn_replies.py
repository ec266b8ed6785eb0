"""What a clip-retrieval service answers: told apart into hits, faults that may pass, and mistakes to be explained."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from arf_plugin.errors import ServiceError

if TYPE_CHECKING:
    import requests

LARGEST_REPLY = 256 << 20  # bytes
LARGEST_HIT = (
    1 << 16
)  # bytes, on average: a caption, an address, and whatever else the service's metadata has
LARGEST_ROW = 1 << 62
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
    is_bool = isinstance(row, bool) or isinstance(similarity, bool)  # which are numbers to Python
    if is_bool or not isinstance(row, int) or not isinstance(similarity, (int, float)):
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
            f"The service's hit {row} has no 'image_path' (found: {names(sorted(hit)) or 'nothing'}), so nobody can "
            "tell which pair it is. "
            "Serve an index folder whose metadata/*.parquet have that column, filled for every row (arf index copies "
            "them, clip-retrieval index too unless --copy_metadata False), and let the service return it: "
            'clip-retrieval back --columns_to_return \'["image_path","caption"]\''
        )
    if not _is_text(key):
        raise ServiceError(
            f"The service's hit {row} has the 'image_path' {shown(hit['image_path'])}, which is no text. Expected the "
            "key of a pair; build the index folder again with: arf index"
        )
    return Hit(key, row, _as_float(similarity))


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf


def _is_text(value: str) -> bool:
    """False for a half of a surrogate pair, which JSON can spell and nothing can store."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def largest_reply(hits: int) -> int:
    """Bytes that a reply with so many hits may have, generously."""
    return min(LARGEST_REPLY, (4 << 20) + hits * LARGEST_HIT)


def read(reply: requests.Response, largest: int = LARGEST_REPLY) -> bytes:
    """Reads a reply, which must not be endless, nor become so when it is unpacked.

    Raises:
        PassingFault: it cannot be unpacked.
        ServiceError: it is too large, or packed in an unknown way.
    """
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
        f"{url} answered JSON that {problem}: {_shown_bytes(content)}. Is this the address of clip-retrieval back?"
    )


def _shown_bytes(content: bytes) -> str:
    return shown(content[:200].decode("utf-8", "replace").strip())


def shown(value: Any, longest: int = 120) -> str:
    """A foreign value for a message: short, and without control characters."""
    if isinstance(value, str):
        text = value
    else:
        text = ""
        for piece in json.JSONEncoder(default=repr).iterencode(value):
            text += piece[: longest + 1]
            if len(text) > longest:
                break
    text = "".join(c if c.isprintable() else " " for c in text[: longest + 1])
    return text if len(text) <= longest else text[: longest - 3] + "..."


def names(values: Sequence[str]) -> str:
    """Names that the service gave, for a message."""
    return ", ".join(shown(value) for value in values[:10]) + (", ..." if len(values) > 10 else "")
