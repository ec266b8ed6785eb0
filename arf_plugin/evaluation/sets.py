"""Evaluation sets in CLIP_benchmark's WebDataset layout, read safely.

::

    SET/classnames.txt                              one class per line
    SET/zeroshot_classification_templates.txt       prompts, `{c}` for the class name
    SET/test/nshards.txt, SET/test/N.tar            KEY.(jpg|png|jpeg|webp) + KEY.cls

Read here and not by ``clip_benchmark.datasets.builder``, whose decoder unpickles some members of a tar.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from arf_plugin.anchors.images import IMAGE_EXTENSIONS, decode_image
from arf_plugin.anchors.tars import scan_samples
from arf_plugin.errors import EvaluationError

if TYPE_CHECKING:
    import PIL.Image

LAYOUT = "Expected CLIP_benchmark's layout: classnames.txt, zeroshot_classification_templates.txt, test/nshards.txt"


@dataclass(frozen=True)
class EvaluationSet:
    """One classification set.

    Attributes:
        name: what results are listed under.
        classnames: one name per class number.
        templates: prompts with ``{c}``.
        shards: its tars.
    """

    name: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    shards: tuple[Path, ...]

    def images(self) -> Iterator[tuple[PIL.Image.Image, int]]:
        """Yields RGB images and class numbers.

        Raises:
            EvaluationError: for a sample without an image or class, a class that is none, or an unreadable image.
        """
        for shard in self.shards:
            for sample in scan_samples(str(shard), EvaluationError, read=(*IMAGE_EXTENSIONS, "cls")):
                where = f"{shard}, sample {sample.key}"
                image, cls = sample.image, sample.members.get("cls")
                if image is None or cls is None:
                    raise EvaluationError(
                        f"{where}: found {sorted(sample.members)}, expected an image and a cls."
                    )
                text = (cls.data or b"").decode("ascii", "replace").strip()
                if not text.isdecimal() or int(text) >= len(self.classnames):
                    raise EvaluationError(
                        f"{where}: cls is {text!r}, expected a number from 0 to {len(self.classnames) - 1} "
                        "(classnames.txt counts the classes)."
                    )
                try:
                    yield decode_image(image.data or b""), int(text)
                except ValueError as cause:
                    raise EvaluationError(
                        f"{where}: the image {cause}. Replace it, or leave the sample out."
                    ) from None


def find_sets(folder: Path) -> list[EvaluationSet]:
    """Finds the set in a folder, or all sets below it.

    Raises:
        EvaluationError: if there is none.
    """
    roots = sorted(path.parent.parent for path in folder.rglob("test/nshards.txt"))
    if not roots:
        raise EvaluationError(f"There is no evaluation set in or below {folder}. {LAYOUT}.")
    return [
        open_set(root, name=str(root.relative_to(folder)) if root != folder else folder.name)
        for root in roots
    ]


def open_set(root: Path, name: str) -> EvaluationSet:
    """Opens one set.

    Raises:
        EvaluationError: if a file is missing or malformed.
    """
    count = " ".join(_lines(root / "test" / "nshards.txt"))
    if not count.isdecimal() or int(count) == 0:
        raise EvaluationError(f"{root / 'test' / 'nshards.txt'} says {count!r}, expected the number of tars.")
    templates = _lines(root / "zeroshot_classification_templates.txt")
    for template in templates:
        if "{c}" not in template:
            raise EvaluationError(
                f"{root / 'zeroshot_classification_templates.txt'}: {template!r} has no {{c}} for the class name."
            )
    shards = tuple(root / "test" / f"{number}.tar" for number in range(int(count)))
    return EvaluationSet(name, tuple(_lines(root / "classnames.txt")), tuple(templates), shards)


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as cause:
        raise EvaluationError(f"{path} cannot be read: {cause}. {LAYOUT}.") from cause
    if not any(lines):
        raise EvaluationError(f"{path} is empty. {LAYOUT}.")
    return [line for line in lines if line]
