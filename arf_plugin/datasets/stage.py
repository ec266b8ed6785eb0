"""Stage data: the images of any usual form as WebDataset shards, with class names, prompts and a validation split.

What is written depends on the images, their classes and their texts alone, never on the form they came in: classes are
numbered in the order of their names, samples are ordered and called by the SHA-256 of their bytes, and so is the split
drawn. An image that is there twice counts once; one that two classes claim has no class that could be learned.

    OUT/train/000000.tar ...    KEY.(jpg|png|webp), KEY.cls, maybe KEY.txt; KEY is the start of the image's SHA-256
    OUT/val/, OUT/test/         the same as sets that `arf evaluate` reads (CLIP_benchmark's layout)
    OUT/classnames.txt          a name per class index
    OUT/templates.txt           prompts, {c} for the name
    OUT/sources.tsv             where each sample came from
    OUT/rejected.tsv            what was set aside, by the user's own paths, and why

A pool has OUT/000000.tar with KEY.txt and no classes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from arf_plugin.anchors.images import decode_image, look_once, size_problem
from arf_plugin.anchors.tars import add_member
from arf_plugin.datasets.entries import Entry, Listing
from arf_plugin.datasets.forms import read_source
from arf_plugin.errors import TaskDataError
from arf_plugin.evaluation.folders import shortened
from arf_plugin.files import digest, known_stat, replacing, write_json
from arf_plugin.pipeline.execution import Execution
from arf_plugin.pipeline.stage import Outcome, Shard, Stage
from arf_plugin.untrusted import printable

KEPT_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # others become PNG
SHARDS = 8  # at least so many, so that loader workers have one each
LARGEST_SHARD = 1000
_PARTS = ("test", "val", "train")
FEW = 10  # images of a class below which little can be learned, let alone measured


class Sample(NamedTuple):
    """An image that goes into a shard."""

    entry: Entry  # the first place of several
    sha256: str  # of its bytes
    format: str  # its suffix in a tar; empty where it is to become PNG
    name: str | None  # of its class; None in a pool

    @property
    def key(self) -> str:
        """Its name in tars."""
        return self.sha256[:20]


class Plan(NamedTuple):
    """What is to be written: samples of each part, class names, what was set aside and why, what should be known."""

    form: str
    parts: dict[str, list[Sample]]
    classnames: list[str]
    rejected: list[tuple[str, str]]
    repeated: int
    notes: list[str]

    @property
    def class_index(self) -> dict[str | None, int]:
        """Class index by name."""
        return {name: index for index, name in enumerate(self.classnames)}


@dataclasses.dataclass
class DataStage(Stage):
    """Writes task data, or a pool.

    Attributes:
        source: What the user named; see :mod:`arf_plugin.datasets.forms`.
        val: Part of each class that is kept for validation, where the source has no validation images of its own; or
            another source, which has them.
        pool: Images with texts and no classes.
        classnames: File of class names by class index; None for those that the source has.
        templates: File of prompts, ``{c}`` for the name; None for OpenAI's seven.
        shard_size: Samples in a shard; None for one that gives every loader worker a shard.
        workers: Threads that look at images.
    """

    source: str
    val: float | str = 0.15
    pool: bool = False
    classnames: str | None = None
    templates: str | None = None
    shard_size: int | None = None
    workers: int = 2
    name = "data"

    def config(self) -> dict[str, Any]:
        """All that the bytes depend on."""
        index = self.made.class_index
        content = {
            part: [[s.sha256, index.get(s.name), s.entry.text] for s in samples]
            for part, samples in self.made.parts.items()
        }
        return {
            "content": digest(content),
            "classnames": self.made.classnames,
            "templates": self._templates,
            "shard_size": self.shard_size,
            "pool": self.pool,
        }

    def plan(self) -> list[Shard]:
        """One shard per output tar."""
        found: list[tuple[str, int, list[Sample]]] = []
        for part, samples in self.made.parts.items():
            size = self.shard_size or max(1, min(LARGEST_SHARD, math.ceil(len(samples) / SHARDS)))
            found += [
                (part, n, samples[start : start + size])
                for n, start in enumerate(range(0, len(samples), size))
            ]
        return [Shard.counted(index, each, len(each[2])) for index, each in enumerate(found)]

    def artifacts(self, shards: list[Shard]) -> list[Path]:
        """The output tars."""
        return [self._tar(shard.source[0], shard.source[1]) for shard in shards]

    def _tar(self, part: str, number: int) -> Path:
        if self.pool:
            return self.out / f"{number:06d}.tar"
        train = part == "train"
        return self.out / (f"train/{number:06d}.tar" if train else f"{part}/test/{number}.tar")

    def disk(self, shards: list[Shard]) -> float | None:
        """The images as they are, and what stands beside each of them."""
        entries = [sample.entry for _, _, samples in (shard.source for shard in shards) for sample in samples]
        each = [one.size or (one.path.stat().st_size if one.offset < 0 else None) for one in entries]
        return None if None in each else sum(size + 2048.0 for size in each if size)

    def process(self, shard: Shard, execution: Execution, advance: Callable[[int], object]) -> Outcome:
        """Writes one tar; what was set aside is told with the first."""
        outcome, index = Outcome(), self.made.class_index
        if shard.index == 0:
            outcome.rejects += self.made.rejected
            outcome.samples += len(self.made.rejected)
        with replacing(self.artifacts([shard])[0]) as temporary, tarfile.open(temporary, "w") as tar:
            for sample in shard.source[2]:
                image = sample.entry.read()
                if hashlib.sha256(image).hexdigest() != sample.sha256:
                    raise TaskDataError(
                        f"{sample.entry.shown} has changed since it was looked at. Run the command again."
                    )
                kept = (sample.format, image) if sample.format else ("png", _png(image))
                add_member(tar, f"{sample.key}.{kept[0]}", kept[1])
                if sample.name is not None:
                    add_member(tar, f"{sample.key}.cls", str(index[sample.name]).encode())
                if sample.entry.text:
                    add_member(tar, f"{sample.key}.txt", sample.entry.text.encode())
                outcome.samples += 1
                outcome.kept += 1
                advance(1)
        return outcome

    def finalize(self, shards: list[Shard], execution: Execution) -> dict[str, Any]:
        """Writes the texts beside the tars, and says what there is."""
        made = self.made
        shards_of = Counter(shard.source[0] for shard in shards)
        texts = {
            "rejected.tsv": [f"{_cell(path)}\t{_cell(reason)}" for path, reason in made.rejected],
            "sources.tsv": [
                f"{part}/{sample.key}\t{_cell(sample.entry.shown)}"
                for part, some in made.parts.items()
                for sample in some
            ],
        }
        if not self.pool:
            texts |= {"classnames.txt": made.classnames, "templates.txt": self._templates}
            for part in set(made.parts) - {"train"}:
                texts[f"{part}/classnames.txt"] = made.classnames
                texts[f"{part}/zeroshot_classification_templates.txt"] = self._templates
                texts[f"{part}/test/nshards.txt"] = [str(shards_of[part])]
        for name, lines in texts.items():
            with replacing(self.out / name) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        summary: dict[str, Any] = {
            "form": made.form,
            "images": {part: len(samples) for part, samples in made.parts.items()},
            "repeated": made.repeated,
            "notes": made.notes,
        }
        if not self.pool:
            counts = sorted(Counter(sample.name for sample in made.parts["train"]).values())
            last = shards_of["train"] - 1
            summary |= {
                "classes": len(made.classnames),
                "images_per_class": {
                    "least": counts[0],
                    "median": counts[len(counts) // 2],
                    "most": counts[-1],
                },
                "train_data": f"{self.out}/train/{f'{{000000..{last:06d}}}' if last else '000000'}.tar",
            }
        write_json(self.out / "data.json", summary | {"source": self.source})
        return summary

    @cached_property
    def _templates(self) -> list[str]:
        """Those of the file, or OpenAI's seven prompts that did best on ImageNet, as open_clip has them."""
        from open_clip import SIMPLE_IMAGENET_TEMPLATES

        from arf_plugin.data.prompts import load_templates

        if self.templates is not None:
            return load_templates(self.templates, "--templates")
        return [template("{c}") for template in SIMPLE_IMAGENET_TEMPLATES]

    @cached_property
    def made(self) -> Plan:
        """What is to be written; looks at every image once.

        Raises:
            TaskDataError: The source is not understood, or nothing of it can be used.
        """
        listing = read_source(self.source, pool=self.pool)
        notes = list(listing.notes)
        if listing.empty:
            notes.append(f"folders without images are no classes: {shortened(listing.empty)}")
        rejected: list[tuple[str, str]] = []
        named = {} if self.pool else _class_names(listing, self.classnames, notes)
        entries = listing.entries
        if isinstance(self.val, str):
            entries = entries + self._validation(listing, named, notes)
            named |= {name: name for name in named.values()}
        same: dict[str, list[Sample]] = defaultdict(list)  # by content
        for entry, (sha256, suffix, problem) in look_once(entries, _stamp, look, "looks", self.workers):
            name = named.get(entry.label)
            if not problem and not (entry.text if self.pool else name):
                problem = "has no text" if self.pool else "has no class"
            if problem:
                rejected.append((entry.shown, problem))
            else:
                same[sha256].append(Sample(entry, sha256, suffix, name))
        for sha256, some in list(same.items()):
            claims = {sample.name or "" for sample in some}
            if len(claims) > 1:
                problem = f"is there as {' and as '.join(sorted(claims))}, byte for byte"
                rejected += [(sample.entry.shown, problem) for sample in same.pop(sha256)]
        leaking = 0
        for some in same.values():  # an image of two splits is no training image
            some.sort(key=lambda sample: _PARTS.index(sample.entry.split or "train"))
            leaking += len({sample.entry.split for sample in some}) > 1
        if leaking:
            notes.append(
                f"{leaking} images are in several splits, and count for test or validation, not for training"
            )
        samples = sorted((some[0] for some in same.values()), key=lambda sample: sample.sha256)
        if not samples:
            raise TaskDataError(
                f"Not one of the {len(entries)} images of {self.source} can be used; the first: "
                f"{rejected[0][0]} {rejected[0][1]}."
            )
        repeated = sum(len(some) - 1 for some in same.values())
        if repeated:
            notes.append(f"{repeated} images are there again, byte for byte, and count once")
        if self.pool:
            return Plan(listing.form, {"train": samples}, [], rejected, repeated, notes)
        names = sorted({sample.name or "" for sample in samples})
        if gone := sorted(set(named.values()) - set(names)):
            notes.append(f"classes without a usable image are left out: {', '.join(gone[:5])}")
        if len(names) < 2:
            raise TaskDataError(
                f"There is only one class, {names[0]!r}. Expected two or more; name the folder whose folders are the "
                "classes."
            )
        val = self.val if isinstance(self.val, float) else 0.0
        return Plan(listing.form, _split(samples, val, notes), names, rejected, repeated, notes)

    def _validation(self, listing: Listing, named: dict[Any, str], notes: list[str]) -> list[Entry]:
        """Images of `val`, labelled with the names of the source's classes.

        Raises:
            TaskDataError: It has another class, or the source has validation images, too.
        """
        if any(entry.split == "val" for entry in listing.entries):
            raise TaskDataError(
                f"{self.source} has validation images of its own, and --val {self.val} names others. Leave --val out, "
                "or name the training images alone."
            )
        other = read_source(str(self.val))
        other = dataclasses.replace(other, classnames=other.classnames or listing.classnames)
        numbered = all(isinstance(entry.label, int) for entry in other.entries if entry.label is not None)
        called = _class_names(other, self.classnames if numbered else None, [])
        notes += [f"{self.val}: {note}" for note in other.notes]
        if unknown := sorted(set(called.values()) - set(named.values())):
            raise TaskDataError(
                f"--val {self.val} has the class {unknown[0]!r}, and {self.source} has not; its classes: "
                f"{shortened(sorted(set(named.values())))}. Expected images of the same classes, called the same."
            )
        return [
            dataclasses.replace(entry, label=called.get(entry.label), split="val") for entry in other.entries
        ]


