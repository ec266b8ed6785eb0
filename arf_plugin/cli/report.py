"""``arf report``: one page, plots and tables from runs and their measurements."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path

from arf_plugin.cli import options
from arf_plugin.console import progress

EXAMPLES = """\
  arf report runs/grid --out report                        a grid of arf ablate: everything it holds
  arf report results.jsonl --out report                    rows of arf evaluate --out; checkpoints are named by their
                                                           folders: logs/arf-0/..., logs/arf-1/... are seeds of 'arf'
  arf report logs/flyp-0 logs/arf-0 results.jsonl --out report --anchors ANCHORS --task-data 'task/{000..099}.tar'
  arf report runs/grid --out report --reference flyp --compare arf:arf-random --title 'EmojiNet'
  arf report results.jsonl --out report --suite my-suite.yaml --json | jq .differences
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the parser of ``arf report``."""
    parser = options.add_parser(
        subparsers,
        "report",
        "one page with tables, curves, calibration and the anchor gallery",
        "Writes FOLDER/index.html, which opens from disk without a network; FOLDER/figures/*.svg and *.png;\n"
        "FOLDER/table.md; and FOLDER/report.json with every score. It begins with whether the model has forgotten.\n"
        "What is not there is left out; a line at the end says what would make it appear.",
        EXAMPLES,
    )
    add = parser.add_argument
    text = (
        "folders of arf ablate or arf fit, run folders (named ARM-SEED), files of rows of arf evaluate --out"
    )
    add("runs", nargs="+", type=Path, metavar="RUNS", help=text)
    add("--out", type=Path, required=True, metavar="FOLDER", help="where the report goes")
    add("--title", metavar="TEXT", help="title of the page")
    add("--reference", metavar="ARM", help="arm to compare the others with (default: before, else flyp)")
    text = "also compare the first arm with the second; may be repeated"
    add("--compare", action="append", default=[], type=_pair, metavar="ARM:ARM", help=text)
    text = "name or file of the suite whose averages are shown (default: those that the records name)"
    add("--suite", action="append", default=[], metavar="SUITE", help=text)
    text = "anchor set for the gallery (default: the one the runs used)"
    add("--anchors", type=Path, metavar="ANCHORS", help=text)
    text = "task images in the gallery (%(default)s)"
    add("--cards", type=options.positive, default=12, metavar="N", help=text)
    text = "class names of the task data (default: the runs' own)"
    add("--classnames", type=Path, metavar="FILE", help=text)
    options.add_task_options(parser, required=False)
    parser.add_argument("--json", action="store_true", help="print report.json on standard output")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from arf_plugin.report.output import as_json, make_report
    from arf_plugin.report.report import Options

    chosen = Options(**{field.name: getattr(args, field.name) for field in fields(Options)})
    with progress("gallery", "pairs") as pairs, progress("drawing", "plots") as plots:
        report = make_report(
            args.runs, args.out, chosen, on_pair=lambda: pairs.update(1), on_plot=lambda: plots.update(1)
        )
    if args.json:
        print(json.dumps(as_json(report), indent=2, ensure_ascii=False))
        return 0
    for text in [*report.answer.texts(), *report.notes]:
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
