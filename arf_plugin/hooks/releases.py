"""THE list of open_clip releases: what is declared, what is tested, and how each is installed.

setup.py, the table of hooks, the noxfile, the tests and the generated tables read it here. The standard library only,
because setup.py runs this file on its own.
"""

from __future__ import annotations

from typing import NamedTuple

PACKAGE = "open_clip_torch"

# open_clip's trainer has had two forms. In the first, main.py builds a loss and batches are tuples; data.py is the same
# file throughout, and main.py differs only in what no hook concerns.
CREATE_LOSS = ">=2.26.1,<3.4"
# In the second, main.py builds a task and batches are dictionaries. It is unreleased, so its version is named exactly:
# anything later stops with an error until it has been tested.
CREATE_TASK = "==4.2.0.dev0"

SUPPORTED = (CREATE_LOSS, CREATE_TASK)

# What pip is told: the hull of the ranges, as a requirement has no gaps. What lies between is refused at run time.
REQUIREMENT = f"{PACKAGE}>=2.26.1,<4.3"

REPOSITORY = "git+https://github.com/mlfoundations/open_clip"


class Release(NamedTuple):
    """An open_clip that the tests run on.

    Attributes:
        version: Its version.
        every_change: Whether scripts/test.sh runs it; the others are run by ``nox``.
        commit: For unreleased code, the commit that was tested.
    """

    version: str
    every_change: bool = False
    commit: str | None = None

    @property
    def requirement(self) -> str:
        """What ``pip install`` takes for it."""
        return f"{REPOSITORY}@{self.commit}" if self.commit else f"{PACKAGE}=={self.version}"


RELEASES = (
    Release("2.26.1"),
    Release("2.29.0"),
    Release("2.32.0", every_change=True),
    Release("3.0.0"),
    Release("3.3.0", every_change=True),
    Release("4.2.0.dev0", commit="89fb801f1e6087880e951fc8354b8a2077b79c6d"),
)