def _stamp(entry: Entry) -> list[Any]:
    return [str(entry.path), entry.offset, known_stat(entry.path)]


def look(entry: Entry) -> list[str]:
    """Reads an image and decodes it in full.

    Returns:
        The SHA-256 of its bytes, empty where they could not be read; its suffix in a tar, empty where it is to become
        PNG; why it is unreadable, as a clause, empty if it is not.
    """
    from PIL import Image

    try:
        data = entry.read()
    except Exception as cause:  # of Arrow, which raises many kinds; and where there is no file
        reason = (cause.strerror or cause) if isinstance(cause, OSError) else printable(str(cause))[:120]
        return ["", "", f"cannot be read ({reason})"]
    problem, suffix = size_problem(len(data)), ""
    if problem is None:
        try:
            decode_image(data)
            with Image.open(io.BytesIO(data)) as image:
                suffix = KEPT_FORMATS.get(image.format or "", "")
        except ValueError as cause:
            problem = str(cause)
    return [hashlib.sha256(data).hexdigest(), suffix, problem or ""]


def _class_names(listing: Listing, file: str | None, notes: list[str]) -> dict[Any, str]:
    """Class name of each label.

    Raises:
        TaskDataError: Labels are indices and nobody says what they are called, or one has no name.
    """
    from arf_plugin.data.prompts import load_classnames

    labels = {entry.label for entry in listing.entries if entry.label is not None}
    numbers = {label for label in labels if isinstance(label, int)}
    names = load_classnames(file, "--classnames") if file else listing.classnames
    called: dict[Any, str] = {}
    if names is not None and numbers == labels:
        if beyond := sorted(number for number in numbers if not 0 <= number < len(names)):
            raise TaskDataError(
                f"The class index {beyond[0]} has no name: there are {len(names)} names, for 0 to {len(names) - 1}. "
                "Are they the names of these data, and do indices begin with 0?"
            )
        called = {number: names[number] for number in numbers}
    elif names is not None and file is not None:
        ordered = sorted(labels, key=str)
        if len(ordered) != len(names):
            raise TaskDataError(
                f"--classnames {file} has {len(names)} names, the source {len(ordered)} classes "
                f"({shortened(map(str, ordered))}). Expected one name per class, in the order of the folders' names."
            )
        called = dict(zip(ordered, names, strict=True))
    elif numbers == labels and numbers:
        raise TaskDataError(
            f"Classes are numbers ({shortened(map(str, sorted(numbers)))}), and nothing says what they are called. "
            "Prompts need names: give them with --classnames FILE, one per line, the first for 0."
        )
    else:
        called = {label: str(label) for label in labels}
    if any("_" in name for name in called.values()):
        example = min(name for name in called.values() if "_" in name)
        notes.append(f"underscores in class names become spaces: {example!r} -> {_plain(example)!r}")
    plain = {label: _plain(name) for label, name in called.items()}
    if nameless := [label for label, name in plain.items() if not name]:
        raise TaskDataError(f"The class {nameless[0]!r} has no name that a prompt could have. Rename it.")
    repeated = [name for name, count in Counter(plain.values()).items() if count > 1]
    if repeated and len(set(called.values())) == len(called):
        raise TaskDataError(
            f"Two classes are both called {repeated[0]!r}: prompts cannot tell them apart. Rename one, or merge them."
        )
    if all(re.fullmatch(r"n\d{8}", name) for name in plain.values()):
        notes.append(
            f"class names are WordNet's numbers ({min(plain.values())} ...), which say nothing to a text tower: "
            "--classnames"
        )
    return plain


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").split())


