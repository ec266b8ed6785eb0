"""How a run saw its images and texts: what a checkpoint must be measured with, and does not hold itself.

The trainer writes its arguments into ``LOGS/NAME/params.txt``, two levels above ``checkpoints/epoch_N.pt``, one
``name: value`` a line. Some of them change the model beside its weights, or how images are prepared; they are named
in :mod:`arf_plugin.evaluation.settings`. A flag of the command line counts first, then what a checkpoint of ours
tells itself (``arf interpolate`` and ``arf probe`` write it there), then ``params.txt``, then the weights that
``--pretrained`` named, and then what the model's own configuration says.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.settings import KINDS, Settings, settings_of
from arf_plugin.untrusted import parse_json, require_regular, split_lines

PARAMS = "params.txt"
_LARGEST = 1 << 20  # bytes of a params.txt; one has some thousand
_LONGEST = 1000  # characters of a value


@dataclasses.dataclass(frozen=True)
class Run:
    """What is known of the run that a checkpoint comes from.

    Attributes:
        settings: how it saw images and texts.
        model: its ``--model``.
        pretrained: its ``--pretrained``.
        source: where that stands.
    """

    settings: Settings
    model: str | None
    pretrained: str | None
    source: Path


def read_params(path: Path, but: Settings | None = None) -> Run | None:
    """Reads a trainer's ``params.txt``.

    Args:
        path: the file.
        but: settings that count more than its own.

    Returns:
        What it tells; None, with a warning, if it is not one of the trainer's.

    Raises:
        EvaluationError: it is one, and a value that figures depend on is damaged.
    """
    require_regular(path, EvaluationError)
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST + 1).decode("utf-8", "replace")
    except OSError as cause:
        raise EvaluationError(
            f"{path} cannot be read: {cause.strerror}. Figures may depend on it."
        ) from cause
    values: dict[str, Any] = {}
    wanted = {*KINDS, "model", "pretrained"}
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
    """Finds what is known of the run behind a checkpoint.

    Args:
        path: the checkpoint.
        told: what it tells itself (:attr:`arf_plugin.evaluation.tensor_files.WeightsFile.run`).
        but: settings that count more.

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
    """How a checkpoint is to be measured.

    Args:
        path: the checkpoint.
        told: what it tells of its run.
        model: open_clip's name of the model that it is measured as.
        flags: what was asked for; it counts first.
        pretrained: the weights that it was made from, if its run does not say so.

    Returns:
        The settings, and what is known of the run.
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
