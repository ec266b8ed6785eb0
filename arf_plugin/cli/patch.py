"""``arf patch``: the hooks as source patches, for forks and vendored copies of open_clip."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from arf_plugin.cli import options

EXAMPLES = """\
  arf patch check  open_clip/src                      does it fit, is it applied?
  arf patch apply  open_clip/src
  arf patch apply  open_clip/src --series upstream    two processes on the CPU, new webdataset
  arf patch revert open_clip/src
  cd open_clip/src && git apply -p1 PATCHES/3.3.0/arf/*.patch    the same by hand, outside a repository
"""


def register(subparsers: options.Subparsers) -> None:
    """Adds the parser of ``arf patch``."""
    parser = options.add_parser(
        subparsers,
        "patch",
        "the hooks as source patches, for forks of open_clip",
        "Applies, checks or reverts numbered patches on a copy of open_clip's sources. Series 'arf' calls the same "
        "functions as the hooks,\nfor those who vendor or fork open_clip; the installed open_clip needs none of it. "
        "Series 'upstream' fixes bugs of open_clip's own.",
        EXAMPLES,
    )
    parser.add_argument("action", choices=("check", "apply", "revert"))
    parser.add_argument("target", type=Path, metavar="FOLDER", help="the folder that holds open_clip_train/")
    parser.add_argument("--series", choices=("arf", "upstream"), default="arf", help="default: arf")
    parser.add_argument(
        "--release", help="whose patches to use (default: as FOLDER/open_clip/version.py says)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Does what was asked, says how it stands then."""
    from arf_plugin.hooks.source_patches import Series, find_release
    from arf_plugin.untrusted import printable

    release = args.release or find_release(args.target)
    series = Series(args.series, release)
    if args.action != "check":
        series.change(args.target, revert=args.action == "revert")
    state = series.state(args.target)
    fits = state in ("applied", "applies")
    found = {
        "target": str(args.target),
        "release": release,
        "series": args.series,
        "patches": [path.name for path in series.paths],
        "state": state if fits else "does not apply",
        "problem": None if fits else state,
    }
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print(f"open_clip {printable(release)}, series {args.series}: {found['state']}")
        for name in found["patches"]:
            print(f"  {name}")
        if found["problem"]:
            print(printable(found["problem"]))
    return 1 if found["problem"] else 0
