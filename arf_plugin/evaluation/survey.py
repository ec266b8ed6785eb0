"""Looks through a folder for evaluation sets, and for what looks like one and is not understood."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.folders import is_image, listing, place_of, shortened

NSHARDS = "nshards.txt"
_NUMBERED = re.compile(r"[0-9]+\.tar")
_Waiting = tuple[str, tuple[tuple[int, int], ...]]  # a folder, and itself and those above it
_MOST_REPEATED = 10_000  # folders that links lead to once more


@dataclass(frozen=True)
class _Seen:
    """What a folder holds directly."""

    path: Path
    images: bool
    counted: bool
    tars: bool


@dataclass(frozen=True)
class Survey:
    """What there is below a folder.

    Attributes:
        folder: where it was looked.
        split: the part of the data that is wanted.
        roots: sets in CLIP_benchmark's WebDataset layout, by path.
    """

    folder: Path
    split: str
    roots: list[Path]
    _seen: list[_Seen]

    def refuse_second_layout(self) -> None:
        """Refuses class folders beside tars, in the folder itself or in one of the sets.

        Raises:
            EvaluationError: naming both.
        """
        for place in dict.fromkeys((self.folder, *self.roots, *(root / self.split for root in self.roots))):
            classes = [s.path.name for s in self._seen if s.images and s.path.parent == place]
            classes = [name for name in classes if not name.startswith(".")]
            if len(classes) > 1:
                raise EvaluationError(
                    f"{place} has folders of images ({shortened(classes)}), and a set in WebDataset layout is at "
                    f"{self.roots[0] / self.split}. Expected one layout: move one of them elsewhere, or name the "
                    "one that is meant."
                )

    def left_out(self) -> Iterator[str]:
        """Says what looks like a set, or a part of one, and is not read."""
        known = {root / self.split for root in self.roots}
        if self.folder.joinpath(NSHARDS).is_file() and not self.roots:
            yield f"{self.folder} has {NSHARDS} itself: name the folder above it."
        others = [s.path for s in self._seen if s.counted and s.path not in known]
        others = [path for path in others if path.parent not in self.roots and path != self.folder]
        if others:
            yield (
                f"{shortened(map(str, others))} {'has' if len(others) == 1 else 'have'} {NSHARDS}, but the split is "
                f"'{self.split}': left out."
            )
        uncounted = [str(s.path) for s in self._seen if s.tars and not s.counted and s.path not in known]
        if uncounted:
            yield f"{shortened(uncounted)}: tars without {NSHARDS} are left out."
        images = [str(s.path) for s in self._seen if s.images] if self.roots else []
        if images:
            yield (
                f"images in {shortened(images)} belong to no set in WebDataset layout and are left out; name a set "
                "of class folders by itself."
            )


def survey(folder: Path, split: str) -> Survey:
    """Looks through a folder and all below it; links are followed.

    Raises:
        EvaluationError: a folder cannot be listed, or links lead round and round.
    """
    wanted = Path(split).parts
    seen = list(_folders(folder))
    roots = []
    for one in seen:
        inner = one.path.relative_to(folder).parts
        if one.counted and wanted and inner[-len(wanted) :] == wanted:
            roots.append(one.path.parents[len(wanted) - 1])
    return Survey(folder, split, sorted(roots), seen)


def _folders(folder: Path) -> Iterator[_Seen]:
    """Yields folders, links after all others, so that a folder's own name comes first.

    A link to a folder above itself adds nothing; one to another place is another name for what is there.
    """
    start = place_of(str(folder))
    waiting: deque[_Waiting] = deque([(str(folder), (start,))])
    links: deque[_Waiting] = deque()
    known, repeated = {start}, 0
    while waiting or links:
        path, above = (waiting or links).popleft()
        folders, files = listing(path)
        yield _Seen(
            Path(path),
            images=any(is_image(name) and not name.startswith("._") for name in files),
            counted=NSHARDS in files,
            tars=any(_NUMBERED.fullmatch(name) for name in files),
        )
        for name in folders:
            inner = f"{path}/{name}"
            place = place_of(inner)
            if place in above:
                continue
            repeated += place in known
            if repeated > _MOST_REPEATED:
                raise EvaluationError(
                    f"{folder}: links lead to the same folders over and over, such as {inner}. Remove them."
                )
            known.add(place)
            (links if Path(inner).is_symlink() else waiting).append((inner, (*above, place)))
