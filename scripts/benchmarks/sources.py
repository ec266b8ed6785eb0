"""A package of the npm registry that a benchmark is made of: version, checksum, licence and author."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """One npm package.

    Attributes:
        package: name on npm.
        version: exact version.
        integrity: `sha512-<base64>` of the package's tar.gz.
        license: SPDX identifier.
        author: who drew or wrote it, for the attribution.
        url: the project's page.
        look: for emoji sets: how its drawings look; empty for the others.
        members: files to take from the package; nothing else is unpacked.
    """

    package: str
    version: str
    integrity: str
    license: str
    author: str
    url: str
    look: str = ""
    members: tuple[str, ...] = ("icons.json",)

    @property
    def name(self) -> str:
        """The set's short name, as used in keys and folders: the package without its scope."""
        return self.package.rsplit("/", 1)[-1]
