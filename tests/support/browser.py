"""A real headless Chromium for the tests, without root and without anything installed by hand.

The npm package ``@sparticuz/chromium`` carries a headless Chromium (MIT, BSD-3-Clause) and the few libraries that a
bare machine lacks. It is fetched once, at the version and checksum below, into ``.venvs/``; about 70 MB, a few seconds.
Playwright (``pip install 'arf-plugin[dev]'``) drives it. By hand::

    python tests/support/browser.py            fetch it, and say where it is
    python tests/support/browser.py FILE.html SHOT.png [WIDTH] [dark]
"""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from benchmarks.download import fetch, find_npm, unpack  # noqa: E402
from benchmarks.sources import Source  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Browser

PACKED = ("chromium.br", "al2023.tar.br", "fonts.tar.br")
SOURCE = Source(
    package="@sparticuz/chromium",
    version="153.0.0",
    integrity="sha512-jiGWqSvPMdu4+P9TilYqAR7yEGPEHINx+lCvE/NqNO/EHYzF/x1hUiI5T6ioVIt7dEy7n88byyT0vk+dnsgQwA==",
    license="MIT",
    author="Alixaxel and Sparticuz",
    url="https://github.com/Sparticuz/chromium",
    members=tuple(f"bin/{name}" for name in PACKED),
)

# Fonts of its own first, then what matplotlib and the machine have; so pages look alike on every machine.
FONTS = """<?xml version="1.0"?>
<fontconfig>
  {folders}
  <cachedir>{cache}</cachedir>
  <alias><family>sans-serif</family><prefer><family>Open Sans</family><family>DejaVu Sans</family></prefer></alias>
  <alias><family>system-ui</family><prefer><family>Open Sans</family><family>DejaVu Sans</family></prefer></alias>
  <alias><family>serif</family><prefer><family>DejaVu Serif</family></prefer></alias>
  <alias><family>monospace</family><prefer><family>DejaVu Sans Mono</family></prefer></alias>
</fontconfig>
"""


def chromium() -> Path:
    """Folder of the unpacked browser; fetched if it is not there."""
    folder = ROOT / ".venvs" / f"chromium-{SOURCE.version}"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "complete").is_file():
            _unpack(folder)
    return folder


def _unpack(folder: Path) -> None:
    import brotli
    import matplotlib

    cache = ROOT / ".venvs" / "npm"
    archive = fetch(SOURCE, cache, find_npm())
    packed = folder / "packed"
    unpack(SOURCE, archive, packed)
    binaries = packed / f"{SOURCE.name}-{SOURCE.version}" / "bin"
    program = folder / "chromium"
    program.write_bytes(brotli.decompress((binaries / "chromium.br").read_bytes()))
    program.chmod(0o755)
    for name in PACKED[1:]:
        with tarfile.open(fileobj=io.BytesIO(brotli.decompress((binaries / name).read_bytes()))) as tar:
            tar.extractall(folder, filter="data")
        (binaries / name).unlink()
    (binaries / "chromium.br").unlink()
    archive.unlink()
    places = [folder / "fonts", Path(matplotlib.get_data_path()) / "fonts" / "ttf", Path("/usr/share/fonts")]
    folders = "".join(f"<dir>{place}</dir>" for place in places)
    (folder / "fonts.conf").write_text(FONTS.format(folders=folders, cache=folder / "font-cache"))
    (folder / "complete").touch()


@contextmanager
def browser() -> Iterator[Browser]:
    """Starts Chromium; ends it with the block."""
    from playwright.sync_api import sync_playwright

    folder = chromium()
    environment = {
        "LD_LIBRARY_PATH": str(folder / "lib"),
        "FONTCONFIG_FILE": str(folder / "fonts.conf"),
        "HOME": str(folder),
        "PATH": "/usr/bin:/bin",
    }
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=folder / "chromium", env=environment, args=["--no-zygote"]
        )
        try:
            yield started
        finally:
            started.close()


def main() -> None:
    """Command line."""
    if len(sys.argv) < 3:
        print(chromium())
        return
    with browser() as started:
        page = started.new_page(
            viewport={"width": int(sys.argv[3]) if len(sys.argv) > 3 else 1600, "height": 1000},
            color_scheme="dark" if "dark" in sys.argv else "light",
        )
        page.goto(Path(sys.argv[1]).resolve().as_uri())
        page.screenshot(path=sys.argv[2], full_page=True)


if __name__ == "__main__":
    main()
