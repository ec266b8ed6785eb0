"""What the start-up file runs in every Python process: the standard library only, and as little of it as can be.

It adds one finder to ``sys.meta_path``. The finder answers for a single module, ``open_clip_train.params``, and
replaces that module's ``parse_args`` by a guard once the module has run. The guard hands command lines without
``--arf-*`` flags to open_clip's own function and loads the plugin for the others. An error while loading the
plugin therefore ends the run: nothing ever trains without ARF after asking for it.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # the typing module itself would cost every process a millisecond
    from collections.abc import Callable
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

TARGET = "open_clip_train.params"


def guard(params: ModuleType) -> None:
    """Replaces ``parse_args`` of the just executed module ``open_clip_train.params``."""
    original: Callable[[Any], Any] | None = getattr(params, "parse_args", None)
    if original is None or hasattr(original, "arf_original"):
        return

    def parse_args(args: Any) -> Any:
        from arf_plugin import hooks
        from arf_plugin.flags import wants_arf

        if not wants_arf(sys.argv[1:] if args is None else args):
            hooks.deactivate()  # only matters where one process trains twice
            return original(args)
        return hooks.parse_args(params, original, args)

    parse_args.__doc__ = original.__doc__
    parse_args.arf_original = original  # type: ignore[attr-defined]
    params.parse_args = parse_args  # type: ignore[attr-defined]


class _Loader:
    """The module's own loader, followed by `guard`."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        guard(module)


class _Finder:
    """Finds `TARGET` through the other finders and wraps its loader; knows no other module."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != TARGET:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _Finder):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


def is_installed() -> bool:
    """Whether the finder is on ``sys.meta_path``."""
    return any(
        type(finder).__name__ == "_Finder" and type(finder).__module__ == __name__ for finder in sys.meta_path
    )


def install() -> None:
    """Adds the finder once; a module that has been imported already is guarded in place."""
    if not is_installed():
        sys.meta_path.insert(0, _Finder())
    if TARGET in sys.modules:
        guard(sys.modules[TARGET])


install()
