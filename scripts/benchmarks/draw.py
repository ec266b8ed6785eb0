"""Draws SVG icons as small PNG images on white, in parallel, one cached file per set."""

from __future__ import annotations

import io
import multiprocessing
import os
import tarfile
from pathlib import Path

from benchmarks.files import bar, replacing

SIZE = 64


def draw(svg: str) -> bytes:
    """Draws one document.

    Returns:
        An RGB PNG of `SIZE` x `SIZE` pixels; empty if nothing is to be seen on white, or resvg cannot read it.
    """
    import resvg_py
    from PIL import Image

    try:
        png = resvg_py.svg_to_bytes(
            svg_string=svg, width=SIZE, height=SIZE, background="white", skip_system_fonts=True
        )
    except ValueError:
        return b""
    image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    if image.size != (SIZE, SIZE):  # a set may hold a few icons that are not square
        square = Image.new("RGB", (SIZE, SIZE), "white")
        image.thumbnail((SIZE, SIZE))
        square.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
        image = square
    if all(low == high for low, high in image.getextrema()):
        return b""
    out = io.BytesIO()
    image.save(out, "png")
    return out.getvalue()


def _draw_named(item: tuple[str, str]) -> tuple[str, bytes]:
    return item[0], draw(item[1])


def draw_set(name: str, documents: dict[str, str], folder: Path, processes: int | None = None) -> Path:
    """Draws a set's documents into `folder/<name>.tar`, unless that file is there already.

    Args:
        name: the file's name; must change with the documents, so put the set's version into it.
        documents: SVG text by icon name.
        folder: where the tar goes; its members are `<icon>.png`. Icons that show nothing are left out.
        processes: how many to use; all cores by default.
    """
    target = folder / f"{name}.tar"
    if target.is_file():
        return target
    work = sorted(documents.items())
    # spawn: the parent may have started threads, which a fork would copy in a bad state
    pool = multiprocessing.get_context("spawn").Pool(processes or os.cpu_count())
    with replacing(target) as temporary, pool, tarfile.open(temporary, "w") as tar:
        drawn = pool.imap(_draw_named, work, chunksize=16)
        for icon, png in bar(iterable=drawn, total=len(work), desc=f"draw {name}", unit="icon"):
            if png:
                add_bytes(tar, f"{icon}.png", png)
    return target


def add_bytes(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a member without time, owner or other facts of this machine: the same data gives the same tar."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def read_set(path: Path) -> dict[str, bytes]:
    """Reads the PNGs of a drawn set by icon name."""
    with tarfile.open(path) as tar:
        return {info.name.removesuffix(".png"): tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
