"""Who is task, validation, test and pool.

* Task: the vendors of `TASK_VENDORS`, fine-tune classes only, split by concept within each class.
* Every other (concept, family) of a class goes by lot to validation, test or the pool. A *family* is a group of
  sets by one house whose drawings are near-copies of each other (see twins.py): its members stay on one side.
  Validation and test are the shift sets for the fine-tune classes and the zero-shot sets for the held-out ones.
* Concepts outside the classes go to the pool.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from benchmarks.files import unit_hash

from emojinet.classes import CLASS_NAMES, held_out_classes
from emojinet.join import Concept

TASK_VENDORS = ("noto", "noto-v1")
MONO_VENDORS = ("fluent-emoji-high-contrast", "emojione-monotone")
FAMILIES = {
    "noto": "noto",
    "noto-v1": "noto",
    "fluent-emoji": "fluent",
    "fluent-emoji-flat": "fluent",
    "fluent-emoji-high-contrast": "fluent",
    "emojione": "emojione",
    "emojione-v1": "emojione",
    "emojione-monotone": "emojione",
}

# Shares of a class's task concepts, and of its other (concept, family) pairs; the rest is test and pool.
TASK_TRAIN, TASK_VALIDATION = 0.5, 0.15
SHIFT_VALIDATION, SHIFT_TEST = 0.08, 0.25
ZERO_SHOT_VALIDATION, ZERO_SHOT_TEST = 0.1, 0.3


@dataclass(frozen=True)
class Sample:
    """One drawing and the place it was given.

    Attributes:
        vendor: the set it is from.
        code: the concept's code points.
        icon: the drawing's name in its set.
        place: "task/train", "validation/id", "test/id", "validation/shift", "test/shift",
            "validation/zero_shot", "test/zero_shot" or "pool".
        subgroup: the concept's subgroup; a class if it is in `CLASS_NAMES`.
    """

    vendor: str
    code: str
    icon: str
    place: str
    subgroup: str

    @property
    def key(self) -> str:
        """The sample's WebDataset key: unique, and free of dots."""
        return f"{self.vendor}_{self.code}"


def split_task(concepts: list[Concept]) -> dict[str, str]:
    """Splits the fine-tune classes' concepts for the task domain, class by class.

    Returns:
        "task/train", "validation/id" or "test/id" by code.
    """
    by_class = defaultdict(list)
    for concept in concepts:
        by_class[concept.subgroup].append(concept.code)
    place = {}
    for codes in by_class.values():
        order = sorted(codes, key=lambda code: unit_hash("task", code))
        first, second = round(TASK_TRAIN * len(order)), round((TASK_TRAIN + TASK_VALIDATION) * len(order))
        for position, code in enumerate(order):
            place[code] = (
                "task/train" if position < first else "validation/id" if position < second else "test/id"
            )
    return place


def split(concepts: dict[str, Concept], vendors: dict[str, dict[str, str]]) -> list[Sample]:
    """Gives every drawing its place.

    Args:
        concepts: all concepts by code.
        vendors: for each vendor, its icon names by code.
    """
    group_of = {concept.subgroup: concept.group for concept in concepts.values()}
    held_out = set(held_out_classes(group_of))
    fine_tuned = set(CLASS_NAMES) - held_out
    drawn_for_task = {code for vendor in TASK_VENDORS for code in vendors.get(vendor, {})}
    task = split_task([c for c in concepts.values() if c.subgroup in fine_tuned and c.code in drawn_for_task])

    def place_of(vendor: str, concept: Concept) -> str:
        if concept.subgroup in fine_tuned and vendor in TASK_VENDORS:
            return task[concept.code]
        if concept.subgroup in fine_tuned:
            kind, validation, test = "shift", SHIFT_VALIDATION, SHIFT_TEST
        elif concept.subgroup in held_out:
            kind, validation, test = "zero_shot", ZERO_SHOT_VALIDATION, ZERO_SHOT_TEST
        else:
            return "pool"
        lot = unit_hash("pool", FAMILIES.get(vendor, vendor), concept.code)
        if lot < validation:
            return f"validation/{kind}"
        return f"test/{kind}" if lot < validation + test else "pool"

    return [
        Sample(vendor, code, icon, place_of(vendor, concepts[code]), concepts[code].subgroup)
        for vendor, icons in vendors.items()
        for code, icon in sorted(icons.items())
    ]
