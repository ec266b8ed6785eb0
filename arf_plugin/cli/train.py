"""``arf train``: open_clip's trainer with the plugin in it; works without the start-up file, too."""

from __future__ import annotations

import argparse
import runpy
import sys

from arf_plugin.errors import FlagError
from arf_plugin.untrusted import printable


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
    from arf_plugin.hooks import activation
    from arf_plugin.hooks.command import Command

    _boot.install()
    sys.argv = ["open_clip_train.main", *args.rest]
    activation.command = command = Command(args.rest)
    try:
        runpy.run_module("open_clip_train.main", run_name="__main__", alter_sys=True)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(str(stop) or command.stopped_at_once()) from None
    if command.refused:  # the trainer has said why, and would end with status 0
        raise FlagError(
            f"There is a run of this --name. It goes on with: {command.again}\nA new one takes another name."
        )
    if (found := command.finished()) is not None:
        print(printable(found))
