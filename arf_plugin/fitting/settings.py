"""What a user of `arf fit` says, on the command line, in a file, or from Python: the same names everywhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from arf_plugin.errors import FitError
from arf_plugin.validation import Strict

NONE = "none"


def seconds(text: str) -> float:
    """Seconds of a time such as ``30m``, ``2h``, ``90s`` or ``1h30m``.

    Raises:
        ValueError: It is none.
    """
    parts = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text.strip())
    if not text.strip() or parts is None:
        raise ValueError(f"{text!r} is no time. Expected 30m, 2h, 90s or 1h30m.")
    return sum(float(part or 0) * unit for part, unit in zip(parts.groups(), (3600, 60, 1), strict=True))


def _is_time(text: str) -> str:
    seconds(text)
    return text


def _plain_names(flags: dict[str, Any]) -> dict[str, Any]:
    return {name.lstrip("-").replace("-", "_"): value for name, value in flags.items()}


class FitSettings(Strict):
    """Settings of a fit; ``arf fit --help`` says what each means.

    ``model`` is ``NAME@PRETRAINED``, ``local-dir:FOLDER``, ``hf-hub:NAME``, or a checkpoint file beside ``arch``;
    ``set`` holds flags of the trainer by name, which win over what would be chosen.
    """

    images: str
    model: str
    out: str = "fit"
    arch: str | None = None
    pool: str = NONE
    captioner: str = NONE
    captioner_url: str | None = None
    captioner_prompt: str | None = None
    classnames: str | None = None
    templates: str | None = None
    val: Annotated[float, Field(gt=0, lt=1)] | str = 0.15
    keep: list[str] = Field(default=[])
    preset: Literal["recommended", "paper", "fast"] = "recommended"
    baseline: bool = False
    seeds: Annotated[int, Field(ge=1)] = 1
    jobs: Annotated[int, Field(ge=1, exclude=True)] = 1  # of no influence on what comes of it
    max_forget: Annotated[float, Field(ge=0)] | None = None
    time: Annotated[str, AfterValidator(_is_time)] | None = None
    set: Annotated[dict[str, str | int | float | bool], AfterValidator(_plain_names)] = Field(default={})
    device: str = "auto"

    def start(self) -> list[str]:
        """The flags of the starting model, which the trainer and all commands share.

        Raises:
            FitError: It is not said which weights.
        """
        if self.model.startswith(("local-dir:", "hf-hub:")):
            return ["--model", self.model]
        name, at, tag = self.model.rpartition("@")
        if at and name and tag:
            return ["--model", name, "--pretrained", tag]
        if Path(self.model).is_file():
            if self.arch is None:
                raise FitError(
                    f"{self.model} is a checkpoint; of which architecture? Name it with --arch ViT-B-16."
                )
            return ["--model", self.arch, "--pretrained", self.model]
        raise FitError(
            f"--model {self.model}: expected NAME@PRETRAINED such as ViT-B-16-quickgelu@openai, local-dir:FOLDER, "
            "hf-hub:NAME, or a checkpoint file with --arch NAME."
        )

    @property
    def architecture(self) -> str:
        """open_clip's name of the model, which checkpoints are loaded into."""
        return self.start()[1]

    @property
    def own_flags(self) -> dict[str, Any]:
        """What `set` holds, by flag, such as ``{"--batch-size": 8}``."""
        return {f"--{name.replace('_', '-')}": value for name, value in self.set.items()}

    def overrides(self) -> list[str]:
        """The flags of `set`, as the trainer takes them."""
        flags: list[str] = []
        for flag, value in self.own_flags.items():
            if value is not False:
                flags += [flag] if value is True else [flag, str(value)]
        return flags


def overrides_of(given: list[str]) -> dict[str, Any]:
    """``--set`` as given: ``NAME=VALUE``, or ``NAME`` for a flag without a value.

    Raises:
        FitError: It has no name.
    """
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not name.strip("-"):
            raise FitError(f"--set {text!r}: expected FLAG=VALUE, such as lr=1e-5.")
        found[name] = value if equals else True
    return found
