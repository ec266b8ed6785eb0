"""Reads a grid's file, and those that it extends, and checks it before anything runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from arf_plugin.ablation.config import AnchorSet, Arm, Choice, Evaluation, Grid, Task, merge
from arf_plugin.ablation.document import Value, parse
from arf_plugin.ablation.flags import Flags, read_flags
from arf_plugin.errors import GridError

CONFIGS = Path(__file__).parent / "configs"
KINDS = ("before", "baseline", "control", "arf")
BUILDERS = ("caption", "embed", "index", "retrieve", "pack", "anchors")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+]*(?:-[A-Za-z0-9._+]+)*")

_TOP = (
    *("name", "extends", "variables", "model", "pretrained", "task", "trainer", "processes", "seeds"),
    *("evaluation", "wise", "reference", "choose", "anchors", "arms"),
)
_ARM = ("name", "label", "what", "kind", "anchors", "flags", "choose", "mix", "probe", "head")
_MERGED = (
    "variables",
    "task",
    "trainer",
    "evaluation",
    "anchors",
)  # entry by entry where a grid extends another


def ready() -> dict[str, Path]:
    """The grids that come with the package, by name."""
    return {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}


def load_grid(name_or_path: str, out: Path, settings: Mapping[str, str] | None = None) -> Grid:
    """Reads a grid.

    Args:
        name_or_path: a ready grid's name, or a YAML file.
        out: the folder of the grid's results; ``${grid}`` in the file.
        settings: values of variables that replace the file's.

    Raises:
        GridError: with file, line and key of what cannot be.
    """
    return _Reader(name_or_path, out, settings or {}).grid()


class _Reader:
    """Reads one file, and those that it extends."""

    def __init__(self, name_or_path: str, out: Path, settings: Mapping[str, str]) -> None:
        self.out = out
        self.variables: dict[str, str | None] = {}
        files = [self._open(name_or_path)]
        while (base := files[-1].mapping(_TOP).get("extends")) is not None:
            if len(files) > 8:
                raise base.error("more than eight files extend each other; is there a circle?")
            files.append(self._open(base.text()))
        self.file = files[0]
        self.top: dict[str, Value] = {}
        self.sections: dict[str, dict[str, Value]] = {name: {} for name in _MERGED}
        self.known_arms: dict[str, Value] = {}
        for file in reversed(files):
            entries = file.mapping(_TOP)
            for name in _MERGED:
                if name in entries:
                    self.sections[name].update(entries[name].mapping())
            if "arms" in entries:
                for arm in entries["arms"].items():
                    if arm.is_mapping:
                        self.known_arms[arm.mapping(_ARM, ("name",))["name"].text()] = arm
            self.top.update(entries)
        self._set_variables(settings)

    def _open(self, name_or_path: str) -> Value:
        known = ready()
        path = known.get(name_or_path, Path(name_or_path))
        if not path.is_file():
            raise GridError(
                f"There is no grid '{name_or_path}'. Expected a YAML file, or one of: {', '.join(known)}."
            )
        name = path.name if name_or_path in known else name_or_path
        return Value(parse(path, name), name, "", self.variables)

    def _set_variables(self, settings: Mapping[str, str]) -> None:
        self.variables["grid"] = str(self.out)
        for name, value in self.sections["variables"].items():
            if value.is_mapping or value.is_list:
                raise value.error("a variable stands for a text, expected one.")
            self.variables[name] = settings.get(name, None if value.is_null else str(value.node.value))
        for name in settings:
            if name not in self.sections["variables"]:
                raise GridError(
                    f"--set {name}=...: {self.file.file} has no such variable "
                    f"(known: {', '.join(self.sections['variables']) or 'none'})."
                )

    def grid(self) -> Grid:
        """The whole file as a grid."""
        for name in ("name", "model", "task", "trainer", "seeds", "evaluation", "arms"):
            if name not in self.top:
                raise self.file.error(f"'{name}' is missing (found: {', '.join(self.top)}).")
        anchors = self._anchors()
        common = read_flags(self.sections["trainer"])
        choice = self._choice(self.top.get("choose"))
        arms = [self._arm(value, common, anchors, choice) for value in self.top["arms"].items()]
        self._check_arms(arms)
        pretrained, reference = self.top.get("pretrained"), self.top.get("reference")
        wise, wise_by = self._wise()
        if reference is not None:
            reference.one_of([arm.name for arm in arms])
        return Grid(
            name=self.top["name"].text(),
            model=self.top["model"].text(),
            pretrained=None if pretrained is None or pretrained.is_null else pretrained.text(),
            task=self._task(),
            processes=self.top["processes"].whole(1) if "processes" in self.top else 1,
            seeds=self._seeds(),
            evaluation=self._evaluation(),
            wise=wise,
            wise_by=wise_by,
            reference=reference.text() if reference is not None else None,
            anchors=anchors,
            arms=tuple(arms),
        )

    def _task(self) -> Task:
        self.top["task"].mapping(("data", "samples", "classnames", "templates"))
        found = {name: value for name, value in self.sections["task"].items() if not value.is_null}
        if "data" not in found:
            raise self.top["task"].error("'data' is missing: the task's shards.")
        if "templates" in found and "classnames" not in found:
            raise found["templates"].error("templates need class names to fill in: give 'classnames', too.")
        return Task(
            data=found["data"].text(),
            samples=found["samples"].whole(1) if "samples" in found else None,
            classnames=found["classnames"].text() if "classnames" in found else None,
            templates=found["templates"].text() if "templates" in found else None,
        )

    def _evaluation(self) -> Evaluation:
        self.top["evaluation"].mapping(("suite", "test", "validation", "validation-split", "batch-size"))
        found = {name: value for name, value in self.sections["evaluation"].items() if not value.is_null}
        for name in ("suite", "test"):
            if name not in found:
                raise self.top["evaluation"].error(f"'{name}' is missing.")
        validation = found.get("validation")
        return Evaluation(
            suite=found["suite"].text(),
            test=found["test"].text(),
            validation=validation.text() if validation is not None else None,
            validation_split=found["validation-split"].text()
            if "validation-split" in found
            else "validation",
            batch_size=found["batch-size"].whole(1) if "batch-size" in found else 256,
        )

    def _wise(self) -> tuple[tuple[float, ...], str | None]:
        """Alphas, and the average of the validation sets that chooses among them."""
        value = self.top.get("wise")
        if value is None or value.is_null:
            return (), None
        found = value.mapping(("alphas", "by"), needed=("alphas",)) if value.is_mapping else {"alphas": value}
        if "by" in found and "validation" not in self.sections["evaluation"]:
            raise found["by"].error("alphas are chosen on validation sets, but 'evaluation' names none.")
        alphas = sorted({entry.number(0, 1) for entry in found["alphas"].items()})
        return tuple(alphas), found["by"].text() if "by" in found else None

    def _seeds(self) -> tuple[int, ...]:
        seeds = [value.whole() for value in self.top["seeds"].items()]
        if not seeds or len(set(seeds)) < len(seeds):
            raise self.top["seeds"].error(f"found {seeds}, expected one seed or more, each once.")
        return tuple(seeds)

    def _anchors(self) -> dict[str, AnchorSet]:
        sets: dict[str, AnchorSet] = {}
        for name, value in self.sections["anchors"].items():
            if not _NAME.fullmatch(name):
                raise value.error(f"'{name}' is no name of a folder: expected letters, digits and . _ - +.")
            if not value.is_mapping:
                sets[name] = AnchorSet(name, Path(value.text()))
                continue
            folder = self.out / "anchors" / name
            inner = Value(value.node, value.file, value.key, {**self.variables, "out": str(folder)})
            found = inner.mapping(("captions", "build"))
            commands = [self._command(entry) for entry in found["build"].items()] if "build" in found else []
            captions = found["captions"].one_of(list(sets)) if "captions" in found else None
            sets[name] = AnchorSet(name, folder, captions, tuple(commands))
            if not sets[name].is_built:
                raise value.error("found neither 'build' nor 'captions', expected one of them, or a path.")
        return sets

    def _command(self, value: Value) -> tuple[str, ...]:
        if value.is_list:
            words = [word.text() for word in value.items()]
        else:
            try:
                words = shlex.split(value.text())
            except ValueError as cause:
                raise value.error(f"{cause} in: {value.text()}") from None
        if words and words[0] == "arf":
            words = words[1:]
        if not words or words[0] not in BUILDERS:
            raise value.error(
                f"found '{' '.join(words[:1])}', expected a command of arf that builds anchors: {', '.join(BUILDERS)}."
            )
        return tuple(words)

    def _choice(self, value: Value | None) -> Choice | None:
        if value is None or value.is_null:
            return None
        found = value.mapping(("over", "by"), needed=("over", "by"))
        over = tuple(read_flags(entry.mapping()) for entry in found["over"].items())
        if len(over) < 2:
            raise found["over"].error(
                "a choice needs at least two candidates; put a single one into 'flags'."
            )
        if "validation" not in self.sections["evaluation"]:
            raise value.error("a choice is made on validation sets, but 'evaluation' names none.")
        return Choice(over, found["by"].text())

    def _arm(
        self, value: Value, common: Flags, anchors: Mapping[str, AnchorSet], choice: Choice | None
    ) -> Arm:
        if not value.is_mapping:
            value = self.known_arms[value.one_of(list(self.known_arms))]
        found = value.mapping(_ARM, needed=("name", "kind"))
        name = found["name"].text()
        if not _NAME.fullmatch(name):
            raise found["name"].error(
                f"found '{name}', expected a name for folders: letters, digits and . _ - +."
            )
        kind = found["kind"].one_of(KINDS)
        given = [key for key in ("anchors", "flags", "choose", "mix", "probe", "head") if key in found]
        if kind == "before" and given:
            raise found[given[0]].error(
                f"the arm of kind 'before' is not trained, so it takes no '{given[0]}'."
            )
        probe = found.get("probe")
        own = read_flags(found["flags"].mapping()) if "flags" in found else {}
        if probe is not None:
            if "flags" in found:
                raise found["flags"].error("a probe takes its options under 'probe', not under 'flags'.")
            flags = merge({}, read_flags(probe.mapping())) if probe.is_mapping else {}
        else:
            flags = merge(common, own) if kind != "before" else {}
        if "mix" in found and "anchors" not in found:
            raise found["mix"].error("mixing needs pairs: name an anchor set with 'anchors'.")
        own_choice = self._choice(found["choose"]) if "choose" in found else None
        if "choose" not in found and kind != "before" and probe is None:
            own_choice = choice
        return Arm(
            name=name,
            label=found["label"].text() if "label" in found else name,
            what=found["what"].text() if "what" in found else "",
            kind=kind,
            flags=flags,
            anchors=found["anchors"].one_of(list(anchors)) if "anchors" in found else None,
            choice=own_choice,
            mix=found["mix"].number(0.001, 0.999) if "mix" in found else None,
            probe=probe is not None,
            head=found["head"].text() if "head" in found else None,
            where=value.where,
        )

    def _check_arms(self, arms: Sequence[Arm]) -> None:
        seen: dict[str, Arm] = {}
        for arm in arms:
            if arm.name in seen:
                raise GridError(f"{arm.where}: another arm is called '{arm.name}' ({seen[arm.name].where}).")
            seen[arm.name] = arm
        before = [arm for arm in arms if not arm.is_trained]
        if len(before) != 1:
            raise self.top["arms"].error(
                f"found {len(before)} arms of kind 'before', expected exactly one: the model before fine-tuning, which "
                "the others are compared with and WiSE-FT mixes them with."
            )
        for arm in arms:
            if arm.head is not None and not (arm.head in seen and seen[arm.head].probe):
                probes = ", ".join(other.name for other in arms if other.probe) or "none"
                raise GridError(
                    f"{arm.where}: head '{arm.head}' is no probe arm of this grid (probes: {probes})."
                )
