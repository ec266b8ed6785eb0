"""``arf train``: open_clip's trainer with the plugin in it; works without the start-up file, too."""

from __future__ import annotations

import argparse
import runpy
import sys


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the parser of ``arf train``; every argument after it is the trainer's."""
    parser = subparsers.add_parser(
        "train",
        help="run open_clip's trainer with the plugin in it",
        description="Runs `python -m open_clip_train.main` with the plugin switched on. Takes all of its flags.",
        add_help=False,  # --help is the trainer's own, with the ARF group in it
        allow_abbrev=False,
    )
    parser.set_defaults(run=run, takes_rest=True)


def run(args: argparse.Namespace) -> None:
    """Becomes the trainer."""
    from arf_plugin import _boot

    _boot.install()
    sys.argv = ["open_clip_train.main", *args.rest]
    runpy.run_module("open_clip_train.main", run_name="__main__", alter_sys=True)
