"""Flags of the trainer that change a model beside its weights, or how images are prepared: read, checked, handed on."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from arf_plugin.errors import EvaluationError
from arf_plugin.untrusted import printable

INTERPOLATIONS = ("bicubic", "bilinear", "random")
RESIZE_MODES = ("shortest", "longest", "squash")

Values = tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Arguments of the trainer that change how a model sees images and texts; None leaves it to the model.

    Attributes:
        image_mean: subtracted from pixels, for each colour.
        image_std: what they are divided by.
        image_interpolation: of resizing.
        image_resize_mode: how images become square.
        force_image_size: in pixels: one number, or height and width.
        force_quick_gelu: another activation than the model's configuration has.
        force_custom_text: weights of the text tower under other names.
        force_context_length: tokens of a text.
    """

    image_mean: Values | None = None
    image_std: Values | None = None
    image_interpolation: str | None = None
    image_resize_mode: str | None = None
    force_image_size: tuple[int, ...] | None = None
    force_quick_gelu: bool | None = None
    force_custom_text: bool | None = None
    force_context_length: int | None = None

    def given(self) -> dict[str, Any]:
        """What is not left to the model, by name. A switch that is off is what the model has."""
        return {name: value for name, value in vars(self).items() if value not in (None, False)}

    def over(self, other: Settings) -> Settings:
        """These, and what they leave open from others."""
        own = {name: value for name, value in vars(self).items() if value is not None}
        return dataclasses.replace(other, **own)

    def flags(self) -> str | None:
        """As the trainer's flags; equal settings are equal texts. None if all is left to the model."""
        return " ".join(_flag(name, value) for name, value in self.given().items()) or None

    def arguments(self) -> dict[str, Any]:
        """As ``open_clip.create_model_and_transforms`` takes them."""
        found = self.given()
        size = found.get("force_image_size")
        if size is not None:
            found["force_image_size"] = size[0] if len(size) == 1 else size
        return found


def _flag(name: str, value: Any) -> str:
    values = () if value is True else value if isinstance(value, tuple) else (value,)
    return " ".join([f"--{name.replace('_', '-')}", *map(str, values)])


class _Kind(NamedTuple):
    """What a value may be."""

    expected: str
    convert: Callable[[Any], Any]


def _colours(check: Callable[[float], bool]) -> Callable[[Any], Values]:
    def convert(value: Any) -> Values:
        values = tuple(map(_number, value if isinstance(value, list | tuple) else (value,)))
        if len(values) not in (1, 3) or not all(math.isfinite(each) and check(each) for each in values):
            raise ValueError
        return values * 3 if len(values) == 1 else values

    return convert


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError
    return float(value)


def _one_of(known: Sequence[str]) -> Callable[[Any], str]:
    def convert(value: Any) -> str:
        if value not in known:
            raise ValueError
        return str(value)

    return convert


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65536:
        raise ValueError
    return value


def _sizes(value: Any) -> tuple[int, ...]:
    values = tuple(map(_whole, value if isinstance(value, list | tuple) else (value,)))
    if len(values) == 2 and values[0] == values[1]:
        values = values[:1]
    if len(values) not in (1, 2):
        raise ValueError
    return values


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


KINDS = {
    "image_mean": _Kind("three numbers", _colours(lambda value: True)),
    "image_std": _Kind("three numbers above 0", _colours(lambda value: value > 0)),
    "image_interpolation": _Kind(f"one of {', '.join(INTERPOLATIONS)}", _one_of(INTERPOLATIONS)),
    "image_resize_mode": _Kind(f"one of {', '.join(RESIZE_MODES)}", _one_of(RESIZE_MODES)),
    "force_image_size": _Kind("one or two whole numbers of pixels", _sizes),
    "force_quick_gelu": _Kind("True or False", _switch),
    "force_custom_text": _Kind("True or False", _switch),
    "force_context_length": _Kind("a whole number of tokens", _whole),
}


def settings_of(values: Mapping[str, Any], where: str, but: Settings | None = None) -> Settings:
    """Settings of plain values by name; other names are passed over, and None is what the model has.

    Args:
        values: by name, from a file or a command line.
        where: that, for messages.
        but: what these give is not looked at, since it is not used.

    Raises:
        EvaluationError: naming a value that cannot be.
    """
    found = {}
    for name, kind in KINDS.items():
        value = values.get(name)
        if value is None or (but is not None and getattr(but, name) is not None):
            continue
        try:
            found[name] = kind.convert(value)
        except (ValueError, TypeError, OverflowError):
            raise EvaluationError(
                f"{where}: {name} is {printable(str(value))[:80]!r}, expected {kind.expected}. Figures depend on it: "
                f"give --{name.replace('_', '-')} as the run had it."
            ) from None
    return Settings(**found)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the trainer's flags that change how a model sees images and texts; :func:`of_flags` reads them."""
    group = parser.add_argument_group(
        "the run's flags",
        "As the trainer has them. By default those of the run that a checkpoint comes from: its params.txt is found\n"
        "beside checkpoints/, and a checkpoint that arf has written tells itself.",
    )
    group.add_argument("--image-mean", type=float, nargs="+", metavar="MEAN")
    group.add_argument("--image-std", type=float, nargs="+", metavar="STD")
    group.add_argument("--image-interpolation", choices=INTERPOLATIONS)
    group.add_argument("--image-resize-mode", choices=RESIZE_MODES)
    group.add_argument("--force-image-size", type=int, nargs="+", metavar="PX")
    group.add_argument("--force-quick-gelu", action=argparse.BooleanOptionalAction)
    group.add_argument("--force-custom-text", action=argparse.BooleanOptionalAction)
    group.add_argument("--force-context-length", type=int, metavar="N")
    group.add_argument("--cache-dir", metavar="DIR", help="where open_clip keeps downloaded weights")


def of_flags(args: argparse.Namespace) -> Settings:
    """The settings on a command line.

    Raises:
        EvaluationError: one cannot be.
    """
    return settings_of({name: getattr(args, name) for name in KINDS}, "The command line")
