"""Sentences said before the first step, and later of data that could not be looked at then."""

from __future__ import annotations

from collections.abc import Sequence


def missing_class_message(identity: str, count: int = 1) -> str:
    """Says what to do about a task sample without a class, where class prompts or a head need one."""
    others = f" (and {count - 1} more samples)" if count > 1 else ""
    return (
        f"Sample {identity} has no 'cls'{others}, which --arf-classnames needs, and no 'txt' that could be "
        "mixed in.\n"
        "Write the class index beside each image (KEY.cls, or a column 'cls' of the CSV), "
        "or drop --arf-classnames to train on the samples' own texts."
    )


def missing_caption_message(missing: Sequence[str], named: int = 1) -> str:
    """Says what to do about task samples without a caption anchor."""
    examples = ", ".join(missing[1:named]) + (" ..." if len(missing) > named else "")
    others = f" (and {len(missing) - 1} more samples{f': {examples}' if named > 1 else ''})"
    return (
        f"No caption for task sample {missing[0]}{others if len(missing) > 1 else ''}; expected one row in "
        "captions/*.parquet with that id.\n"
        "Caption the rest with `arf caption`, see what is missing with `arf check`, or train with "
        "--arf-missing-caption prompt to use the class prompt in its place."
    )


def no_features_message(what: str, count: int = 1) -> str:
    """Says what to do about anchors without features, where they are held by these."""
    others = f" (and {count - 1} more)" if count > 1 else ""
    return (
        f"{what}{others} has no features of the starting model, which --arf-pair-loss and --arf-caption-loss need.\n"
        "Was the set changed since they were written? Write them again with: "
        "arf features ANCHORS --model ... --pretrained ..."
    )


def unusable_label_message(
    identity: str, label: object, classes: int, count: int = 1, from_one: bool = False
) -> str:
    """Says what to do about a ``cls`` that is no class index."""
    others = f" (and {count - 1} more samples have such)" if count > 1 else ""
    hint = " These labels are counted from 1: subtract 1 from each." if from_one else ""
    return (
        f"Sample {identity}: cls is {label!r}{others}, expected a class index from 0 to {classes - 1} "
        f"({classes} class names were given). Use the class names of this data set.{hint}"
    )


def is_class_index(label: str, classes: int) -> bool:
    """Whether a label is a whole number from 0 to below the number of classes, in decimal and nothing else."""
    return label.isascii() and label.isdecimal() and len(label) < 10 and int(label) < classes
