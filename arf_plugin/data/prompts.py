"""Class prompts: class names filled into templates, one template per sample, as FLYP trains.

Source: Goyal et al., "Finetune Like You Pretrain" (FLYP), CVPR 2023, section 3: each class label becomes a text by a
template drawn at random. Our draw is a hash of seed, epoch and sample id: the same on any number of workers.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence

import fsspec

from arf_plugin.anchors.task_csv import label_text
from arf_plugin.checks.messages import is_class_index, unusable_label_message
from arf_plugin.errors import FlagError, TaskDataError
from arf_plugin.untrusted import decode_text, printable, split_lines

PLACEHOLDERS = ("{c}", "{}")  # CLIP_benchmark's, and Python's


def choose(options: int, *what: object) -> int:
    """A number below ``options`` that looks random but depends on ``what`` alone."""
    if options == 1:
        return 0
    digest = hashlib.blake2b("\0".join(map(str, what)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % options


class ClassPrompts:
    """Turns the ``cls`` of a sample into a class prompt: one name per class, templates with ``{c}`` in its place."""

    def __init__(self, classnames: Sequence[str], templates: Sequence[str]) -> None:
        self.classnames = list(classnames)
        self.templates = list(templates)

    def __call__(self, cls: object, sample_id: str, seed: int, epoch: int) -> str:
        """Builds the prompt of one sample; each epoch draws a template anew. See `class_index` for errors."""
        index = class_index(cls, sample_id, len(self.classnames))
        template = self.templates[choose(len(self.templates), "template", seed, epoch, sample_id)]
        return template.replace("{c}", self.classnames[index])


class ClassIndices:
    """Takes the place of `ClassPrompts` where a head classifies so many classes: the class index itself."""

    def __init__(self, classes: int) -> None:
        self.classnames = [str(index) for index in range(classes)]

    def __call__(self, cls: object, sample_id: str) -> int:
        """The index of one sample; see `class_index` for errors."""
        return class_index(cls, sample_id, len(self.classnames))


def class_index(cls: object, sample_id: str, classes: int) -> int:
    """Reads the ``cls`` of a sample, as a number or its decimal text.

    Raises:
        TaskDataError: It is no class index below ``classes``.
    """
    text = cls.decode("latin-1").strip() if isinstance(cls, bytes) else label_text(cls)
    if not is_class_index(text, classes):
        raise TaskDataError(unusable_label_message(sample_id, text, classes))
    return int(text)


def load_classnames(classnames: str, flag: str = "--arf-classnames") -> list[str]:
    """Reads class names from a file, or open_clip's ImageNet list by the name ``imagenet``.

    Raises:
        FlagError: A file that cannot be read, or has an empty line.
    """
    if classnames == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES

        return list(IMAGENET_CLASSNAMES)
    names = _lines(classnames, flag)
    if problem := repeated_names(names):
        warnings.warn(f"{flag} {printable(classnames)}: {problem}", stacklevel=2)
    return names


def load_prompts(classnames: str, templates: str) -> ClassPrompts:
    """Reads class names and templates from files, or open_clip's ImageNet lists by the name ``imagenet``.

    Raises:
        FlagError: A file that cannot be read, is empty, or holds a template without a placeholder.
    """
    return ClassPrompts(load_classnames(classnames), load_templates(templates))


def load_templates(templates: str, flag: str = "--arf-templates") -> list[str]:
    """Reads templates from a file, or open_clip's by the name ``imagenet``; ``{c}`` is where the name goes.

    Raises:
        FlagError: As of `load_prompts`.
    """
    if templates == "imagenet":
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return [template("{c}") for template in OPENAI_IMAGENET_TEMPLATES]
    lines = []
    for number, line in enumerate(_lines(templates, flag), 1):
        placeholder = next((text for text in PLACEHOLDERS if text in line), None)
        if placeholder is None:
            raise FlagError(
                f"{flag} {templates}, line {number}: {line!r} has no place for the class name.\n"
                "Write {c} where it goes, for example: a photo of a {c}."
            )
        lines.append(line.replace(placeholder, "{c}"))
    return lines


def _lines(path: str, flag: str) -> list[str]:
    try:
        with fsspec.open(path, "rb") as stream:
            data = stream.read()
    except (OSError, ValueError, ImportError) as error:
        raise FlagError(
            f"{flag} {path} cannot be read: {error}\nExpected a UTF-8 text file with one entry per line."
        ) from error
    # A mark within the text is that of a file that was appended to another.
    text = decode_text(data, f"{flag} {path}", FlagError)
    lines = [line.strip().strip("\ufeff").strip() for line in split_lines(text)]
    while lines and not lines[-1]:
        lines.pop()
    if not lines or "" in lines:
        where = f"line {lines.index('') + 1} is empty" if lines else "the file is empty"
        raise FlagError(f"{flag} {path}: {where}; expected one entry per line. Remove empty lines.")
    return lines


def repeated_names(names: Sequence[str]) -> str | None:
    """Says which class names stand for several classes, if any do: texts cannot tell those classes apart."""
    lines: dict[str, list[int]] = {}
    for number, name in enumerate(names, 1):
        lines.setdefault(name, []).append(number)
    twice = {name: found for name, found in lines.items() if len(found) > 1}
    if not twice:
        return None
    name, found = next(iter(twice.items()))
    more = f", and {len(twice) - 1} more names" if len(twice) > 1 else ""
    return (
        f"{printable(name)!r} names classes {' and '.join(map(str, found[:3]))}{more} (counted from 1): prompts "
        "cannot tell these classes apart."
    )
