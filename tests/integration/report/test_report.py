"""`arf report` on runs of the real trainer, and its page in a real headless Chromium."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support import building, data, grids
from support.browser import browser
from support.report import HOSTILE, train_grid, write_pair_shards
from support.trainer import Trainer

from arf_plugin.evaluation.records import read_records
from arf_plugin.evaluation.verdicts import compare, find_arm, single

WIDTHS = (390, 1400)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> grids.World:
    """Task data and sets of drawings; captions, pairs and class names that try to be more than text."""
    world = grids.write_world(tmp_path_factory.mktemp("world"))
    ids = [f"{shard:03d}/{shard * 8 + i:05d}" for shard in range(3) for i in range(8)]
    anchors = world.folder / "anchors"
    for path in anchors.rglob("*.tar"):
        path.unlink()
    data.write_captions(anchors, dict.fromkeys(ids, HOSTILE))
    near = [{ids[(n + step) % 24]: 0.9 - step / 10 for step in range(4)} for n in range(24)]
    write_pair_shards(
        anchors, [{"queries": q, "text": HOSTILE, "image": building.drawing(n)} for n, q in enumerate(near)]
    )
    (anchors / "anchors.json").write_text(
        json.dumps(
            {
                "format_version": 1,
                "captions": {"count": 24, "captioner": HOSTILE},
                "pairs": {"count": 24, HOSTILE: [HOSTILE]},
            }
        )
    )
    return world


@pytest.fixture(scope="module")
def grid(tmp_path_factory, world, model_configs) -> Path:
    """A grid of real runs, renamed to something hostile."""
    folder = tmp_path_factory.mktemp("grid")
    train = Trainer(folder / "logs", model_configs, folder / "cache")
    grid = train_grid(folder / "grid", world, train)
    content = json.loads((grid / "grid.json").read_text())
    content["arms"][2] |= {"label": f"ARF {HOSTILE[:17]}", "what": HOSTILE}  # short enough for a panel
    (grid / "grid.json").write_text(json.dumps(content))
    return grid


@pytest.fixture(scope="module")
def report(grid, world, tmp_path_factory) -> Path:
    """The report's folder, made by the command."""
    from arf_plugin.cli.main import main

    out = tmp_path_factory.mktemp("report") / "report"
    # The class names that training was given are hostile by now.
    names = out.parent / "names.txt"
    names.write_text("\n".join([HOSTILE] * 6) + "\n")
    argv = ["report", grid, "--out", out, "--title", f"Drawings {HOSTILE}", "--classnames", names]
    assert main([str(word) for word in argv]) == 0
    return out


@pytest.fixture(scope="module")
def chromium():
    with browser() as started:
        yield started


