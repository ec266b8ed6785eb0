"""How a run saw its images and texts: what a checkpoint must be measured with, and does not hold itself.

The trainer writes its arguments into ``LOGS/NAME/params.txt``, two levels above ``checkpoints/epoch_N.pt``, one
``name: value`` a line. Some of them change the model beside its weights, or how images are prepared: `Settings`. A flag
of the command line counts first, then what a checkpoint of ours tells itself (``arf interpolate`` and ``arf probe``
write it there), then ``params.txt``, then the weights that ``--pretrained`` named, and then what the model's own
configuration says.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from arf_plugin.errors import EvaluationError
from arf_plugin.untrusted import parse_json, printable, require_regular, split_lines

PARAMS = "params.txt"
_LARGEST = 1 << 20  # bytes of a params.txt; one has some thousand
_LONGEST = 1000  # characters of a value


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _three(value: Any) -> tuple[Any, ...]:
    values = _as_tuple(value)
    return values * 3 if len(values) == 1 else values


_Number = Annotated[float, Field(allow_inf_nan=False)]
_Positive = Annotated[float, Field(allow_inf_nan=False, gt=0)]
_Colours = Annotated[tuple[_Number, _Number, _Number], BeforeValidator(_three)]
_PositiveColours = Annotated[tuple[_Positive, _Positive, _Positive], BeforeValidator(_three)]
_Whole = Annotated[int, Field(ge=1, le=65536)]
_Sizes = Annotated[
    tuple[_Whole, ...],
    Field(min_length=1, max_length=2),
    BeforeValidator(_as_tuple),
    AfterValidator(lambda sizes: tuple(dict.fromkeys(sizes))),  # a square has one size
]
_INTERPOLATIONS = Literal["bicubic", "bilinear", "random"]
_RESIZE_MODES = Literal["shortest", "longest", "squash"]


def _as(expected: str) -> Any:
    return Field(description=expected)


class Settings(BaseModel):
    """Arguments of the trainer that change how a model sees images and texts; None leaves it to the model."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    image_mean: Annotated[_Colours | None, _as("three numbers")] = None
    image_std: Annotated[_PositiveColours | None, _as("three numbers above 0")] = None
    image_interpolation: Annotated[_INTERPOLATIONS | None, _as("one of bicubic, bilinear, random")] = None
    image_resize_mode: Annotated[_RESIZE_MODES | None, _as("one of shortest, longest, squash")] = None
    force_image_size: Annotated[_Sizes | None, _as("one or two whole numbers of pixels")] = None
    force_quick_gelu: Annotated[bool | None, _as("True or False")] = None
    force_custom_text: Annotated[bool | None, _as("True or False")] = None
    force_context_length: Annotated[_Whole | None, _as("a whole number of tokens")] = None

    def given(self) -> dict[str, Any]:
        """What is not left to the model, by name. A switch that is off is what the model has."""
        return {name: value for name, value in vars(self).items() if value not in (None, False)}

    def over(self, other: Settings) -> Settings:
        """These, and what they leave open from others."""
        return other.model_copy(update=self.model_dump(exclude_none=True))

    def flags(self) -> str | None:
        """As the trainer's flags; equal settings are equal texts. None if all is left to the model."""
        words: list[str] = []
        for name, value in self.given().items():
            words.append(f"--{name.replace('_', '-')}")
            words += [] if value is True else map(str, _as_tuple(value))
        return " ".join(words) or None

    def arguments(self) -> dict[str, Any]:
        """As ``open_clip.create_model_and_transforms`` takes them."""
        found = self.given()
        size = found.get("force_image_size")
        if size is not None and len(size) == 1:
            found["force_image_size"] = size[0]
        return found


def settings_of(values: Mapping[str, Any], where: str, but: Settings | None = None) -> Settings:
    """Settings of plain values by name; other names are passed over, and None is what the model has.

    Args:
        values: from a file or a command line.
        where: that, for messages.
        but: what these give is not looked at, since it is not used.

    Raises:
        EvaluationError: naming a value that cannot be.
    """
    given = {
        name: values[name]
        for name in Settings.model_fields
        if values.get(name) is not None and (but is None or getattr(but, name) is None)
    }
    try:
        return Settings(**given)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        raise EvaluationError(
            f"{where}: {name} is {printable(str(given[name]))[:80]!r}, expected "
            f"{Settings.model_fields[name].description}. Scores depend on it: give --{name.replace('_', '-')} as the "
            "run had it."
        ) from None


@dataclass(frozen=True)
class Run:
    """What is known of the run that a checkpoint comes from: its settings, flags, and where they stand."""

    settings: Settings
    model: str | None
    pretrained: str | None
    source: Path


