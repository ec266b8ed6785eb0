"""Stage pack: copies the chosen pairs from the pool's tars into the anchor set's WebDataset shards.

Only tars that hold a chosen pair are opened, each from front to back. Where the embedding stage noted an image's
offset, it is read there without a look at its neighbours; otherwise the tar is scanned. Shards are deterministic to
the byte: fixed order, owner and time.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from arf_plugin.anchors.files import digest, file_digest, replacing
from arf_plugin.anchors.ids import shard_name
from arf_plugin.anchors.images import IMAGE_EXTENSIONS, image_problem
from arf_plugin.anchors.manifest import begin_half, update_manifest
from arf_plugin.anchors.tars import open_shard, scan_samples
from arf_plugin.errors import PoolError
from arf_plugin.pipeline.stage import Outcome, Shard, Stage


@dataclass(frozen=True, slots=True)
class Pair:
    """A chosen pair and where to find it; ``number`` becomes its key in the anchor set."""

    number: int
    tar: str
    key: str
    ext: str
    offset: int
    size: int
    caption: str | None
    provenance: dict[str, Any]


class PackStage(Stage):
    """Writes ``pairs/NNNNNN.tar`` with KEY.(jpg|jpeg|png|webp), KEY.txt and KEY.json.

    Args:
        out: the anchor set.
        retrieved: folder of the stage retrieve.
        pool: URLs of the pool's tars. Needed if the embeddings do not name them (those of clip-retrieval), or if
            the tars have moved since.
        shard_size: pairs per shard.
        work: folder of the bookkeeping.
    """

    name = "pack"
    unit = "pairs"

    def __init__(
        self,
        out: Path,
        retrieved: Path,
        pool: list[str] | None = None,
        *,
        shard_size: int = 1000,
        work: Path | None = None,
    ) -> None:
        super().__init__(out, work)
        self._retrieved, self._pool, self._shard_size = retrieved, pool, shard_size
        self._list = retrieved / "pairs.parquet"
        if not self._list.exists():
            raise PoolError(f"{self._list} does not exist. Expected the output folder of: arf retrieve")

    def config(self) -> dict[str, Any]:
        """The list of pairs and the shard size."""
        return {"pairs": file_digest(self._list), "shard_size": self._shard_size}

    def plan(self) -> list[Shard]:
        """One shard per output tar."""
        pairs = self._pairs()
        chunks = [pairs[start : start + self._shard_size] for start in range(0, len(pairs), self._shard_size)]
        return [Shard(i, f"{i:06d}", chunk, len(chunk), len(chunk)) for i, chunk in enumerate(chunks)]

    def artifacts(self, shards: list[Shard]) -> list[Path]:
        """The output tars."""
        return [self.out / "pairs" / f"{shard.name}.tar" for shard in shards]

    def begin(self) -> None:
        """Notes in the anchor set that its pairs are not whole."""
        begin_half(self.out, "pairs")

    def process(self, shard: Shard, advance: Callable[[int], None]) -> Outcome:
        """Packs one output tar."""
        outcome = Outcome()
        with replacing(self.artifacts([shard])[0]) as temporary, tarfile.open(temporary, "w") as tar:
            for url, group in groupby(shard.source, key=lambda pair: pair.tar):
                for pair, image, text, problem in _read_pairs(url, list(group)):
                    outcome.samples += 1
                    advance(1)
                    if problem or image is None or text is None:
                        outcome.reject(f"{shard_name(url)}/{pair.key}", problem or "has no text")
                        continue
                    outcome.kept += 1
                    key = f"{pair.number:09d}"
                    provenance = json.dumps(pair.provenance, sort_keys=True, ensure_ascii=False)
                    _add(tar, f"{key}.{pair.ext}", image)
                    _add(tar, f"{key}.txt", text.encode("utf-8"))
                    _add(tar, f"{key}.json", provenance.encode("utf-8"))
        return outcome

    def finalize(self, shards: list[Shard]) -> dict[str, Any]:
        """Notes the pairs in the anchor set's manifest."""
        import pyarrow.parquet as pq

        count = 0
        for shard in shards:
            marker = json.loads((self.work / "done" / f"{shard.name}.json").read_text(encoding="utf-8"))
            count += marker["kept"]
        info = self._retrieved / "retrieve.json"
        retrieved = json.loads(info.read_text(encoding="utf-8")) if info.exists() else {}
        tars = sorted(set(pq.read_table(self._list, columns=["tar"])["tar"].to_pylist()) - {None})
        entry = {
            "count": count,
            "shards": len(shards),
            "shard_size": self._shard_size,
            "retrieve": retrieved,
            "pool_tars_used": len(tars),
            "config_digest": digest(self.config()),
        }
        update_manifest(self.out, "pairs", entry, self.artifacts(shards))
        return {"pairs": count, "pool_tars_used": len(tars)}

    def _pairs(self) -> list[Pair]:
        """The chosen pairs in the order of the pool."""
        import pyarrow.parquet as pq

        rows = pq.read_table(self._list).to_pylist()
        if any(row["tar"] is None or row["offset"] is None for row in rows):
            self._locate(rows)
        moved = {shard_name(url): url for url in self._pool or []}
        pairs = []
        for number, row in enumerate(rows):
            provenance = {
                "pool_shard": shard_name(row["tar"]),
                "pool_key": row["image_path"],
                "similarity": None if row["similarity"] is None else round(row["similarity"], 4),
                "queries": row["queries"],
                "query_similarities": [round(cosine, 4) for cosine in row["query_similarities"]],
                "query_count": row["query_count"],
            }
            tar = moved.get(shard_name(row["tar"]), row["tar"])
            where = (int(row["offset"]), int(row["size"] or 0))
            pairs.append(
                Pair(number, tar, row["image_path"], row["ext"] or "", *where, row["caption"], provenance)
            )
        return pairs

    def _locate(self, rows: list[dict[str, Any]]) -> None:
        """Finds the tar and offset of each key in the pool, for embeddings that do not name them."""
        if not self._pool:
            raise PoolError(
                f"{self._list} does not say which tars hold the pairs (embeddings made by clip-retrieval). "
                "Name the pool's tars with --pool."
            )
        wanted = {row["image_path"] for row in rows}
        places: dict[str, tuple[int, str, Any]] = {}
        for position, url in enumerate(self._pool):
            for sample in scan_samples(url, PoolError):
                if sample.key not in wanted or sample.image is None:
                    continue
                if sample.key in places:
                    raise PoolError(
                        f"The key {sample.key!r} occurs in {places[sample.key][1]} and in {url}, and the embeddings "
                        "name no tar, so the pair is ambiguous. Embed the pool with: arf embed"
                    )
                places[sample.key] = (position, url, sample.image)
        missing = sorted(wanted - places.keys())
        if missing:
            raise PoolError(
                f"{len(missing)} of {len(wanted)} chosen keys are in none of the {len(self._pool)} pool tars, the "
                f"first being {missing[0]!r}. Name all tars that were embedded with --pool."
            )
        for row in rows:
            _, url, image = places[row["image_path"]]
            row |= {"tar": url, "offset": image.offset, "size": image.size, "ext": image.ext}
        rows.sort(key=lambda row: (places[row["image_path"]][0], row["offset"], row["image_path"]))


