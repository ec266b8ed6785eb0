"""The 33 classes: Unicode's subgroups of at least nine concepts in five groups, with names people would use.

Left out are subgroups without a common meaning ("other-object", "place-other") and "music", which overlaps with
sounds and instruments. Which classes are held out was drawn by lot, about a third of each group: the first ones
in the order of `unit_hash("held-out", subgroup)`.
"""

from __future__ import annotations

from benchmarks.files import unit_hash

GROUPS = ("animals-nature", "food-drink", "travel-places", "activities", "objects")

# subgroup -> class name
CLASS_NAMES = {
    "animal-mammal": "mammal",
    "animal-bird": "bird",
    "animal-marine": "sea animal",
    "animal-bug": "bug",
    "plant-flower": "flower",
    "plant-other": "plant",
    "food-fruit": "fruit",
    "food-vegetable": "vegetable",
    "food-prepared": "meal",
    "food-asian": "asian food",
    "food-sweet": "dessert",
    "drink": "drink",
    "place-geographic": "landscape",
    "place-building": "building",
    "transport-ground": "land vehicle",
    "transport-water": "boat",
    "transport-air": "aircraft",
    "time": "clock",
    "sky-weather": "weather",
    "event": "celebration",
    "sport": "sport",
    "game": "game",
    "clothing": "clothing",
    "sound": "sound device",
    "musical-instrument": "musical instrument",
    "computer": "computer",
    "light-video": "camera or lamp",
    "book-paper": "book",
    "money": "money",
    "mail": "mail",
    "office": "office supplies",
    "tool": "tool",
    "household": "household item",
}
HELD_OUT_PER_GROUP = {
    "animals-nature": 2,
    "food-drink": 2,
    "travel-places": 3,
    "activities": 1,
    "objects": 4,
}


def held_out_classes(group_of: dict[str, str]) -> list[str]:
    """Draws the held-out subgroups.

    Args:
        group_of: each subgroup's group.
    """
    chosen = []
    for group, count in HELD_OUT_PER_GROUP.items():
        members = [subgroup for subgroup in CLASS_NAMES if group_of.get(subgroup) == group]
        chosen += sorted(members, key=lambda subgroup: unit_hash("held-out", subgroup))[:count]
    return [subgroup for subgroup in CLASS_NAMES if subgroup in chosen]
