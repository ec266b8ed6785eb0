"""From the trainer's command line to applied hooks."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace, TracebackType
from typing import Any

from arf_plugin import config
from arf_plugin.errors import ArfError, IncompatibleUpstreamError
from arf_plugin.flags import Parser, add_arf_flags, parsing_errors, wants_arf
from arf_plugin.hooks.command import Command
from arf_plugin.hooks.engine import Engine, Hook
from arf_plugin.hooks.releases import PACKAGE
from arf_plugin.hooks.table import hooks, trains_tasks, upstream_version
from arf_plugin.untrusted import printable

MAIN = "open_clip_train.main"

ENGINE = Engine(PACKAGE)

command: Command | None = None  # the `arf train` that this process is


def parse_args(params: ModuleType, original: Callable[[Any], Any], argv: Sequence[str]) -> Any:
    """Parses the trainer's command line with ARF's flags in it, and applies the hooks of the run.

    Args:
        params: The module ``open_clip_train.params``.
        original: Its own ``parse_args``.
        argv: The command line, with at least one ``--arf-*`` flag, or a request for help.

    Returns:
        The trainer's namespace with ``arf_*`` attributes.
    """
    sys.excepthook = print_arf_errors
    version = upstream_version()
    args = _parse(original, argv, version)
    arf = resolve(args, version)
    # Not at the top: these take a while, and --help needs none.
    from arf_plugin.data.startup import check_there
    from arf_plugin.hooks.session import Session

    check_there(args, arf)
    if command is not None:
        command.args = args
    session = Session(arf, version, command=command)
    chosen = hooks_of_run(arf, bool(getattr(args, "resume", None)), version)
    ENGINE.apply(chosen, version, session, {MAIN: _main_module(params)})
    _make_logs_printable()
    logging.getLogger(__name__).debug("hooks applied: %s", ENGINE.applied)
    return args


def check_args(argv: Sequence[str]) -> Any:
    """Parses and checks a trainer's command line as the trainer would, and runs nothing.

    Args:
        argv: the flags, without the program's name.

    Returns:
        The trainer's namespace.

    Raises:
        FlagError: What the trainer's parser, or ours, would say.
    """
    from open_clip_train import params

    original = getattr(params.parse_args, "arf_original", params.parse_args)
    version = upstream_version()
    with parsing_errors():
        args = _parse(original, list(argv), version)
    if wants_arf(argv):
        resolve(args, version)
    return args


def _parse(original: Callable[[Any], Any], argv: Sequence[str], version: str) -> Any:
    """Has the trainer's own function parse a command line with ARF's flags in it."""
    deactivate()
    ENGINE.apply(hooks("parsing", version), version, None)
    try:
        return original(argv)
    finally:
        deactivate()


class _ParserWithFlags(Parser):
    """Adds the ARF group when parsing begins, so that it comes last in --help."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        add_arf_flags(self)
        if command is not None:
            self.prog = "arf train"
        return super().parse_args(*args, **kwargs)


def argparse_with_flags(original: Any, context: Any) -> SimpleNamespace:
    """The module ``argparse`` as ``params.py`` sees it while it parses."""
    return SimpleNamespace(**{**vars(original), "ArgumentParser": _ParserWithFlags})


def deactivate() -> None:
    """Puts back everything that was replaced for a run; the guard on ``parse_args`` stays."""
    ENGINE.undo()


def resolve(args: Any, version: str) -> config.ArfConfig:
    """Checks the flags of a run, those that only this release has among them; see `arf_plugin.config.resolve`."""
    arf = config.resolve(args)
    if trains_tasks(version):
        from arf_plugin.hooks.task import check_args as check_task_args

        check_task_args(args, arf)
    return arf


def hooks_of_run(arf: config.ArfConfig, resumes: bool, version: str) -> tuple[Hook, ...]:
    """The hooks that a run with these flags needs; any run may resume from a step checkpoint."""
    return hooks("run", version) + (hooks("resumable run", version) if arf.resumable or resumes else ())


def _make_logs_printable() -> None:
    """Keeps control sequences of names and captions out of what this package logs; others' records stay as they are."""
    original = logging.getLogRecordFactory()
    if getattr(original, "arf", False):
        return
    package = str(Path(__file__).parents[1])

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = original(*args, **kwargs)
        if made.pathname.startswith(package):
            made.msg, made.args = printable(made.getMessage()), ()
        return made

    record.arf = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(record)


def _main_module(params: ModuleType) -> ModuleType:
    """The module whose globals the trainer's ``main`` reads: ``__main__`` under ``python -m``."""
    for name in ("__main__", MAIN):
        module = sys.modules.get(name)
        if module is not None and getattr(module, "parse_args", None) is params.parse_args:
            return module
    raise IncompatibleUpstreamError(
        f"the trainer that called parse_args is not {MAIN}, so its loss and data cannot be hooked.\n"
        "Expected: torchrun -m open_clip_train.main ..., or: arf train ...\n"
        "For a trainer of your own, call the functions of arf_plugin.data and arf_plugin.losses instead."
    )


def print_arf_errors(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Shows an ArfError as its message alone; ``ARF_DEBUG=1`` brings the traceback back."""
    if issubclass(kind, ArfError) and not os.environ.get("ARF_DEBUG"):
        print(f"arf-plugin: error: {printable(str(error))}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
