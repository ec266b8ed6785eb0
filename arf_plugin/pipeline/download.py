"""Stage download: the images of a list of links, by img2dataset, as a pool of WebDataset shards.

img2dataset puts the images of a shard into a folder of the bookkeeping. What was meant goes from there into the pool,
in the list's order: where the list has the SHA-256 of an image's bytes, an image of other bytes is set aside. Whatever
else becomes of a link is told apart by kind, and counted.

    OUT/00000.tar ...    KEY.jpg, KEY.txt, KEY.json; KEY is the row in the list, whose columns the JSON has
    OUT/download.json    how many links there are, how many images arrived, and why the others did not, by kind

Links are opened as the list has them, of http and https alone, but for images whose server asks that they not be used
(``X-Robots-Tag``: noai, noindex and the like).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from arf_plugin.ablation.launch import last_lines
from arf_plugin.anchors.tars import add_member, scan_samples
from arf_plugin.errors import MissingDependencyError, PoolError, StageError
from arf_plugin.files import file_digest, replacing, write_json
from arf_plugin.pipeline import img2dataset_run
from arf_plugin.pipeline.execution import Execution
from arf_plugin.pipeline.links import LINKS, is_link
from arf_plugin.pipeline.stage import Outcome, Shard, Stage
from arf_plugin.pipeline.tables import TEXT, WHOLE, read_columns, write_table
from arf_plugin.untrusted import printable, read_json, utf8

ARRIVED, SWAPPED = "success", "another image"
# What img2dataset says of a link, and the kind of it.
_KINDS = (
    (r"X-Robots-Tag", "not to be used (noai, noindex)"),
    (r"redirected to|Redirection to", "redirected to elsewhere"),
    (r"HTTP Error (\d{3})", r"HTTP \1"),
    (r"timed out", "timed out"),
    (r"incomplete|IncompleteRead", "incomplete"),
    (r"urlopen error|Remote end closed|reset by peer", "no connection"),
)
_LOST_NETWORK = {"no connection", "timed out"}
_ENOUGH = 50  # links that are not all dead, unless the network is
_SIZES = ("width", "height", "original_width", "original_height")
_STATUS = {"row": WHOLE, "key": TEXT, "status": TEXT, "error_message": TEXT, "sha256": TEXT}
_STATUS |= dict.fromkeys(_SIZES, WHOLE)


@dataclass
class DownloadStage(Stage):
    """Downloads a list of links.

    Attributes:
        links: parquet file; see :mod:`arf_plugin.pipeline.links`.
        image_size: pixels of the shorter side that larger images are resized to.
        threads: links that are opened at once.
        shard_size: links per shard.
        python: interpreter of an environment that has img2dataset.
    """

    links: Path
    image_size: int = 256
    threads: int = 64
    shard_size: int = 10_000
    python: Path = Path(sys.executable)
    name = "download"
    unit = "links"

    @cached_property
    def _links(self) -> Any:
        return read_columns(self.links, LINKS, PoolError, ("url", "caption"))

    def config(self) -> dict[str, Any]:
        """The list, and what becomes of an image."""
        return {
            "links": file_digest(self.links),
            "image_size": self.image_size,
            "shard_size": self.shard_size,
        }

    def plan(self) -> list[Shard]:
        """So many links of the list each."""
        starts = range(0, self._links.num_rows, self.shard_size)
        tables = [self._links.slice(start, self.shard_size) for start in starts]
        return [Shard.counted(i, table, table.num_rows) for i, table in enumerate(tables)]

    def artifacts(self, shards: list[Shard]) -> list[Path]:
        """One tar per shard."""
        return [self.out / f"{shard.name}.tar" for shard in shards]

    def fetches(self) -> str | None:
        """The links."""
        return "links would be opened"

    def prepare(self, execution: Execution) -> None:
        """Looks for img2dataset."""
        code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('img2dataset') is None)"
        try:
            missing = subprocess.run([self.python, "-c", code], check=False).returncode
        except OSError as cause:
            raise StageError(f"--python {self.python} cannot be run: {cause.strerror}.") from cause
        if missing and str(self.python) == sys.executable:
            raise MissingDependencyError("img2dataset", "arf download", "download")
        if missing:
            raise StageError(f"--python {self.python} has no img2dataset. Install it there, or name another.")

    def process(self, shard: Shard, execution: Execution, advance: Callable[[int], object]) -> Outcome:
        """Downloads the links of a shard, and writes what was meant in their order."""
        first, links = shard.index * self.shard_size, shard.source.to_pylist()
        outcome = Outcome(samples=len(links))
        fit: dict[int, dict[str, Any]] = {}
        for row, link in enumerate(links, first):
            if not is_link(link["url"]):
                outcome.reject(str(link["url"]), "no link of http or https")
            elif not (link["caption"] or "").strip():
                outcome.reject(link["url"], "no caption")
            else:
                fit[row] = link
        with (
            self._fetched(fit) as (found, images),
            replacing(self.artifacts([shard])[0]) as temporary,
            tarfile.open(temporary, "w") as tar,
        ):
            for row, link in fit.items():
                problem, image = _problem(link, found.get(row)), images(found[row]) if row in found else None
                if problem or image is None:
                    outcome.reject(link["url"], problem or "lost")
                    continue
                outcome.kept += 1
                known = link | {name: found[row][name] for name in ("sha256", *_SIZES)}
                said = {name: value for name, value in known.items() if value is not None}
                add_member(tar, f"{row:09d}.jpg", image)
                add_member(tar, f"{row:09d}.txt", link["caption"].encode())
                add_member(tar, f"{row:09d}.json", json.dumps(said, ensure_ascii=False).encode())
            if not outcome.kept and len(fit) >= _ENOUGH and _kinds(outcome.rejects).keys() <= _LOST_NETWORK:
                raise PoolError(
                    f"Not one of {len(fit)} links could be reached, the first: {outcome.rejects[0][0]} "
                    f"({outcome.rejects[0][1]}). Is this machine connected?"
                )
        advance(len(links))
        return outcome

    def finalize(self, shards: list[Shard], execution: Execution) -> dict[str, Any]:
        """Counts what arrived, and why the rest did not."""
        markers = [read_json(self.work / "done" / f"{shard.name}.json", PoolError) for shard in shards]
        missing = _kinds([reject for marker in markers for reject in marker["rejects"]])
        info = {
            "links": sum(marker["samples"] for marker in markers),
            "arrived": sum(marker["kept"] for marker in markers),
            "missing": dict(missing.most_common()),
            "with_sha256": self._links.num_rows - self._links["sha256"].null_count,
        }
        for left in self.work.glob("raw-*"):  # by processes that were killed
            shutil.rmtree(left, ignore_errors=True)
        if not info["arrived"]:
            raise PoolError(f"Not one image arrived ({info['missing']}); see {self.work}/rejects.jsonl.")
        write_json(self.out / "download.json", info)
        return info

    @contextmanager
    def _fetched(
        self, links: dict[int, dict[str, Any]]
    ) -> Iterator[tuple[dict[int, dict[str, Any]], Callable[[dict[str, Any]], bytes | None]]]:
        """Has img2dataset download links by row; yields what it says of each, and what reads its image.

        Raises:
            StageError: it fails.
        """
        import pyarrow as pa

        if not links:
            yield {}, lambda said: None
            return
        with tempfile.TemporaryDirectory(prefix="raw-", dir=self.work) as name:
            raw = Path(name)
            urls = [link["url"] for link in links.values()]
            write_table(raw / "links.parquet", pa.table({"url": urls, "row": list(links)}))
            arguments = {
                "url_list": f"{raw}/links.parquet",
                "input_format": "parquet",
                "save_additional_columns": ["row"],
                "output_folder": f"{raw}/out",
                "output_format": "webdataset",
                "compute_hash": "sha256",
                "image_size": self.image_size,
                "resize_mode": "keep_ratio",
                "resize_only_if_bigger": True,
                "skip_reencode": True,  # JPEGs that are small enough stay the bytes that they are
                "extract_exif": False,
                "processes_count": 1,
                "thread_count": self.threads,
                "number_sample_per_shard": max(len(links), 2),
            }
            self._run(json.dumps(arguments), raw / "log.txt")
            tar, said = raw / "out/00000.tar", raw / "out/00000.parquet"
            if not (raw / "out/00000_stats.json").is_file():  # written last
                raise StageError(f"img2dataset has failed:\n{last_lines(raw / 'log.txt')}")
            members = {s.key: s.image for s in scan_samples(str(tar), PoolError) if s.image is not None}
            found = {row["row"]: row for row in read_columns(said, _STATUS, PoolError).to_pylist()}
            with tar.open("rb") as file:

                def image(said: dict[str, Any]) -> bytes | None:
                    member = members.get(said["key"])
                    if member is None:
                        return None
                    file.seek(member.offset)
                    return file.read(member.size)

                yield found, image

    def _run(self, arguments: str, log: Path) -> None:
        """Runs img2dataset; it ends with this process."""
        with log.open("wb") as file:
            process = subprocess.Popen(
                [self.python, img2dataset_run.__file__, arguments],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
            try:
                process.wait()
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _problem(link: dict[str, Any], said: dict[str, Any] | None) -> str | None:
    """Why the image of a link did not arrive, as ``KIND`` or ``KIND: DETAIL``; None if it did."""
    if said is None:
        return None
    message = said["error_message"] or ""
    if said["status"] == ARRIVED:
        is_meant = not link["sha256"] or link["sha256"] == said["sha256"]
        return None if is_meant else f"{SWAPPED}: its SHA-256 is {said['sha256']}, not {link['sha256']}"
    if said["status"] == "failed_to_resize":
        return f"no image: {message}"
    for pattern, kind in _KINDS:
        if match := re.search(pattern, message):
            return f"{match.expand(kind)}: {utf8(printable(message))[:200]}"
    return f"other: {utf8(printable(message))[:200]}"


def _kinds(rejects: list[Any]) -> Counter[str]:
    return Counter(reason.partition(":")[0] for _, reason in rejects)
