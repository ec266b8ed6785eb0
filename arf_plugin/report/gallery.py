"""The anchor gallery (Figure 5 of the paper): task images, their captions, and the pairs that they retrieved.

Which task images are shown is decided by a hash of their ids, spread over the classes: nobody picked them, and a second
report shows the same. One pass over the pairs' records is enough for that, and needs memory for a few dozen queries
only, however large the anchor set is.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from arf_plugin.anchors.captions import caption_batches
from arf_plugin.anchors.tars import Sample, scan_samples
from arf_plugin.errors import AnchorSetError, ReportError
from arf_plugin.files import list_files
from arf_plugin.report.images import Place, Thumbnail, read_image, read_task, thumbnail
from arf_plugin.report.sources import entries, finite
from arf_plugin.untrusted import parse_json

CANDIDATES = 6  # queries followed per card that is shown
PAIRS_SHOWN = 6
LONGEST_TEXT = 240  # characters
Advance = Callable[[], object]


class FoundPair(NamedTuple):
    """A pair as its record describes it."""

    key: str
    text: str
    place: Place
    similarity: float | None = None


@dataclass(frozen=True)
class ShownPair:
    """A pair with its thumbnail."""

    image: Thumbnail
    text: str
    similarity: float | None


@dataclass(frozen=True)
class Card:
    """One task image.

    Attributes:
        id: of the sample.
        label: name or number of its class; None if it has none.
        image: its thumbnail; None if there is no task data at hand.
        captions: of the anchor set.
        pairs: the nearest ones, best first.
    """

    id: str
    label: str | None
    image: Thumbnail | None
    captions: tuple[str, ...]
    pairs: tuple[ShownPair, ...]


@dataclass
class Gallery:
    """What the page shows of an anchor set.

    Attributes:
        cards: task images.
        loose: pairs that no query is on record for: drawn at random, or packed by hand.
        random: whether the records say that the pairs were drawn at random.
    """

    cards: list[Card]
    loose: tuple[ShownPair, ...]
    random: bool


def build_gallery(
    anchors: Path,
    task_data: str | None = None,
    classnames: list[str] | None = None,
    *,
    count: int = 12,
    csv: tuple[str, str] = ("filepath", "\t"),
    dataset_type: str = "auto",
    advance: Advance = lambda: None,
) -> Gallery:
    """Builds the gallery of an anchor set.

    Args:
        anchors: the set's folder.
        task_data: as ``--train-data``; None shows cards without task images.
        classnames: names by class number.
        count: cards.
        csv: column of the image paths and separator, for CSV task data.
        dataset_type: ``webdataset``, ``csv`` or ``auto``.
        advance: called when a pair has been looked at.

    Raises:
        AnchorSetError: for a damaged set.
        TaskDataError: for damaged task data.
        ReportError: if `anchors` is no anchor set.
    """
    tars, tables = list_files(anchors / "pairs", ".tar"), list_files(anchors / "captions", ".parquet")
    if not anchors.is_dir():
        text = f"{anchors} does not exist. Expected an anchor set; name its folder with --anchors."
        raise ReportError(text)
    if not tars and not tables:
        raise ReportError(
            f"{anchors} is no anchor set: there is neither captions/*.parquet nor pairs/*.tar. "
            "Name the folder that --arf-anchors was given with --anchors."
        )
    size = CANDIDATES * count
    queries, loose, random = _follow(tars, size, advance)
    ids = list(queries) or heapq.nsmallest(size, {i for i, _ in _captions(tables)}, key=place_in_hash_order)
    captions: dict[str, list[str]] = {identity: [] for identity in ids}
    for identity, caption in _captions(tables):
        if identity in captions:
            captions[identity].append(_short(caption))
    images, classes = read_task(task_data, ids, csv, dataset_type) if task_data else ({}, {})
    cards = []
    for identity in _spread([i for i in ids if i in images] or ids, classes, count):
        found = sorted(queries.get(identity, []), key=lambda pair: (-(pair.similarity or 0.0), pair.key))
        image = thumbnail(images.get(identity)) if task_data else None
        label = _label(classes.get(identity), classnames)
        cards.append(Card(identity, label, image, tuple(captions[identity]), _shown(found[:PAIRS_SHOWN])))
    return Gallery(cards, () if queries else _shown(loose[: 2 * PAIRS_SHOWN]), random)


def place_in_hash_order(identity: str) -> bytes:
    """Where an id comes in the order that chooses what is shown."""
    return hashlib.sha256(identity.encode("utf-8", "surrogatepass")).digest()


class _First(dict[str, list[FoundPair]]):
    """Pairs by name, of so many names as come first in the order of hashes.

    A name that was pushed out stays out, as the limit only falls: those that are left have all their pairs.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.heap: list[tuple[int, str]] = []  # the last of them on top

    def add(self, name: str, pair: FoundPair) -> None:
        """Takes a pair, if its name is among the first so far."""
        if name not in self:
            place = -int.from_bytes(place_in_hash_order(name), "big")
            if len(self) >= self.size:
                if place < self.heap[0][0]:
                    return
                del self[heapq.heapreplace(self.heap, (place, name))[1]]
            else:
                heapq.heappush(self.heap, (place, name))
            self[name] = []
        self[name].append(pair)

    def ordered(self) -> dict[str, list[FoundPair]]:
        """Them in their order."""
        return {name: self[name] for name in sorted(self, key=place_in_hash_order)}


