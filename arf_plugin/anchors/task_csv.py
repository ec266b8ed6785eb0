"""Task data in a CSV or TSV file, read as open_clip reads it, and the image files that it names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arf_plugin.anchors.images import image_problem, look_once
from arf_plugin.errors import TaskDataError
from arf_plugin.files import known_stat
from arf_plugin.untrusted import require_regular

if TYPE_CHECKING:
    import pandas as pd

CLASS_COLUMN = "cls"
_THREADS = 8


def read_csv(path: str, image_column: str, separator: str) -> pd.DataFrame:
    """Reads a CSV file as open_clip does.

    Raises:
        TaskDataError: if the file is missing or no table, if it lacks the column of images, has no rows, or a row
            without a path.
    """
    import pandas as pd

    require_regular(Path(path), TaskDataError)
    if not Path(path).is_file():
        raise TaskDataError(f"{path} does not exist. Expected a CSV or TSV file with image paths.")
    try:
        frame = pd.read_csv(path, sep=separator)  # as open_clip reads it
    except (ValueError, OSError, OverflowError, RecursionError, MemoryError) as cause:
        # pandas' ParserError and UnicodeDecodeError are ValueErrors
        raise TaskDataError(
            f"{path} cannot be read as a table separated by {separator!r}: {cause}"
        ) from cause
    if image_column not in frame.columns:
        found = ", ".join(map(str, frame.columns))
        raise TaskDataError(
            f"{path} has no column {image_column!r} (found: {found[:300]}; separator {separator!r}).\n"
            "Name the right ones with --csv-img-key and --csv-separator."
        )
    column = frame[image_column]
    if column.empty:
        raise TaskDataError(
            f"{path} has no rows. Expected one image path per row in column {image_column!r}."
        )
    empty = column.index[column.isna()]
    if len(empty):
        raise TaskDataError(
            f"{path} has no image path in row {_row(frame, empty[0])} (column {image_column!r})."
        )
    return frame


def _row(frame: pd.DataFrame, label: Any) -> int:
    return int(frame.index.get_loc(label)) + 1


def label_text(value: Any) -> str:
    """A class index of a CSV as text: pandas reads whole numbers beside an empty cell as 3.0."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def unreadable_files(paths: Sequence[str], decode: bool) -> dict[str, str]:
    """Reasons by path of image files that are missing or damaged.

    What was seen of files that have not changed since is found in the cache, unless they are to be decoded.
    """
    looks = look_once(
        paths,
        lambda path: [path, known_stat(Path(path))],
        lambda path: file_problem(path, decode),
        "files",
        _THREADS,
        trust_cache=not decode,
    )
    return {path: str(problem) for path, problem in looks if problem}


def file_problem(path: str, decode: bool) -> str | None:
    """Says why an image file is missing or damaged; see `image_problem`."""
    try:
        require_regular(Path(path), TaskDataError)
        with Path(path).open("rb") as file:
            return image_problem(file, 0, Path(path).stat().st_size, decode)
    except OSError as cause:
        return f"cannot be opened ({cause.strerror or cause})"
    except ValueError as cause:  # a NUL in its name
        return f"cannot be opened ({cause})"
    except TaskDataError:
        return "is no file"
