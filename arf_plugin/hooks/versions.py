"""Which open_clip is installed."""

from __future__ import annotations

from importlib import metadata

from arf_plugin.errors import IncompatibleUpstreamError
from arf_plugin.hooks.table import PACKAGE, SUPPORTED


def installed(package: str = PACKAGE) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def upstream_version() -> str:
    """Version of the open_clip that training will use.

    Raises:
        IncompatibleUpstreamError: Its version cannot be told, as in a bare source checkout.
    """
    version = installed()
    if version is None:
        raise IncompatibleUpstreamError(
            f"{PACKAGE} is not installed as a distribution, so its version cannot be checked.\n"
            f"Install it with: pip install '{PACKAGE}{SUPPORTED}' (a checkout: pip install -e .)"
        )
    return version
