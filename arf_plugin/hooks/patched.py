"""The hooks as plain calls, for a trainer whose source was patched instead: forks and vendored copies of open_clip.

A patched source calls `parse_args` where the trainer reads its command line, and `hook` at every name that the hook
table lists; both lead to the same functions that the hooks install. See patches/README.md and ``arf patch``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from arf_plugin.flags import add_arf_flags as add_flags  # noqa: F401, called by patched parsers
from arf_plugin.flags import wants_arf
from arf_plugin.hooks.activation import hooks_of_run, print_arf_errors, resolve
from arf_plugin.hooks.engine import Hook, load
from arf_plugin.hooks.table import HOOKS

if TYPE_CHECKING:
    from arf_plugin.hooks.session import Session

Name = TypeVar("Name")

_in_force: dict[str, tuple[Hook, Session]] = {}  # by id


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
    _in_force.clear()
    # Where the start-up file is active as well, its guard must not apply the hooks on top of the patch.
    args = getattr(original, "arf_original", original)(argv)
    if not wants_arf(argv):
        for name in [name for name in vars(args) if name.startswith("arf_")]:
            delattr(args, name)
        return args
    sys.excepthook = print_arf_errors
    session = Session(resolve(args, release), release)
    resumes = bool(getattr(args, "resume", None))
    _in_force.update({hook.id: (hook, session) for hook in hooks_of_run(session.config, resumes, release)})
    return args


def hook(identity: str, original: Name) -> Name:
    """What a patched source calls in an upstream name's place.

    Args:
        identity: Id of a hook of the hook table.
        original: What the name stands for without ARF.

    Returns:
        The original where ARF is off, what the hook's wrapper makes of it where it is on.
    """
    if identity in _in_force:
        found, session = _in_force[identity]
        replaced: Name = load(found.wrapper)(original, session)
        return replaced
    if identity not in {known.id for known in HOOKS}:
        raise KeyError(
            f"arf-plugin has no hook '{identity}': the patch was made for another release of arf-plugin"
        )
    return original
