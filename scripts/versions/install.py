"""Puts open_clip releases beside the environment, in .venvs/, for the tests that run on several of them.

    python scripts/versions/install.py                       all releases that the plugin is tested on
    python scripts/versions/install.py 2.26.1 3.0.0          some
    python scripts/versions/install.py --every-change        those that scripts/test.sh runs
    python scripts/versions/install.py 4.2.0.dev0 --source CHECKOUT     unreleased code, from a folder or URL

Files alone, without dependencies: the environment's own serve all of them. A release that the environment itself has,
or that is there already, is left as it is.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from arf_plugin.hooks.releases import PACKAGE, RELEASES, Release

FOLDERS = Path(__file__).parents[2] / ".venvs"


def install(release: Release, source: str | None) -> str:
    """Installs one release and says where it is."""
    folder = FOLDERS / f"{PACKAGE}-{release.version}"
    if metadata.version(PACKAGE) == release.version:
        return "in the environment"
    if folder.is_dir():
        return f"in {folder}"
    incomplete = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(incomplete, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    files_alone = ["--no-deps", "--no-compile", "--target", str(incomplete)]
    subprocess.run([*pip, *files_alone, source or release.requirement], check=True)
    (info,) = incomplete.glob(f"{PACKAGE}-*.dist-info")
    if info.name != f"{PACKAGE}-{release.version}.dist-info":
        raise SystemExit(f"{source or release.requirement} is {info.name}, not {release.version}")
    incomplete.rename(folder)
    return f"in {folder}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [release.version for release in RELEASES]
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"default: all of {', '.join(known)}")
    parser.add_argument("--every-change", action="store_true", help="only those that scripts/test.sh runs")
    parser.add_argument("--source", help="what pip installs instead: a checkout or URL; for one VERSION")
    args = parser.parse_args()
    for version in args.versions:
        if version not in known:
            parser.error(f"unknown version {version}; choose from {', '.join(known)}")
    if args.source and len(args.versions) != 1:
        parser.error("--source needs exactly one VERSION")
    chosen = [r for r in RELEASES if not args.versions or r.version in args.versions]
    for release in chosen:
        if release.every_change or not args.every_change:
            print(f"open_clip {release.version}: {install(release, args.source)}")


if __name__ == "__main__":
    main()
