"""A contact sheet to check the join by eye: one row per concept, one column per vendor, labels beside."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.draw import SIZE
from benchmarks.files import replacing


def contact_sheet(
    path: Path,
    rows: Sequence[tuple[str, str]],
    vendors: Sequence[str],
    images: Mapping[tuple[str, str], bytes],
) -> None:
    """Writes the sheet.

    Args:
        path: a PNG file.
        rows: code and text of each concept to show.
        vendors: the columns.
        images: PNG by (vendor, code); a missing drawing leaves its cell grey.
    """
    from PIL import Image, ImageDraw

    text_width = 200
    sheet = Image.new("RGB", (text_width + SIZE * len(vendors), 20 + SIZE * len(rows)), "lightgrey")
    pen = ImageDraw.Draw(sheet)
    for column, vendor in enumerate(vendors):
        pen.text((text_width + SIZE * column + 2, 4), vendor[:10], fill="black")
    for line, (code, text) in enumerate(rows):
        top = 20 + SIZE * line
        pen.text((4, top + SIZE // 2 - 5), text[:32], fill="black")
        for column, vendor in enumerate(vendors):
            if (vendor, code) in images:
                sheet.paste(Image.open(io.BytesIO(images[vendor, code])), (text_width + SIZE * column, top))
    with replacing(path) as temporary:
        sheet.save(temporary, "png")
