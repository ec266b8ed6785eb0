"""Reads a grid's file, and those that it extends, and checks it before anything runs.

Files are read to plain values (:mod:`arf_plugin.plain_yaml`: no Python objects), each of which knows its file and line,
so that every complaint names them. Beyond YAML, ``${name}`` in a text is replaced by a variable, and a key that occurs
twice is an error rather than the last one winning.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from arf_plugin.ablation.config import Grid, merge
from arf_plugin.errors import GridError
from arf_plugin.plain_yaml import read
from arf_plugin.validation import Location, placed, shown, validated

CONFIGS = Path(__file__).parent / "configs"
LARGEST_TEXT = 1 << 20  # characters, variables filled in
_VARIABLE = re.compile(r"\$\{([^}]*)\}")
# Entry by entry where a grid extends another.
_MERGED = ("variables", "task", "trainer", "evaluation", "anchors")


def ready() -> dict[str, Path]:
    """The grids that come with the package, by name."""
    return {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}


def load_grid(name_or_path: str, out: Path, settings: Mapping[str, str] | None = None) -> Grid:
    """Reads a grid.

    Args:
        name_or_path: A ready grid's name, or a YAML file.
        out: The folder of the grid's results; ``${grid}`` in the file.
        settings: Values of variables in place of the file's.

    Raises:
        GridError: With file, line and key of what cannot be.
    """
    files = [_File(name_or_path)]
    while (base := files[-1].values.get("extends")) is not None:
        if len(files) > 8:
            raise files[-1].error(("extends",), "more than eight files extend each other; is there a circle?")
        files.append(_File(str(base)))
    return _Reader(files, out, settings or {}).grid()


class _File:
    """One file: plain values, and the line of each."""

    def __init__(self, name_or_path: str) -> None:
        known = ready()
        path = known.get(name_or_path, Path(name_or_path))
        if not path.is_file():
            raise GridError(
                f"There is no grid '{name_or_path[:200]}'. Expected a YAML file, or one of: {', '.join(known)}."
            )
        self.name = path.name if name_or_path in known else name_or_path
        self.values, self.place = read(path, self.name, "a grid", GridError)
        if self.values is None:
            raise GridError(f"{self.name} is empty. Expected a grid; `arf ablate --list` names ready ones.")
        if not isinstance(self.values, dict):
            raise self.error((), f"found {shown(self.values)}, expected a mapping (key: value).")

    def error(self, location: Location, message: str) -> GridError:
        """An error about a value, to be raised."""
        return _error(self.place(location), location, message)


class _Reader:
    """Brings a file, and those that it extends, to one grid."""

    def __init__(self, files: list[_File], out: Path, settings: Mapping[str, str]) -> None:
        self.files, self.out = files, out
        self.top: dict[str, Any] = {}
        self.sources: dict[Location, tuple[_File, Location]] = {}  # of what was taken from other files
        self.known_arms: dict[str, tuple[Any, _File, int]] = {}
        for file in reversed(files):
            for name, value in file.values.items():
                known = self.top.get(name, {})
                if name in _MERGED and isinstance(value, dict) and isinstance(known, dict):
                    self.sources |= {(name, key): (file, (name, key)) for key in value}
                    value = {**known, **value}
                self.top[name] = value
                self.sources[(name,)] = (file, (name,))
            listed = file.values.get("arms")
            for index, arm in enumerate(listed if isinstance(listed, list) else ()):
                if isinstance(arm, dict) and isinstance(arm.get("name"), str):
                    self.known_arms[arm["name"]] = (arm, file, index)
        self.variables: dict[str, str | None] = {"grid": str(out)}
        self._set_variables(settings)
        self._fill()

    def locate(self, location: Location) -> str:
        """File and line of a value of the whole grid."""
        for size in (2, 1):
            if location[:size] in self.sources:
                file, moved = self.sources[location[:size]]
                return file.place((*moved, *location[size:]))
        return self.files[0].place(())

    def error(self, location: Location, message: str) -> GridError:
        """An error about a value, to be raised."""
        return _error(self.locate(location), location, message)

    def grid(self) -> Grid:
        """The whole grid, checked; every arm with its complete flags."""
        grid = validated(Grid, self.top, self.files[0].name, GridError, locate=self.locate)
        if (mistake := next(self._mistakes(grid), None)) is not None:
            raise self.error(*mistake)
        arms = []
        for index, arm in enumerate(grid.arms):
            flags = arm.probe if arm.probe is not None else {**grid.trainer, **arm.flags}
            change: dict[str, Any] = {"flags": merge({}, flags) if arm.is_trained else {}}
            change["label"] = arm.label or arm.name
            if "choice" not in arm.model_fields_set and arm.is_trained and not arm.is_probe:
                change["choice"] = grid.choose
            arms.append(arm.model_copy(update=change))
            arms[-1]._where = f"{self.locate(('arms', index))}, arms[{index}]"
        return grid.model_copy(update={"arms": tuple(arms)})

    def _set_variables(self, settings: Mapping[str, str]) -> None:
        declared = self.top.get("variables", {})
        for name, value in declared.items() if isinstance(declared, dict) else ():
            if isinstance(value, (dict, list)):
                raise self.error(("variables", name), "a variable stands for a text, expected one.")
            value = str(value).lower() if isinstance(value, bool) else value
            self.variables[name] = settings.get(name, value)
        known = [*self.variables][1:]
        for name in settings:
            if name not in known:
                has = f"has no such variable (known: {', '.join(known) or 'none'})."
                raise GridError(f"--set {name}=...: {self.files[0].name} {has}")

    def _fill(self) -> None:
        """Fills variables in, and brings what has a short form to its long one."""
        top = self.top
        for name in ("task", "evaluation"):
            if isinstance(top.get(name), dict):
                top[name] = {key: value for key, value in top[name].items() if value is not None}
        for name in top.keys() - {"variables", "extends", "anchors", "arms"}:
            top[name] = self._filled(top[name], (name,), self.variables)
        if isinstance(top.get("anchors"), dict):
            top["anchors"] = {name: self._anchors(name, value) for name, value in top["anchors"].items()}
        if "arms" in top:
            listed = top["arms"] if isinstance(top["arms"], list) else [top["arms"]]
            top["arms"] = [self._arm(("arms", index), value) for index, value in enumerate(listed)]

    def _anchors(self, name: str, value: Any) -> Any:
        folder, location = self.out / "anchors" / name, ("anchors", name)
        filled = self._filled(value, location, {**self.variables, "out": str(folder)})
        if isinstance(filled, str):
            return {"name": name, "path": filled}
        if not isinstance(filled, dict):
            raise self.error(location, f"found {shown(filled)}, expected a path, or how the set is built.")
        for key in filled:
            if key not in ("captions", "build"):
                raise self.error((*location, key), "unknown key. Expected one of: captions, build.")
        if not filled:
            text = "found neither 'build' nor 'captions', expected one of them, or a path."
            raise self.error(location, text)
        return {**filled, "name": name, "path": folder}

    def _arm(self, location: Location, value: Any) -> Any:
        if isinstance(value, str):
            name = self._filled(value, location, self.variables)
            if name not in self.known_arms:
                raise self.error(location, _unknown(name, self.known_arms))
            value, file, index = self.known_arms[name]
            self.sources[location] = (file, ("arms", index))
        return self._filled(value, location, self.variables)

    def _filled(self, value: Any, location: Location, variables: Mapping[str, str | None]) -> Any:
        if isinstance(value, dict):
            return {key: self._filled(item, (*location, key), variables) for key, item in value.items()}
        if isinstance(value, list):
            return [self._filled(item, (*location, index), variables) for index, item in enumerate(value)]
        if not isinstance(value, str):
            return value
        names = _VARIABLE.findall(value)
        for name in names:
            if name not in variables:
                known = ", ".join(variables)
                raise self.error(location, f"${{{name}}} is not a variable (known: {known}). "
                                 "Declare it under 'variables', or correct the name.")  # fmt: skip
            if variables[name] is None:
                raise self.error(location, f"${{{name}}} has no value. Give one with: --set {name}=VALUE")
        if sum(len(variables[name] or "") for name in names) > LARGEST_TEXT:
            text = f"with its variables filled in this has more than {LARGEST_TEXT} characters."
            raise self.error(location, text)
        return _VARIABLE.sub(lambda match: variables[match[1]] or "", value)

    def _mistakes(self, grid: Grid) -> Iterator[tuple[Location, str]]:
        """What entries of the file are to one another and must not be."""
        names = [arm.name for arm in grid.arms]
        merged = {f"{name}+{method}" for name in names for method in grid.merge}
        no_validation = grid.evaluation.validation is None
        if grid.task.templates is not None and grid.task.classnames is None:
            yield ("task", "templates"), "templates need class names to fill in: give 'classnames', too."
        if grid.wise.by is not None and no_validation:
            yield ("wise", "by"), "alphas are chosen on validation sets, but 'evaluation' names none."
        unjudged = "a choice is made on validation sets, but 'evaluation' names none."
        if grid.choose is not None and no_validation:
            yield ("choose",), unjudged
        if twice := [name for name in names if name in merged]:
            yield ("merge",), f"the arm '{twice[0]}' has the name of another one's merged seeds."
        if grid.merge and len(grid.seeds) < 2:
            yield ("merge",), "an arm's seeds are merged, but 'seeds' has one. Give two or more."
        if grid.reference is not None and grid.reference not in names:
            yield ("reference",), _unknown(grid.reference, names)
        sets = list(grid.anchors)
        for index, (name, chosen) in enumerate(grid.anchors.items()):
            if chosen.captions is not None and chosen.captions not in sets[:index]:
                yield ("anchors", name, "captions"), _unknown(chosen.captions, sets[:index])
        if (count := sum(not arm.is_trained for arm in grid.arms)) != 1:
            yield (
                ("arms",),
                f"found {count} arms of kind 'before', expected exactly one: the model before fine-tuning, which "
                "the others are compared with and WiSE-FT mixes them with.",
            )
        probes = [arm.name for arm in grid.arms if arm.is_probe]
        for index, arm in enumerate(grid.arms):
            here: Location = ("arms", index)
            if (other := names.index(arm.name)) != index:
                yield here, f"another arm is called '{arm.name}' ({self.locate(('arms', other))})."
            fields = ("anchors", "flags", "choice", "mix", "probe", "head")
            given = [name for name in fields if name in arm.model_fields_set]
            if not arm.is_trained and given:
                key = given[0].replace("choice", "choose")
                yield (*here, key), f"the arm of kind 'before' is not trained, so it takes no '{key}'."
            if arm.is_probe and "flags" in given:
                yield (*here, "flags"), "a probe takes its options under 'probe', not under 'flags'."
            if arm.anchors is not None and arm.anchors not in sets:
                yield (*here, "anchors"), _unknown(arm.anchors, sets)
            if arm.anchors is None and arm.mix is not None:
                yield (*here, "mix"), "mixing needs pairs: name an anchor set with 'anchors'."
            if arm.choice is not None and no_validation:
                yield (*here, "choose"), unjudged
            if arm.head is not None and arm.head not in probes:
                listed = ", ".join(probes) or "none"
                yield here, f"head '{arm.head}' is no probe arm of this grid (probes: {listed})."


def _unknown(name: str, known: Collection[str]) -> str:
    return f"found '{name[:80]}', expected one of: {', '.join(known) or 'none'}."


def _error(place: str, location: Location, message: str) -> GridError:
    return GridError(placed(place, location, message))
