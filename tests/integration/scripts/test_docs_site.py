"""The documentation as a site: it builds strictly, and its pages need no other place and no wider screen."""

from __future__ import annotations

import html.parser
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# Attributes that make a browser fetch something; a link to follow (<a href>) is none.
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href", "use": "href"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


class Fetches(html.parser.HTMLParser):
    """Collects what a browser would fetch to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in FETCHED and values.get("rel") != "canonical":
            self.found += re.split(r",\s+", values.get(FETCHED[tag]) or values.get("srcset") or "")
        self.found += re.findall(r"url\(['\"]?([^'\")]+)", values.get("style") or "")


def test_every_page_of_the_menu_and_every_page_of_docs_is_there(site):
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages | {"index", "contributing", "glossary", "commands", "patches"} <= {
        path.stem for path in site.glob("*.html")
    }


def test_nothing_is_fetched_from_another_place(site):
    fetched = {}
    for path in site.rglob("*.html"):
        page = Fetches()
        page.feed(path.read_text(encoding="utf-8"))
        fetched[path.name] = page.found
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        fetched[path.name] = re.findall(r"url\(['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", text)
        fetched[path.name] = [first or second for first, second in fetched[path.name]]
    assert sum(map(len, fetched.values())) > 100
    outside = {
        (page, url)
        for page, urls in fetched.items()
        for url in urls
        if re.match(r"(?!data:)[a-z+]+:|//", url)
    }
    assert not outside


@pytest.mark.parametrize("width", [390, pytest.param(1400, marks=pytest.mark.slow)])
def test_in_a_browser_no_page_is_wider_than_the_screen_and_none_leaves_the_folder(site, width):
    from support.browser import browser

    wide, outside, errors = {}, set(), []
    with browser() as started:
        page = started.new_page(viewport={"width": width, "height": 900})
        page.on("request", lambda request: outside.add(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        for path in sorted(site.glob("*.html")):
            page.goto(path.as_uri())
            found = page.evaluate("document.documentElement.scrollWidth")
            if found > width:
                wide[path.name] = found
            broken = page.evaluate("[...document.images].filter(i => !i.naturalWidth).map(i => i.src)")
            assert not broken, path.name
    assert not wide
    assert not {url for url in outside if not url.startswith(("file:", "data:", "blob:"))}
    assert not errors
