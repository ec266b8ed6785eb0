"""Which drawings are task, test, validation and pool. All of it follows from hashes of names.

* Concepts in at least `MIN_SETS` sets are the classes; whole groups (concepts.py) of them are held out. Concepts in
  fewer sets give the classes of the zero-shot validation sets.
* Task: the line drawings of `TASK_SETS`, fine-tuned classes only. Of each class one of the two sets is trained on, the
  other one is ID: the same two hands, but no drawing beside its own variants.
* Every other (concept, family) goes to the pool or is tested: as shift for the fine-tuned classes, as zero-shot for the
  held-out ones. A *family* is one set, or sets that descend from each other: its drawings of a concept stay together.
* ID and shift of `VALIDATION` of the fine-tuned classes are for validation, of the others for the test.
* Drawings of no listed concept go to the pool, but for those whose name mentions a concept ("home-battery") that the
  same family has in the task or the tests.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.files import unit_hash

from iconnet import concepts as listed
from iconnet.names import Concepts, Drawing

TASK_SETS = ("tabler", "lucide")
# Material Design Icons began as Google's set; many of its drawings are still those.
FAMILIES = {"material-symbols": "material", "mdi": "material"}
MIN_SETS = 8
HELD_OUT = 0.38  # of the classes
VALIDATION = 0.18  # of the fine-tuned classes
SHIFT_POOL, ZERO_SHOT_POOL = 0.15, 0.28  # of (concept, family)
MAX_VARIANTS = 10  # drawings of one concept, set and style: some sets have dozens of speech bubbles


@dataclass(frozen=True)
class Classes:
    """The concepts by their part in the benchmark, each sorted.

    Attributes:
        fine_tuned: what the task is about.
        held_out: tested zero-shot.
        validation: held out, too, for the zero-shot validation sets.
    """

    fine_tuned: tuple[str, ...]
    held_out: tuple[str, ...]
    validation: tuple[str, ...]


def choose_classes(drawings: Iterable[Drawing]) -> Classes:
    """Gives each concept its part."""
    sets: dict[str, set[str]] = defaultdict(set)
    for drawing in drawings:
        sets[drawing.concept].add(drawing.set)
    sets.pop("", None)
    many = sorted(concept for concept, found in sets.items() if len(found) >= MIN_SETS)
    held_out = listed.held_out(many, HELD_OUT)
    used = {listed.group_of(concept) for concept in many if concept not in held_out}
    few = sorted(sets.keys() - set(many))
    return Classes(
        fine_tuned=tuple(concept for concept in many if concept not in held_out),
        held_out=tuple(held_out),
        validation=tuple(concept for concept in few if listed.group_of(concept) not in used),
    )


def family(drawing: Drawing) -> str:
    """The family of a drawing's set."""
    return FAMILIES.get(drawing.set, drawing.set)


def split(drawings: list[Drawing], concepts: Concepts, classes: Classes) -> dict[Drawing, str]:
    """Gives drawings their places.

    Returns:
        "task/train", "test/id", "test/shift", "test/zero_shot", the same under "validation/", or "pool" by drawing;
        some have none.
    """
    fine_tuned, held_out, validation = (
        set(names) for names in (classes.fine_tuned, classes.held_out, classes.validation)
    )
    in_task: dict[str, set[str]] = defaultdict(set)
    for drawing in drawings:
        if drawing.concept in fine_tuned and drawing.set in TASK_SETS and drawing.style == "line":
            in_task[drawing.concept].add(drawing.set)
    trained = {
        concept: min(found, key=lambda name: unit_hash("train", concept, name))
        for concept, found in in_task.items()
    }

    def goes_to_pool(concept: str, of_family: str) -> bool:
        if concept in fine_tuned:
            return of_family not in TASK_SETS and unit_hash("pool", of_family, concept) < SHIFT_POOL
        if concept in held_out or concept in validation:
            return unit_hash("pool", of_family, concept) < ZERO_SHOT_POOL
        return True

    def place_of(drawing: Drawing) -> str:
        concept = drawing.concept
        if not concept:
            mentioned = concepts.mentioned(drawing.name)
            return "pool" if all(goes_to_pool(name, family(drawing)) for name in mentioned) else ""
        if goes_to_pool(concept, family(drawing)):
            return "pool"
        if concept in held_out:
            return "test/zero_shot"
        if concept in validation:
            return "validation/zero_shot"
        half = "validation" if unit_hash("validation", concept) < VALIDATION else "test"
        if drawing.set in TASK_SETS and drawing.style == "line":
            return "task/train" if drawing.set == trained[concept] else f"{half}/id"
        return f"{half}/shift"

    return {drawing: place for drawing in few_variants(drawings) if (place := place_of(drawing))}


def few_variants(drawings: Iterable[Drawing]) -> list[Drawing]:
    """Leaves at most `MAX_VARIANTS` of a concept, set and style, the plain drawings first."""
    kept, of = [], defaultdict(list)
    for drawing in drawings:
        of[drawing.concept, drawing.domain].append(drawing)
    for (concept, _), members in of.items():
        members.sort(key=lambda drawing: (bool(drawing.variant), unit_hash("variant", drawing.key)))
        kept += members[:MAX_VARIANTS] if concept else members
    return sorted(kept, key=lambda drawing: drawing.key)
