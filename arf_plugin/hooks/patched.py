"""The hooks as plain calls, for a trainer whose source was patched instead: forks and vendored copies of open_clip.

A patched source calls `parse_args` where the trainer reads its command line, and `hook` at every name that the hook
table lists; both lead to the same functions that the hooks install. See patches/README.md and ``arf patch``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeVar

from arf_plugin.flags import add_arf_flags, wants_arf
from arf_plugin.hooks.activation import hooks_of_run, print_arf_errors, resolve
from arf_plugin.hooks.engine import Engine, Hook, load
from arf_plugin.hooks.releases import PACKAGE
from arf_plugin.hooks.table import HOOKS

Name = TypeVar("Name")


class CallSites(Engine):
    """An engine for sources that ask for their replacements: it notes which hooks hold, and changes no module."""

    def __init__(self) -> None:
        super().__init__(PACKAGE)
        self._contexts: list[tuple[Hook, Any]] = []

    @property
    def applied(self) -> list[str]:
        """Ids of the hooks that are in force."""
        return [hook.id for hook, _ in self._contexts]

    def apply(
        self,
        hooks: Iterable[Hook],
        version: str,
        context: Any,
        modules: Mapping[str, ModuleType] | None = None,
    ) -> None:
        """Puts hooks in force. Their versions do not matter: the source says itself where it wants them."""
        self._contexts += [(hook, context) for hook in hooks]

    def undo(self, keep: int = 0) -> None:
        """Puts hooks out of force, last first, until ``keep`` are left."""
        del self._contexts[keep:]

    def replacement(self, identity: str, original: Name) -> Name:
        """What a name stands for now: the original, or what the hook's wrapper makes of it."""
        for hook, context in reversed(self._contexts):
            if hook.id == identity:
                replaced: Name = load(hook.wrapper)(original, context)
                return replaced
        return original


_CALL_SITES = CallSites()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the ARF group to the trainer's parser."""
    add_arf_flags(parser)


def parse_args(original: Callable[[Any], Any], argv: Sequence[str] | None, release: str) -> Any:
    """Parses the trainer's command line and puts the hooks of the run in force if it has ``--arf-*`` flags.

    Args:
        original: The trainer's own ``parse_args``, patched to call `add_flags`.
        argv: The command line; None for the process's own.
        release: The release of open_clip that the patch was made for.

    Returns:
        The trainer's namespace; with ``arf_*`` attributes if ARF is on.
    """
    from arf_plugin.hooks.session import Session

    argv = sys.argv[1:] if argv is None else argv
    _CALL_SITES.undo()
    # Where the start-up file is active as well, its guard must not apply the hooks on top of the patch.
    args = getattr(original, "arf_original", original)(argv)
    if not wants_arf(argv):
        for name in [name for name in vars(args) if name.startswith("arf_")]:
            delattr(args, name)
        return args
    sys.excepthook = print_arf_errors
    session = Session(resolve(args, release), release)
    resumes = bool(getattr(args, "resume", None))
    _CALL_SITES.apply(hooks_of_run(session.config, resumes, release), release, session)
    return args


def hook(identity: str, original: Name) -> Name:
    """What a patched source calls in an upstream name's place.

    Args:
        identity: Id of a hook of the hook table.
        original: What the name stands for without ARF.

    Returns:
        The original where ARF is off, what the hook's wrapper makes of it where it is on.
    """
    if identity not in {known.id for known in HOOKS}:
        raise KeyError(
            f"arf-plugin has no hook '{identity}': the patch was made for another release of arf-plugin"
        )
    return _CALL_SITES.replacement(identity, original)
