"""Flags of the trainer as a grid's file has them, and as a command line has them."""

from __future__ import annotations

from collections.abc import Mapping

from arf_plugin.ablation.document import Value

# name without dashes -> its words; () for a switch, None for one that is switched off
Flags = dict[str, tuple[str, ...] | None]

# What the grid sets itself, and where it takes it from.
RESERVED = {
    "model": "the entry 'model'",
    "pretrained": "the entry 'pretrained'",
    "train-data": "'task'",
    "train-num-samples": "'task', as 'samples'",
    "train-data-upsampling-factors": "the arm's entry 'mix'",
    "dataset-type": "'task'",
    "logs": "--out",
    "name": "the arm's name and seed",
    "resume": "the grid, which resumes by itself",
    "save-frequency": "the grid, which keeps the last checkpoint",
    "delete-previous-checkpoint": "the grid, which keeps the last checkpoint",
    "seed": "'seeds'",
    "arf-anchors": "the arm's entry 'anchors'",
    "arf-classnames": "'task', as 'classnames'",
    "arf-templates": "'task', as 'templates'",
    "arf-head": "the arm's entry 'head'",
}


def read_flags(entries: Mapping[str, Value]) -> Flags:
    """Reads flags: ``true`` is a bare switch, ``false`` or nothing switches a flag off, a list gives several words.

    Raises:
        GridError: a flag with dashes before it or underscores in it, or one that the grid sets itself.
    """
    flags: Flags = {}
    for name, value in entries.items():
        if name.startswith("-") or "_" in name or name != name.lower():
            spelled = name.lstrip("-").replace("_", "-").lower()
            raise value.error(f"found the flag '{name}', expected it without dashes in front: '{spelled}'.")
        if name in RESERVED:
            raise value.error(f"--{name} is set by the grid: it comes from {RESERVED[name]}.")
        if value.is_boolean:
            flags[name] = () if value.boolean() else None
        elif value.is_null:
            flags[name] = None
        else:
            flags[name] = tuple(word.text() for word in value.items())
    return flags


def words(flags: Flags) -> list[str]:
    """The flags as a command line."""
    return [word for name, values in flags.items() if values is not None for word in (f"--{name}", *values)]


# open_clip's defaults of the flags that say how long a run is.
_COUNTS = {"epochs": 32, "batch-size": 64, "workers": 4, "accum-freq": 1}


def counts(flags: Flags) -> dict[str, int]:
    """The flags that say how long a run is, with open_clip's defaults for those that are not given."""
    return {name: number(flags, name, default) for name, default in _COUNTS.items()}


def number(flags: Flags, name: str, default: int) -> int:
    """A flag's whole number."""
    values = flags.get(name)
    return int(values[0]) if values else default
