"""Stage pack: copies the chosen pairs from the pool's tars into the anchor set's WebDataset shards.

Only tars that hold a chosen pair are opened, each from front to back. Where the embedding stage noted an image's
offset, it is read there without a look at its neighbours; otherwise the tar is scanned. Either way it must be the
image that was embedded; see :mod:`arf_plugin.pipeline.pool_images`. Shards are deterministic to the byte: fixed order,
owner and time.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tarfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from arf_plugin.anchors.manifest import begin_kind, update_manifest
from arf_plugin.anchors.tars import Sample, add_member, is_remote, local_path, scan_samples
from arf_plugin.errors import PoolError
from arf_plugin.files import digest, file_digest, replacing
from arf_plugin.pipeline.embeddings import METADATA
from arf_plugin.pipeline.execution import Execution
from arf_plugin.pipeline.pool_images import Pair, PoolTars, name_of, read_pairs
from arf_plugin.pipeline.stage import Outcome, Shard, Stage
from arf_plugin.pipeline.tables import NUMBER, NUMBERS, TEXTS, WHOLE, read_columns
from arf_plugin.untrusted import parse_json, read_json, utf8

COLUMNS = METADATA | {
    "similarity": NUMBER,
    "queries": TEXTS,
    "query_similarities": NUMBERS,
    "query_count": WHOLE,
}
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass
class PackStage(Stage):
    """Writes ``pairs/NNNNNN.tar`` with KEY.(jpg|jpeg|png|webp), KEY.txt and KEY.json.

    Attributes:
        retrieved: folder of the stage retrieve.
        pool: URLs of the pool's tars. Needed if the embeddings do not name them (those of clip-retrieval), or if
            the tars have moved since.
        shard_size: pairs per shard.
    """

    retrieved: Path
    pool: list[str] | None = None
    shard_size: int = 1000
    name = "pack"
    unit = "pairs"

    def __post_init__(self) -> None:
        self._list = self.retrieved / "pairs.parquet"
        self._not_downloaded = 0
        if not self._list.exists():
            raise PoolError(f"{self._list} does not exist. Expected the output folder of: arf retrieve")

    def config(self) -> dict[str, Any]:
        """The list of pairs and the shard size; and the tars, where the list does not say what they must hold."""
        config = {"pairs": file_digest(self._list), "shard_size": self.shard_size}
        if self._unverified:
            urls = sorted({url for pair in self._pairs for url, _ in pair.tars if not is_remote(url)})
            stats = [path.stat() for path in map(local_path, urls) if path.exists()]
            config |= {"pool": digest([[stat.st_size, stat.st_mtime_ns] for stat in stats])}
        return config

    def plan(self) -> list[Shard]:
        """One shard per output tar."""
        pairs = self._pairs
        chunks = [pairs[start : start + self.shard_size] for start in range(0, len(pairs), self.shard_size)]
        return [Shard.counted(i, chunk, len(chunk), digits=6) for i, chunk in enumerate(chunks)]

    def artifacts(self, shards: list[Shard]) -> list[Path]:
        """The output tars."""
        return [self.out / "pairs" / f"{shard.name}.tar" for shard in shards]

    def fetches(self) -> str | None:
        """Tars that are elsewhere."""
        far = sorted({url for pair in self._pairs for url, _ in pair.tars if is_remote(url)})
        return f"the pool's tars are elsewhere ({far[0]} ...)" if far else None

    def disk(self, shards: list[Shard]) -> float | None:
        """The images as they are in the pool, and what stands beside each of them."""
        sizes = [row["size"] for row in self._rows]
        return None if None in sizes else sum(size + 3072 for size in sizes)

    def begin(self) -> None:
        """Notes in the anchor set that its pairs are not whole."""
        begin_kind(self.out, "pairs")

    def process(self, shard: Shard, execution: Execution, advance: Callable[[int], object]) -> Outcome:
        """Packs one output tar."""
        outcome = Outcome()
        with replacing(self.artifacts([shard])[0]) as temporary, tarfile.open(temporary, "w") as tar:
            for _, group in groupby(shard.source, key=lambda pair: pair.recorded):
                for found in read_pairs(list(group)):
                    outcome.samples += 1
                    advance(1)
                    text = found.text if found.text and found.text.strip() else None
                    if found.problem or found.image is None or text is None:
                        name = f"{name_of(utf8(found.url))}/{found.pair.key}"
                        outcome.reject(name, found.problem or "has no text")
                        continue
                    outcome.kept += 1
                    key = f"{found.pair.number:09d}"
                    provenance = json.dumps(found.pair.provenance, sort_keys=True, ensure_ascii=False)
                    add_member(tar, f"{key}.{found.ext}", found.image)
                    add_member(tar, f"{key}.txt", text.encode("utf-8"))
                    add_member(tar, f"{key}.json", provenance.encode("utf-8"))
        return outcome

    def finalize(self, shards: list[Shard], execution: Execution) -> dict[str, Any]:
        """Notes the pairs in the anchor set's manifest."""
        markers = [read_json(self.work / "done" / f"{shard.name}.json", PoolError) for shard in shards]
        count = sum(marker["kept"] for marker in markers)
        info = self.retrieved / "retrieve.json"
        retrieved = read_json(info, PoolError) if info.exists() else {}
        tars = {row["tar"] for row in self._rows if row["tar"]}
        entry = {
            "count": count,
            "shards": len(shards),
            "shard_size": self.shard_size,
            "retrieve": retrieved,
            "pool_tars_used": len(tars),
            "config_digest": digest(self.config()),
        }
        unverified = {"unverified": self._unverified} if self._unverified else {}
        update_manifest(self.out, "pairs", entry | unverified, self.artifacts(shards))
        lost = {"not_downloaded": self._not_downloaded} if self._not_downloaded else {}
        return {"pairs": count, "pool_tars_used": len(tars)} | unverified | lost

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        """The list of pairs.

        Raises:
            PoolError: for what no search has written.
        """
        required = [name for name in COLUMNS if name != "sha256"]  # older versions had none
        rows: list[dict[str, Any]] = read_columns(self._list, COLUMNS, PoolError, required).to_pylist()
        for number, row in enumerate(rows):
            if not row["tar"]:  # a digest of others may be of the image before it was resized
                row |= {"tar": None, "sha256": None}
            cosines = list(row["query_similarities"] or [])
            cosines += [] if row["similarity"] is None else [row["similarity"]]
            if row["image_path"] is None:
                problem = "has no image_path, the key of the pair"
            elif not all(cosine is not None and math.isfinite(cosine) for cosine in cosines):
                problem = "has a similarity that is no number"
            elif row["sha256"] is not None and not _SHA256.fullmatch(row["sha256"]):
                problem = "has a sha256 that is none"
            else:
                continue
            raise PoolError(f"{self._list}, row {number}, {problem}. Retrieve again, with --restart.")
        return rows

    @property
    def _unverified(self) -> int:
        """Number of pairs whose images have no digest to be compared with."""
        return sum(row["sha256"] is None for row in self._rows)

    @cached_property
    def _pairs(self) -> list[Pair]:
        """The chosen pairs in the order of the pool; says what cannot be verified of them."""
        known = [row for row in self._rows if row["tar"] is not None]
        rows = known + self._locate([row for row in self._rows if row["tar"] is None])
        tars = PoolTars(self.pool or [], self._list)
        candidates = {row["tar"]: tars.candidates(row["tar"]) for row in rows}
        pairs = [
            Pair(
                number,
                recorded=row["tar"],
                tars=candidates[row["tar"]],
                key=row["image_path"],
                ext=row["ext"] or "",
                offset=-1 if row["offset"] is None else row["offset"],
                size=row["size"] or 0,
                caption=row["caption"],
                sha256=row["sha256"],
                texts_are_the_tars=number < len(known),
                provenance=_provenance(row),
            )
            for number, row in enumerate(rows)
        ]
        # What was downloaded has been compared with what its list knew.
        if unverified := sum(row["sha256"] is None and "pool_id" not in row for row in rows):
            print(
                f"pack: {unverified} of {len(pairs)} pairs have no digest of their image (embedded by "
                "clip-retrieval or by an older version), so they are taken by key, size and text alone, and whether "
                "they are what was embedded could not be verified. To be sure, embed the pool with: arf embed",
                file=sys.stderr,
            )
        return pairs

    def _locate(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Finds the tar and offset of each key in the pool, for embeddings that do not name them; in its order.

        A key that several tars have is found by its text, where that tells them apart.
        """
        if not rows:
            return []
        if not self.pool:
            raise PoolError(
                f"{self._list} does not say which tars hold the pairs (embeddings made by clip-retrieval). "
                "Name the pool's tars with --pool."
            )
        places: dict[str, list[tuple[int, str, str, Any, bytes | None]]] = defaultdict(list)
        wanted = {row["image_path"] for row in rows}
        downloaded = False
        for position, url in enumerate(self.pool):
            for sample in scan_samples(url, PoolError, read=("txt", "json")):
                key = utf8(sample.key)
                pool_id = _pool_id(sample, url)
                name, downloaded = pool_id or key, downloaded or pool_id is not None
                if name in wanted and sample.image is not None:
                    text = sample.members["txt"].data if "txt" in sample.members else None
                    places[name].append((position, utf8(url), key, sample.image, text))
        missing = sorted(wanted - places.keys())
        if missing and downloaded and places:
            self._not_downloaded = len(missing)
            print(f"pack: {len(missing)} of {len(wanted)} chosen pairs were not downloaded", file=sys.stderr)
            rows = [row for row in rows if row["image_path"] in places]
        elif missing:
            raise PoolError(
                f"{len(missing)} of {len(wanted)} chosen keys are in none of the {len(self.pool)} pool tars, the "
                f"first being {missing[0]!r}. Name all tars that were embedded with --pool."
            )
        found, agree, differ = [], 0, []
        for row in rows:
            key, said = row["image_path"], (row["caption"] or "").encode("utf-8")
            here = places[key]
            if len(here) > 1:
                here = [place for place in here if place[4] == said]
            if len(here) != 1:
                raise PoolError(
                    f"The key {key!r} occurs in {places[key][0][1]} and in {places[key][1][1]}, and the embeddings "
                    "name no tar, so the pair is ambiguous. Embed the pool with: arf embed"
                )
            position, url, name, image, text = here[0]
            if text is not None and row["caption"] is not None:
                agree += text == said
                differ += [] if text == said else [f"{key!r} in {url}"]
            place = {"tar": url, "offset": image.offset, "size": image.size, "ext": image.ext}
            place |= {"image_path": name} | ({"pool_id": key} if name != key else {})
            found.append((position, image.offset, key, row | place))
        if agree > len(differ) > 0:
            raise PoolError(
                f"The texts of {len(differ)} of {len(rows)} chosen pairs are not those of the pool's tars, {differ[0]} "
                "first, the others are: these tars have changed since they were embedded. Embed the pool again."
            )
        if differ:
            print(
                f"pack: the captions of {len(differ)} of {len(rows)} chosen pairs are not the txt of the tars "
                f"({differ[0]} first). If they were embedded from other tars, these are the wrong images.",
                file=sys.stderr,
            )
        return [row for *_, row in sorted(found, key=lambda place: place[:3])]


def _provenance(row: dict[str, Any]) -> dict[str, Any]:
    """What is written beside a pair."""
    known = {
        "pool_shard": name_of(utf8(row["tar"])),
        "pool_key": row["image_path"],
        "similarity": None if row["similarity"] is None else round(row["similarity"], 4),
        "queries": row["queries"] or [],
        "query_similarities": [round(cosine, 4) for cosine in row["query_similarities"] or []],
        "query_count": row["query_count"],
    }
    return known | {name: row[name] for name in ("sha256", "pool_id") if row.get(name)}


def _pool_id(sample: Sample, url: str) -> str | None:
    """The pair's name in the pool that it was downloaded from, where its JSON has one."""
    member = sample.members.get("json")
    if member is None or b'"pool_id"' not in (member.data or b""):
        return None
    said = parse_json(member.data or b"", f"{url}, {member.name}", PoolError, object)
    found = said.get("pool_id") if isinstance(said, dict) else None
    return found if isinstance(found, str) and found else None