def _follow(
    tars: list[Path], size: int, advance: Advance
) -> tuple[dict[str, list[FoundPair]], list[FoundPair], bool]:
    """Collects the pairs of the first queries, and a few pairs without any; says whether all were drawn at random."""
    queries, loose = _First(size), _First(2 * PAIRS_SHOWN)
    without, total = 0, 0
    for tar in tars:
        for sample in scan_samples(str(tar), AnchorSetError, read=("json", "txt")):
            advance()
            if sample.image is None:
                continue
            total += 1
            record, member = _record(sample), sample.members.get("txt")
            text = _short((member.data or b"").decode("utf-8", "replace")) if member is not None else ""
            pair = FoundPair(sample.key, text, Place(str(tar), sample.image))
            named, similarities = entries(record.get("queries")), entries(record.get("query_similarities"))
            if len(similarities) != len(named):
                similarities = [None] * len(named)
            if not named:
                without += "queries" in record
                loose.add(f"{tar.name}/{sample.key}", pair)
            for query, similarity in zip(named, similarities, strict=True):
                if isinstance(query, str):
                    queries.add(query, pair._replace(similarity=finite(similarity)))
    rest = [pair for pairs in loose.ordered().values() for pair in pairs]
    return queries.ordered(), rest, total > 0 and without == total


def _record(sample: Sample) -> dict[str, Any]:
    """The pair's provenance; empty if it has none, or none that can be read: hand-made sets need none."""
    member = sample.members.get("json")
    try:
        record: dict[str, Any] = parse_json(member.data or b"", sample.key, ReportError) if member else {}
    except ReportError:
        return {}
    return record


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"


def _captions(files: list[Path]) -> Iterator[tuple[str, str]]:
    """Ids and captions of a set's tables, read some ten thousand rows at a time."""
    import fsspec

    local = fsspec.filesystem("file")
    for path in files:
        for batch in caption_batches(local, str(path.absolute())):
            yield from zip(*(batch.column(name).to_pylist() for name in ("id", "caption")), strict=True)


def _shown(pairs: Iterable[FoundPair]) -> tuple[ShownPair, ...]:
    return tuple(
        ShownPair(thumbnail(read_image(pair.place, AnchorSetError)), pair.text, pair.similarity)
        for pair in pairs
    )


def _spread(ids: list[str], classes: dict[str, int], count: int) -> list[str]:
    """Takes the first of every class, then the second of every class, and so on."""
    seen: Counter[int | None] = Counter()
    turns = []
    for place, identity in enumerate(ids):
        cls = classes.get(identity)
        turns.append((seen[cls] if cls is not None else place, place, identity))
        seen[cls] += 1
    return [identity for _, _, identity in sorted(turns)[:count]]


def _label(cls: int | None, classnames: list[str] | None) -> str | None:
    if cls is None:
        return None
    return classnames[cls] if classnames and cls < len(classnames) else f"class {cls}"
