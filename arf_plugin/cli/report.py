"""``arf report``: one page, figures and tables from runs and their measurements."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from arf_plugin.cli import options

EXAMPLES = """\
  arf report runs/grid --out report                        a grid of arf ablate: everything it holds
  arf report results.jsonl --out report                    rows of arf evaluate --out; checkpoints are named by their
                                                           folders: logs/arf-0/..., logs/arf-1/... are seeds of 'arf'
  arf report logs/flyp-0 logs/arf-0 results.jsonl --out report --anchors ANCHORS --task-data 'task/{000..099}.tar'
  arf report runs/grid --out report --reference flyp --compare arf:arf-random --title 'EmojiNet'
  arf report results.jsonl --out report --suite my-suite.yaml --json | jq .differences
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the parser of ``arf report``."""
    parser = options.add_parser(
        subparsers,
        "report",
        "one page with tables, curves, calibration and the anchor gallery",
        "Writes FOLDER/index.html, which opens from disk without a network; FOLDER/figures/*.svg and *.png;\n"
        "FOLDER/table.md; and FOLDER/report.json with every figure. What is not there is left out, with a line that\n"
        "says what would make it appear.",
        EXAMPLES,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUNS",
        help="grid folders of arf ablate, run folders (named ARM-SEED), files of rows of arf evaluate --out",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the report goes")
    parser.add_argument("--title", metavar="TEXT", help="title of the page")
    parser.add_argument(
        "--reference", metavar="ARM", help="arm to compare the others with (default: the grid's, else flyp)"
    )
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        type=_pair,
        metavar="ARM:ARM",
        help="also compare the first arm with the second; may be repeated",
    )
    parser.add_argument(
        "--suite",
        action="append",
        default=[],
        metavar="SUITE",
        help="name or file of the suite whose averages are shown (default: those that the rows name)",
    )
    parser.add_argument(
        "--anchors",
        type=Path,
        metavar="ANCHORS",
        help="anchor set for the gallery (default: the one the runs used)",
    )
    parser.add_argument(
        "--cards",
        type=options.positive,
        default=12,
        metavar="N",
        help="task images in the gallery (%(default)s)",
    )
    parser.add_argument(
        "--classnames",
        type=Path,
        metavar="FILE",
        help="class names of the task data (default: the runs' own)",
    )
    options.add_task_options(parser, required=False)
    parser.add_argument("--json", action="store_true", help="print report.json on standard output")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from tqdm import tqdm

    from arf_plugin.report.output import as_json, make_report
    from arf_plugin.report.report import Options

    chosen = Options(
        anchors=args.anchors,
        task_data=args.task_data,
        classnames=args.classnames,
        title=args.title,
        suites=args.suite,
        reference=args.reference,
        compare=args.compare,
        cards=args.cards,
        dataset_type=args.dataset_type,
        csv_img_key=args.csv_img_key,
        csv_separator=args.csv_separator,
    )
    quiet = not sys.stderr.isatty()
    with (
        tqdm(desc="gallery", unit=" pairs", disable=quiet, leave=False) as pairs,
        tqdm(desc="drawing", unit=" figures", disable=quiet, leave=False) as drawn,
    ):
        report = make_report(
            args.runs,
            args.out,
            chosen,
            on_pair=lambda: pairs.update(1),
            on_plot=lambda: drawn.update(1),
        )
    if args.json:
        print(json.dumps(as_json(report), indent=2, ensure_ascii=False))
        return 0
    for text in [*report.summary(), *report.notes]:
        print(text)
    for section, text in report.missing.items():
        print(f"left out ({section}): {text}")
    print(f"\n{args.out / 'index.html'}")
    return 0


def _pair(text: str) -> tuple[str, str]:
    one, colon, other = text.partition(":")
    if not colon or not one or not other:
        raise argparse.ArgumentTypeError(f"{text!r}: expected two arms, such as arf:arf-random")
    return one, other