@pytest.fixture(
    params=[(width, scheme) for width in WIDTHS for scheme in ("light", "dark")],
    ids=lambda p: f"{p[0]}-{p[1]}",
)
def page(request, chromium, report):
    """The page at a width and in a colour scheme; what the browser complained of is in ``page.complaints``."""
    width, scheme = request.param
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("dialog", lambda dialog: (page.complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on(
        "request", lambda asked: asked.url.startswith(("file:", "data:")) or page.complaints.append(asked.url)
    )
    page.goto((report / "index.html").as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    yield page
    page.close()


def test_the_page_is_whole_in_a_browser(page):
    assert page.complaints == []
    images = page.evaluate(
        "[...document.images].map(image => [image.complete, image.naturalWidth, image.naturalHeight])"
    )
    assert len(images) >= 12 and all(
        done and 0 < width <= 96 and 0 < height <= 96 for done, width, height in images
    )
    panels = page.evaluate(
        "[...document.querySelectorAll('svg.panel')].map(svg => svg.getBoundingClientRect().width)"
    )
    assert len(panels) >= 10 and all(width > 150 for width in panels)
    headings = page.locator("main h2").all_inner_texts()
    expected = ["Results", "Along α", "Accuracy per domain", "Anchors", "Calibration", "Training", "Runs"]
    assert headings == expected == page.locator("nav a").all_inner_texts()


def test_it_answers_first(page, report):
    """Before anything else: did it forget, with the scores before and after."""
    answer = json.loads((report / "report.json").read_text())["answer"]
    assert page.locator("h1").inner_text() == answer["headline"]
    shown = page.locator("table.answer tbody tr").all_inner_texts()
    assert shown[0].startswith("BEFORE") and {"ARF", "FLYP"} <= {re.split(r"\W", row)[0] for row in shown[1:]}
    place = "document.querySelector('table.answer').getBoundingClientRect().bottom"
    assert page.evaluate(f"{place} < document.querySelector('nav').getBoundingClientRect().top")


def test_no_letter_is_too_small(page):
    """In plots too, which shrink with the page: at least 11 pixels."""
    small = page.evaluate(
        """[...document.querySelectorAll('body *')].filter(part => [...part.childNodes].some(
            child => child.nodeType === 3 && child.textContent.trim())).map(part => {
            const svg = part.closest('svg'), size = parseFloat(getComputedStyle(part).fontSize);
            return [svg ? size * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : size,
                    part.outerHTML.slice(0, 90)];
        }).filter(([size]) => size < 11)"""
    )
    assert small == []


def test_nothing_is_wider_than_the_screen(page):
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    beyond = page.evaluate(
        """width => [...document.querySelectorAll('body *')].filter(part => {
            if (part.closest('.scroll, .many') || part.closest('svg')) return false;
            return part.getBoundingClientRect().right > width + 0.5;
        }).map(part => part.outerHTML.slice(0, 80))""",
        width,
    )
    assert beyond == []


def test_hostile_text_stays_text(page):
    assert page.evaluate("document.scripts.length") == 0
    assert (
        page.evaluate(
            "document.querySelectorAll('[onerror], [onload], iframe, object, embed, link, base').length"
        )
        == 0
    )
    assert page.title().startswith("Drawings <script>alert(1)</script>")
    spaced = " ".join(HOSTILE.split())
    for place in (".caption", ".pairs span", ".query .class", ".arms dd", ".eyebrow", ".rows dd"):
        assert any(spaced in text for text in page.locator(place).all_text_contents()), place
    assert any("<script>alert(1)" in text for text in page.locator("svg text").all_text_contents())
    assert "49" not in page.locator(".caption").first.text_content()


def test_words_can_be_read_in_light_and_dark(page):
    """Text and paper differ enough wherever there is text outside of images."""
    ratios = page.evaluate(
        """() => {
            const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
            const parts = colour => {
                canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
                return [...canvas.getImageData(0, 0, 1, 1).data]; };
            const linear = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
            const light = c => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]);
            const paper = part => { for (; part; part = part.parentElement) {
                const c = parts(getComputedStyle(part).backgroundColor); if (c[3] === 255) return c; }
                return parts(getComputedStyle(document.documentElement).getPropertyValue('--paper')); };
            const words = 'p, th, td b, td i, li, dt, dd, h1, h2, h3, summary, svg text';
            return [...document.querySelectorAll(words)].map(part => {
                const style = getComputedStyle(part);
                const ink = parts(part.closest('svg') ? style.fill : style.color);
                const [high, low] = [light(ink), light(paper(part))].sort((a, b) => b - a);
                return [(high + 0.05) / (low + 0.05), part.outerHTML.slice(0, 100)];
            });
        }"""
    )
    assert len(ratios) > 200
    assert min(ratios)[0] >= 4.4, min(ratios)


@pytest.mark.slow
def test_a_grid_of_arf_ablate(world, run_arf, tmp_path):
    """What `arf ablate` leaves is all that a report needs."""
    grid, out = tmp_path / "grid", tmp_path / "report"
    run_arf("ablate", world.config(), "--out", grid)
    run_arf("report", grid, "--out", out)
    found = json.loads((out / "report.json").read_text())
    table = {
        (line["arm"], line["alpha"]): line for line in json.loads((grid / "results.json").read_text())["rows"]
    }
    for record in found["results"]:
        line = table[record["arm"], record["alpha"]]
        assert record["mean"] == pytest.approx(line["mean"][record["name"]], abs=1e-2)
    assert {(r["arm"], r["alpha"]) for r in found["results"]} == set(table)
    assert found["missing"] == {} and "Pair anchors" in (out / "figures" / "training.svg").read_text()


def test_figures_and_files_agree(report, grid):
    found = json.loads((report / "report.json").read_text())
    rows = [json.loads(line) for line in (grid / "results.jsonl").read_text().splitlines()]
    of_arf = [
        r["metrics"]["top1"]
        for r in rows
        if "arf" in r["checkpoint"] and r["alpha"] is None and r["set"] == "shift"
    ]
    [shift] = [r for r in found["results"] if (r["arm"], r["alpha"], r["name"]) == ("arf", None, "shift")]
    assert sorted(shift["seeds"].values()) == pytest.approx(sorted(of_arf), abs=1e-3) and shift["n"] == 2
    assert [arm["name"] for arm in found["arms"]] == ["before", "flyp", "arf"]
    assert found["missing"] == {} and found["reference"] == "before"
    table = (report / "table.md").read_text()
    assert table.startswith("| top-1 %, as fine-tuned | ID | shift |")
    assert f"{shift['mean']:.1f}" in table and "<script>" not in table
    names = {path.name for path in (report / "figures").iterdir()}
    assert names == {
        f"{n}.{e}"
        for n in ("results", "curves", "domains", "calibration", "training")
        for e in ("svg", "png")
    }


def test_differences_are_paired_by_image(report, grid):
    """The verdicts are those of `arf evaluate --compare` on the same records."""
    content = json.loads((report / "report.json").read_text())
    assert all(found["paired"]["verdict"] == found["verdict"] for found in content["differences"])
    [found] = [
        found["paired"]
        for found in content["differences"]
        if (found["table"], found["arm"], found["against"], found["name"]) == ("tuned", "arf", "flyp", "ID")
    ]
    records = read_records(grid / "results.jsonl")
    arms = [find_arm(records, name) for name in ("arf", "flyp")]
    expected = compare(*arms, single(["id"])).verdicts["id"].as_json()
    assert {**found, "corrected": None} == {**expected, "corrected": None}
    assert found["seeds"] == 2 and found["images"] == 12
    assert "paired by seed and image" in (report / "index.html").read_text()


def test_the_page_needs_nothing_but_itself(report):
    text = (report / "index.html").read_text()
    assert "default-src 'none'" in text
    assert re.findall(r"""(?:src|href)=["']?(?!data:|#)[^"'>\s]+""", re.sub(r"&lt;.*?&gt;", "", text)) == []
    assert re.findall(r"https?://(?!www\.w3\.org/)", text) == []


def test_the_same_report_twice_has_the_same_bytes(report, grid, run_arf, tmp_path):
    names = report.parent / "names.txt"
    argv = (
        *("report", grid, "--out", tmp_path / "again", "--title", f"Drawings {HOSTILE}"),
        *("--classnames", names),
    )
    run_arf(*argv)
    assert building.folder_bytes(tmp_path / "again") == building.folder_bytes(report)


def test_a_stale_figure_does_not_stay(grid, tmp_path, arf):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "old.svg").touch()
    out, _ = arf("report", grid / "runs" / "arf-0", "--out", tmp_path)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"training.svg", "training.png"}
    assert "Did it forget? That has not been measured." in out
    assert str(tmp_path / "index.html") in out


def test_json_on_standard_output(grid, tmp_path, arf):
    out, _ = arf("report", grid, "--out", tmp_path, "--json")
    assert json.loads(out) == json.loads((tmp_path / "report.json").read_text())


def test_errors_are_one_message(tmp_path, arf):
    _, err = arf("report", tmp_path / "nowhere", "--out", tmp_path / "out", status=1)
    assert err.startswith("arf report: error: ") and "does not exist. Expected a grid folder" in err
    assert not (tmp_path / "out").exists()


def test_help_has_examples(run_arf):
    text = run_arf("report", "--help").stdout
    assert "arf report runs/grid --out report" in text and "--compare ARM:ARM" in text
    assert "expected two arms" in run_arf("report", "x", "--out", "y", "--compare", "arf", check=False).stderr