_Read = tuple[Pair, bytes | None, str | None, str | None]


def _read_pairs(url: str, pairs: list[Pair]) -> Iterator[_Read]:
    """Yields (pair, image, text, problem) for the pairs of one tar, in their order."""
    if all(pair.offset >= 0 and pair.caption is not None and pair.ext for pair in pairs):
        with open_shard(url, PoolError) as file:
            for pair in pairs:
                image = _read_at(file, pair, url)
                yield pair, image, _checked(pair.caption), image_problem(io.BytesIO(image), 0, len(image))
        return
    wanted = {pair.key: pair for pair in pairs}
    found: dict[str, _Read] = {}
    for sample in scan_samples(url, PoolError, read=(*IMAGE_EXTENSIONS, "txt"), images=True):
        if sample.key not in wanted or sample.image is None:
            continue
        pair = wanted[sample.key]
        text, problem = pair.caption, sample.image.problem
        if text is None and "txt" in sample.members:
            try:
                text = (sample.members["txt"].data or b"").decode("utf-8")
            except UnicodeDecodeError as cause:
                problem = problem or f"its txt is not UTF-8 ({cause})"
        found[pair.key] = (pair, sample.image.data, _checked(text), problem)
    for pair in pairs:
        yield found.get(pair.key) or (pair, None, None, f"is not in {url}")


def _read_at(file: IO[bytes], pair: Pair, url: str) -> bytes:
    """Reads an image at its offset, having checked that the header before it is still the same member's."""
    file.seek(pair.offset - tarfile.BLOCKSIZE)
    block = file.read(tarfile.BLOCKSIZE + pair.size)
    try:
        header = tarfile.TarInfo.frombuf(block[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
        same = header.size == pair.size and len(block) == tarfile.BLOCKSIZE + pair.size
    except tarfile.HeaderError:
        same = False
    if not same:
        raise PoolError(
            f"{url} does not hold the image of {pair.key!r} at byte {pair.offset}: the tar has changed since it was "
            "embedded. Embed the pool and retrieve again."
        )
    return block[tarfile.BLOCKSIZE :]


def _checked(text: str | None) -> str | None:
    return text if text and text.strip() else None


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # TarInfo's own defaults: owner 0, mode 0644, time 0
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
