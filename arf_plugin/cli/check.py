"""``arf check``: is an anchor set good, and does it fit the task data?"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from arf_plugin.cli import options

EXAMPLES = """\
  arf check ANCHORS
  arf check ANCHORS --train-data 'task/{000..099}.tar'
  arf check ANCHORS --train-data train.csv --csv-img-key path --csv-separator , --full --json
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the parser of ``arf check``."""
    parser = options.add_parser(
        subparsers,
        "check",
        "validate an anchor set and say what training would see",
        "Checks captions and pairs, and the captions against the task data: coverage, counts, missing\n"
        "captions, unreadable images, pairs without text, duplicates. Exit status 1 if training would refuse the set.",
        EXAMPLES,
    )
    parser.add_argument("anchors", metavar="ANCHORS", help="folder or fsspec URL")
    options.add_task_options(parser, "--train-data", required=False)
    parser.add_argument(
        "--arf-missing-caption",
        choices=("error", "prompt"),
        default="error",
        help="judge samples without a caption as training would with the same flag",
    )
    parser.add_argument(
        "--full", action="store_true", help="decode every image, rather than look at its last bytes"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Checks and reports."""
    from tqdm import tqdm

    from arf_plugin.anchors.check import check_anchor_set

    with tqdm(desc="check", unit=" shards", disable=not sys.stderr.isatty(), leave=False) as bar:
        report = check_anchor_set(
            args.anchors,
            args.task_data,
            args.dataset_type,
            args.csv_img_key,
            args.csv_separator,
            missing_caption=args.arf_missing_caption,
            full=args.full,
            advance=lambda url: bar.update(1),
        )
    if args.json:
        print(json.dumps(dataclasses.asdict(report), indent=2, ensure_ascii=False))
    else:
        print("\n".join(report.lines()))
    return 1 if report.errors else 0