def read_params(path: Path, but: Settings | None = None) -> Run | None:
    """Reads a trainer's ``params.txt``, but for what `but` gives, which counts more.

    Returns:
        What it tells; None, with a warning, if it is not one of the trainer's.

    Raises:
        EvaluationError: it is one, and a value that scores depend on is damaged.
    """
    require_regular(path, EvaluationError)
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST + 1).decode("utf-8", "replace")
    except OSError as cause:
        raise EvaluationError(f"{path} cannot be read: {cause.strerror}. Scores may depend on it.") from cause
    values: dict[str, Any] = {}
    wanted = {*Settings.model_fields, "model", "pretrained"}
    for line in split_lines(text):
        name, colon, value = line.partition(": ")
        if colon and name in wanted:
            if name in values and values[name] != _literal(value):
                raise EvaluationError(
                    f"{path} has two values of {name}. Remove the line that is not the run's."
                )
            values[name] = _literal(value)
    if "model" not in values or len(text) > _LARGEST:
        warnings.warn(
            f"{path} is not the trainer's (it names no model), so nothing is known of the run's flags.",
            stacklevel=2,
        )
        return None
    return Run(
        settings_of(values, str(path), but), _text(values["model"]), _text(values.get("pretrained")), path
    )


def _literal(text: str) -> Any:
    """A value as the trainer prints it: a number, a list, None, or else a text."""
    text = text.strip()
    if len(text) <= _LONGEST:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            pass  # a name without quotes
    return text


def _text(value: Any) -> str | None:
    return None if value in (None, "") else str(value)


def find_run(path: Path, told: Any = None, but: Settings | None = None) -> Run | None:
    """Finds what is known of the run behind a checkpoint, but for what `but` gives, which counts more.

    Args:
        path: the checkpoint.
        told: what it tells itself (:attr:`arf_plugin.evaluation.checkpoints.Checkpoint.run`).
        but: settings that are known.

    Raises:
        EvaluationError: what is found is damaged.
    """
    if told is not None:
        where = f"{path} (what it tells of its run)"
        if not isinstance(told, str):
            raise EvaluationError(f"{where} is {type(told).__name__}, expected a text of JSON.")
        return Run(settings_of(parse_json(told, where, EvaluationError), where, but), None, None, path)
    for place in dict.fromkeys((path, path.resolve())):
        folders = [place.parent, *([place.parent.parent] if place.parent.name == "checkpoints" else [])]
        for folder in folders:
            if (folder / PARAMS).exists():
                return read_params(folder / PARAMS, but)
    return None


def resolve(
    path: Path, told: Any, model: str, flags: Settings, pretrained: str | None = None
) -> tuple[Settings, Run | None]:
    """How a checkpoint is to be measured, and what is known of its run.

    Args:
        path: the checkpoint.
        told: what it tells of its run.
        model: open_clip's name of the model that it is measured as.
        flags: what was asked for; it counts first.
        pretrained: the weights that it was made from, if its run does not say so.
    """
    run = find_run(path, told, flags)
    if run is None:
        return flags.over(of_pretrained(model, pretrained)), None
    if run.model is not None and not _same_model(run.model, model):
        warnings.warn(
            f"{path} was trained as --model {run.model} ({run.source}) and is measured as --model {model}.",
            stacklevel=2,
        )
    named = of_pretrained(model, run.pretrained or pretrained)
    return flags.over(run.settings).over(named), run


def of_pretrained(model: str, pretrained: str | None) -> Settings:
    """How open_clip prepares images for weights that it knows by name, where that is not how it prepares others."""
    if not pretrained or model.startswith(("local-dir:", "hf-hub:")):
        return Settings()
    from open_clip import factory
    from open_clip.pretrained import get_pretrained_cfg
    from open_clip.transform import PreprocessCfg

    known, default = get_pretrained_cfg(model.replace("/", "-"), pretrained) or {}, PreprocessCfg()
    found = {}
    for name in ("mean", "std", "interpolation", "resize_mode"):
        value = known.get(name)
        own = getattr(default, name)
        if value is not None and (tuple(value) != tuple(own) if name in ("mean", "std") else value != own):
            found[f"image_{name}"] = value
    if (
        hasattr(factory, "load_openai_model")
        and pretrained.lower() == "openai"
        and "quickgelu" not in model.lower()
    ):
        found["force_quick_gelu"] = True  # before 2.29, whatever the model is called
    return settings_of(found, f"open_clip's weights {pretrained!r}")


def _same_model(one: str, other: str) -> bool:
    if one.startswith("local-dir:") and other.startswith("local-dir:"):
        folders = [Path(name.removeprefix("local-dir:")) for name in (one, other)]
        return folders[0].name == folders[1].name or folders[0].resolve() == folders[1].resolve()
    return one.replace("/", "-") == other.replace("/", "-")


def note(run: Run | None, flags: Settings) -> str | None:
    """What a checkpoint that is made of another is to tell of the run behind both, as JSON; None for nothing.

    Values alone: no name of a model or a file, which may be another elsewhere.
    """
    way = flags
    if run is not None:
        way = flags.over(run.settings).over(of_pretrained(run.model or "", run.pretrained))
    return json.dumps(way.given(), sort_keys=True) if way.given() else None
