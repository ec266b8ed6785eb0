"""Applies hooks to modules and undoes them. Knows nothing of ARF and nothing of open_clip.

All hooks of an application apply, or none: a hook that does not fit undoes the ones before it and raises.
"""

from __future__ import annotations

import builtins
import dataclasses
import importlib
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from packaging.specifiers import SpecifierSet

from arf_plugin.errors import IncompatibleUpstreamError
from arf_plugin.hooks import sources

_ABSENT: Any = object()


def covers(versions: str, version: str) -> bool:
    """Whether a version is in one of several ranges, written with " or " between them."""
    return any(SpecifierSet(part).contains(version, prereleases=True) for part in versions.split(" or "))


@dataclasses.dataclass(frozen=True)
class Hook:
    """One upstream name that is wrapped.

    Attributes:
        id: Short name of the hook, for people.
        target: Where the name is looked up at run time, as ``module:name``.
        origin: Where upstream defines the name, as ``module:name``, if the target merely imports it. The hook applies
            only if both are the same object, so nobody else's patch is overwritten. ``builtins:name`` is a built-in
            that the target's module uses: the hook shadows it there, and undoing removes the shadow.
        versions: Upstream releases that the hook was written for: version specifiers, with " or " between ranges.
        wrapper: ``module:function`` of ours. It is called with the original and a context, and returns what takes
            the original's place.
        when: How long the hook holds: ``start-up``, ``parsing``, ``run`` or ``resumable run``.
        why: What it is for, in one line.
    """

    id: str
    target: str
    origin: str | None
    versions: str
    wrapper: str
    when: str
    why: str

    def covers(self, version: str) -> bool:
        """Whether the hook was written for an upstream release."""
        return covers(self.versions, version)

    @property
    def shadows(self) -> bool:
        """Whether it shadows a built-in."""
        return (self.origin or "").startswith("builtins:")


class Engine:
    """Holds what is applied, for undoing.

    Args:
        package: Upstream's distribution name, for messages.
    """

    def __init__(self, package: str) -> None:
        self.package = package
        self._applied: list[tuple[Hook, ModuleType, str, Any]] = []

    @property
    def applied(self) -> list[str]:
        """Ids of the hooks that are in force."""
        return [hook.id for hook, *_ in self._applied]

    def apply(
        self,
        hooks: Iterable[Hook],
        version: str,
        context: Any,
        modules: Mapping[str, ModuleType] | None = None,
    ) -> None:
        """Applies hooks.

        Args:
            hooks: The hooks, in order.
            version: Upstream's installed version.
            context: Handed to each wrapper.
            modules: Modules to use for some names, where importing the name would give another one (a script that
                runs as ``__main__``).

        Raises:
            IncompatibleUpstreamError: A hook that does not cover the version, or whose target is missing or is not
                upstream's own. Nothing is applied then.
        """
        before = len(self._applied)
        try:
            for hook in hooks:
                module, name, original = self._resolve(hook, version, modules or {})
                replacement = load(hook.wrapper)(original, context)
                self._applied.append((hook, module, name, vars(module).get(name, _ABSENT)))
                setattr(module, name, replacement)
        except BaseException:
            self.undo(before)
            raise

    def undo(self, keep: int = 0) -> None:
        """Puts the originals back, last first, until ``keep`` hooks are left."""
        while len(self._applied) > keep:
            _, module, name, original = self._applied.pop()
            if original is _ABSENT:
                delattr(module, name)
            else:
                setattr(module, name, original)

    def check(self, hook: Hook, version: str, *, imports: bool = True) -> str | None:
        """Says why a hook would not apply; None if it would.

        Args:
            hook: The hook.
            version: Upstream's installed version.
            imports: False looks at upstream's sources alone, for importing them takes seconds. What another patch has
                changed at run time, or a library that upstream lacks, is not seen then.
        """
        try:
            if imports:
                self._resolve(hook, version, {})
            else:
                self._look_up(hook, version)
        except IncompatibleUpstreamError as error:
            return str(error)
        return None

    def _resolve(
        self, hook: Hook, version: str, modules: Mapping[str, ModuleType]
    ) -> tuple[ModuleType, str, Any]:
        """Module, name and what it stands for now, if the hook may replace that."""
        self._require_version(hook, version)
        module_name, name = hook.target.split(":")
        try:
            module = modules.get(module_name) or importlib.import_module(module_name)
        except ImportError as error:
            found = f"module {module_name} cannot be imported ({error})"
            raise self._error(hook, found, hook.target) from error
        original = getattr(module, name, getattr(builtins, name, None) if hook.shadows else None)
        called = f"{getattr(original, '__module__', '?')}.{getattr(original, '__qualname__', original)}"
        self._require_own(hook, original, hook.origin and load(hook.origin, None), called)
        return module, name, original

    def _look_up(self, hook: Hook, version: str) -> None:
        """As `_resolve`, from the sources."""
        self._require_version(hook, version)
        module, name = hook.target.split(":")
        if not sources.exists(module):
            raise self._error(hook, f"module {module} is not installed", hook.target)
        found, own = sources.origin(module, name), hook.origin
        if hook.shadows:
            found = found or own
        elif own is not None:
            own = sources.origin(*own.split(":"))
        self._require_own(hook, found, own, found)

    def _require_own(self, hook: Hook, found: Any, own: Any, called: str | None) -> None:
        """Refuses a name that is not there, or stands for something else than upstream's own."""
        if found is None:
            module, name = hook.target.split(":")
            raise self._error(hook, f"module {module} has no '{name}'", hook.target)
        if hook.origin is not None and found != own:
            raise self._error(hook, f"{hook.target} is {called}", f"upstream's own {hook.origin}")

    def _require_version(self, hook: Hook, version: str) -> None:
        if not hook.covers(version):
            expected = f"{self.package}{hook.versions}"
            raise self._error(hook, f"{self.package} {version} is installed", expected)

    def _error(self, hook: Hook, found: str, expected: str) -> IncompatibleUpstreamError:
        return IncompatibleUpstreamError(
            f"hook '{hook.id}' ({hook.why}) does not fit the installed {self.package}.\n"
            f"  found:    {found}\n"
            f"  expected: {expected}\n"
            f"Training stops here rather than go on without anchors. See all hooks with: arf doctor\n"
            f"Then: pip install '{self.package}{hook.versions.split(' or ')[0]}', or upgrade arf-plugin."
        )


def load(path: str, *otherwise: Any) -> Any:
    """The object that ``module:name`` names; ``otherwise``, if it is given, where the module has no such name."""
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name, *otherwise)