def _split(samples: list[Sample], val: float, notes: list[str]) -> dict[str, list[Sample]]:
    """Parts of the data: the source's own splits; validation is drawn from each class where it has none."""
    parts: dict[str, list[Sample]] = {"train": [], "val": [], "test": []}
    for sample in samples:
        parts[sample.entry.split or "train"].append(sample)
    if not parts["train"]:
        raise TaskDataError(
            "The source has no images to train on, only validation or test images. Name the folder above."
        )
    if not parts["val"] and val > 0:
        by_class: dict[str | None, list[Sample]] = defaultdict(list)
        for sample in parts["train"]:
            by_class[sample.name].append(sample)
        drawn: set[str] = set()
        for some in by_class.values():
            # At least one, and never all. Samples are in the order of their digests; another digest draws, so that
            # shards tell nothing of the split.
            count = min(len(some) - 1, max(1, round(len(some) * val)))
            some.sort(key=lambda sample: digest(["val", sample.sha256]))
            drawn.update(sample.key for sample in some[:count])
        parts["val"] = [sample for sample in parts["train"] if sample.key in drawn]
        parts["train"] = [sample for sample in parts["train"] if sample.key not in drawn]
    counts = Counter(sample.name for sample in parts["train"])
    if only := {sample.name for sample in samples} - set(counts):
        notes.append(f"{len(only)} classes have images to evaluate on, but none to train on")
    least, most = min(counts.values()), max(counts.values())
    if least < FEW:
        few = sum(count < FEW for count in counts.values())
        notes.append(
            f"{few} of {len(counts)} classes have fewer than {FEW} images to train on (the least: {least})"
        )
    if most > 10 * least:
        notes.append(f"classes are unbalanced: {least} to {most} images")
    return {part: some for part, some in parts.items() if some}


def _png(data: bytes) -> bytes:
    stream = io.BytesIO()
    decode_image(data).save(stream, format="PNG")
    return stream.getvalue()


def _cell(text: str) -> str:
    return printable(text).replace("\t", " ").replace("\n", " ")
