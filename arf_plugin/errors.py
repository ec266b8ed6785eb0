"""The one family of errors that this package raises for its users.

Each message says what was found, where, what was expected, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Says, after a blank, which of some names was probably meant; nothing if none is near."""
    close = difflib.get_close_matches(given, list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


class ArfError(Exception):
    """Base of every error that a user of the plugin can cause or fix."""


class FlagError(ArfError):
    """A command-line flag, or a combination of flags, that cannot work."""


class IncompatibleUpstreamError(ArfError):
    """The installed open_clip is not one that the hooks were written for."""


class AnchorSetError(ArfError):
    """An anchor set (captions or pairs) that is missing, empty or malformed."""


class TaskDataError(ArfError):
    """Task data (shards or CSV) that cannot be joined with the anchor set."""


class MissingCaptionError(TaskDataError):
    """A task sample without a caption anchor."""


class PoolError(ArfError):
    """A pool, its embeddings or its index that cannot be used for retrieval."""


class ServiceError(ArfError):
    """A service of neighbours or captions that cannot be reached, is set up for something else, or answers nonsense."""


class StageError(ArfError):
    """A stage of anchor building that cannot start, resume or go on."""


class CheckpointError(ArfError):
    """A checkpoint that training cannot go on from, or cannot write."""


class CacheError(ArfError):
    """The folder for caches cannot be used."""


class EvaluationError(ArfError):
    """A checkpoint or an evaluation set that cannot be evaluated."""


class GridError(ArfError):
    """A grid of `arf ablate` (its file, its folder or one of its runs) that cannot be used or has failed."""


class ReportError(ArfError):
    """Runs, results or an anchor set that no report can be made of."""


class PatchError(ArfError):
    """Source patches that do not fit the sources they are meant for."""


class MissingDependencyError(ArfError):
    """An optional library that the requested step needs is not installed."""

    def __init__(self, library: str, step: str, extra: str) -> None:
        super().__init__(
            f"{step} needs the library '{library}', which is not installed.\n"
            f"Install it with: pip install 'arf-plugin[{extra}]'"
        )


class FitError(ArfError):
    """Settings of `arf fit` that cannot work, or a stage of it that has failed."""
