"""Plots: colours, ids, and names that come from others."""

from __future__ import annotations

import json
import re
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from PIL import Image
from support import report as made

from arf_plugin.report import render
from arf_plugin.report.report import Options, gather
from arf_plugin.report.style import INKS, Style

ARMS = [f"arm{n}" for n in range(12)]


def luminance(colour: str) -> float:
    """Relative luminance, as the Web Content Accessibility Guidelines define it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [0, 1])
def test_colours_can_be_read_as_text(dark):
    """4.5 to 1 is what the guidelines ask of text; names of arms are text in their colours."""
    paper = ("#ffffff", "#1c1f25")[dark]
    looks = Style(ARMS, "arm1", "arm0", "arm2").looks.values()
    for colour in [
        *((look.light, look.dark)[dark] for look in looks),
        INKS["ink"][dark],
        INKS["muted"][dark],
    ]:
        assert contrast(colour, paper) >= 4.5, colour


def test_arms_look_different():
    looks = Style(ARMS, "arm1", "arm0", "arm2").looks
    assert len({look.light for look in looks.values()}) == len({look.dark for look in looks.values()}) == 12
    assert len({look.mark for look in looks.values()}) == 12


def test_an_arm_has_the_same_colour_whatever_else_is_there():
    few, many = (
        Style(["before", "flyp", "arf"], "flyp", "before", "arf"),
        Style(["before", "flyp", *ARMS[:3], "arf"], "flyp", "before", "arf"),
    )
    for arm in ("before", "flyp", "arf"):
        assert few.looks[arm] == many.looks[arm]


drawn = pytest.mark.process  # drawing takes seconds


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    grid = made.Made(folder, {"before": "before", "flyp": "baseline", "arf": "arf"}).usual()
    text = (folder / "grid.json").read_text().replace('"ARF"', '"A$\\\\frac{1$<script>&é"')
    (folder / "grid.json").write_text(text)
    for arm in ("flyp", "arf"):
        log = "".join(made.step(e, 64, contrastive_loss=3.0 - e / 4, pair_anchor_loss=2.0) for e in range(4))
        grid.add_run(arm, 0, log)
    return gather([grid.write()], Options())


@drawn
def test_every_plot_is_sound_svg_with_ids_of_its_own(report):
    seen: set[str] = set()
    for name, group in report.groups.items():
        for number, panel in enumerate(group.panels):
            svg = render.for_page(panel, report.style, f"{name}-{number}")
            ElementTree.fromstring(
                svg.replace(
                    "<svg ",
                    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" ',
                    1,
                )
            )
            ids = re.findall(r'\bid="([^"]+)"', svg)
            assert len(ids) == len(set(ids)) and not seen & set(ids)
            seen |= set(ids)
            for used in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg):
                assert "".join(used) in ids
            assert "<script" not in svg and "<style" not in svg and "font-family" not in svg
            assert not any(light in svg for light, _ in INKS.values())  # every colour is a variable
    assert set(report.groups) == {"results", "curves", "domains", "calibration", "training"}


@drawn
def test_names_are_shown_as_they_are(report):
    svg = render.for_page(report.groups["results"].panels[0], report.style, "x")
    assert "A$\\frac{1$&lt;script&gt;&amp;é" in svg


@drawn
def test_long_names_leave_room(tmp_path):
    grid = made.Made(tmp_path, {"before": "before", "flyp": "baseline", "arf": "arf"}).usual()
    long = "features of image-text pairs" + " and so on" * 10
    (tmp_path / "grid.json").write_text(
        (tmp_path / "grid.json").read_text().replace('"ARF"', json.dumps(f"{long}, weight 10"))
    )
    report = gather([grid.write()], Options())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's own, where names leave the axes no width
        svg = render.for_page(report.groups["results"].panels[0], report.style, "x")
    assert "features of…weight 10" in svg and long not in svg


@drawn
def test_files(report, tmp_path):
    names = [
        name
        for section, group in report.groups.items()
        for name in render.save(section, group, tmp_path, report.style)
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    for path in tmp_path.glob("*.svg"):
        ElementTree.parse(path)
        assert "var(--" not in path.read_text()
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as image:
            assert image.width > 700 and len(image.convert("RGB").getcolors(1 << 20)) > 20


@drawn
def test_equal_inputs_give_equal_bytes(report, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        render.save("curves", report.groups["curves"], folder, report.style)
    assert len({b"".join(p.read_bytes() for p in sorted(Path(f).iterdir())) for f in folders}) == 1
