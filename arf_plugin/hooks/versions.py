"""Which open_clip is installed, and whether the hooks were written for it."""

from __future__ import annotations

from importlib import metadata

from arf_plugin.errors import IncompatibleUpstreamError
from arf_plugin.hooks.engine import covers
from arf_plugin.hooks.releases import CREATE_LOSS, CREATE_TASK, PACKAGE, RELEASES, SUPPORTED


def installed(package: str = PACKAGE) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def upstream_version() -> str:
    """Version of the open_clip that training will use.

    Raises:
        IncompatibleUpstreamError: Its version cannot be told, as in a bare source checkout, or is none that the hooks
            were written for.
    """
    version = installed()
    if version is None:
        raise IncompatibleUpstreamError(
            f"{PACKAGE} is not installed as a distribution, so its version cannot be checked.\n"
            f"Install it with: pip install '{PACKAGE}{CREATE_LOSS}' (a checkout: pip install -e .)"
        )
    problem = unsupported(version)
    if problem is not None:
        raise IncompatibleUpstreamError(problem)
    return version


def unsupported(version: str) -> str | None:
    """Says why a release is refused; None if the hooks were written for it."""
    if any(covers(versions, version) for versions in SUPPORTED):
        return None
    return (
        f"the hooks were not written for the installed {PACKAGE}.\n"
        f"  found:    {PACKAGE} {version} is installed\n"
        f"  expected: {PACKAGE}{' or '.join(SUPPORTED)} (tested: {', '.join(r.version for r in RELEASES)})\n"
        "Training stops here rather than go on without anchors. See all hooks with: arf doctor\n"
        f"Then: pip install '{PACKAGE}{CREATE_LOSS}', or upgrade arf-plugin."
    )


def trains_tasks(version: str) -> bool:
    """Whether a release's trainer builds a task (`arf_plugin.hooks.task`) rather than a loss."""
    return covers(CREATE_TASK, version)
