"""Entry point of ``arf``: parses the sub-command and turns ArfErrors into one clear message."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from arf_plugin import __version__
from arf_plugin.errors import ArfError
from arf_plugin.flags import Parser
from arf_plugin.untrusted import printable

# Each module has `register(subparsers)`; it adds one parser and sets `run=function(args) -> int | None`
# on it. The modules import nothing heavy at their top level, so that `arf --help` stays instant.
COMMANDS = (
    "fit",
    "data",
    "caption",
    "embed",
    "index",
    "retrieve",
    "download",
    "pack",
    "features",
    "anchors",
    "check",
    "train",
    "ablate",
    "probe",
    "evaluate",
    "interpolate",
    "report",
    "patch",
    "doctor",
)

EPILOG = """\
examples:
  arf doctor                                  is the plugin active, and does it fit this open_clip?
  arf data my-images --out task               folders, tables, parquet or tars of images as task data
  arf anchors --train-data 'task/{000..099}.tar' --pool 'pool/{0000..0331}.tar' --out ANCHORS \\
      --captioner Salesforce/blip-image-captioning-base --model ViT-B-16-quickgelu --pretrained openai
  arf check ANCHORS --train-data 'task/{000..099}.tar'
  torchrun --nproc_per_node 8 -m open_clip_train.main --arf-anchors ANCHORS --train-data ...
"""


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of ``arf`` with all its sub-commands."""
    parser = Parser(
        prog="arf",
        description="Anchor-based Robust Fine-tuning for open_clip: build anchors, train, evaluate.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"arf-plugin {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"arf_plugin.cli.{name}").register(subparsers)
    for each in subparsers.choices.values():
        each.set_defaults(parser=each)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one sub-command.

    Returns:
        The process's exit status: 0 when all went well, 1 for an ArfError, 2 for wrong arguments.
    """
    for stream in (sys.stdout, sys.stderr):  # names and captions hold what a console's encoding may lack
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what comes next; the library is an extra
        importlib.import_module("argcomplete").autocomplete(parser)
    args, rest = parser.parse_known_args(argv)
    args.rest, args.argv = rest, list(sys.argv[1:] if argv is None else argv)
    args.stderr = sys.stderr  # where errors go, of children too, even if the rest is to be quiet
    if rest and not getattr(args, "takes_rest", False):
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        with contextlib.ExitStack() as stack:
            if getattr(args, "quiet", False):
                nothing = stack.enter_context(Path(os.devnull).open("w"))
                stack.enter_context(contextlib.redirect_stderr(nothing))
            return args.run(args) or 0
    except ArfError as error:
        if os.environ.get("ARF_DEBUG"):
            raise
        print(f"arf {args.command}: error: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        then = printable(str(stop)) or "the same command goes on where it stopped"
        print(f"arf {args.command}: interrupted; {then}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
