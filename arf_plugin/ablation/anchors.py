"""The anchor sets that a grid makes for itself, below GRID/anchors."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from arf_plugin.ablation.config import AnchorSet, Grid
from arf_plugin.ablation.launch import ARF, last_lines, run_logged
from arf_plugin.errors import GridError
from arf_plugin.files import list_files, replacing, write_json
from arf_plugin.untrusted import read_json


def build(grid: Grid, chosen: AnchorSet, say: Callable[[str], object]) -> None:
    """Makes an anchor set, unless it is there; the stages of `arf` resume by themselves. `say` tells the user.

    Raises:
        GridError: a command failed, with the end of its log; or the set was built by other commands.
    """
    marker = chosen.path / "built.json"
    recipe = {"captions": chosen.captions, "build": [list(words) for words in chosen.build]}
    if marker.exists():
        before = read_json(marker, GridError, advice="Remove the file to build the set again.")
        if before != recipe:
            raise GridError(
                f"The anchor set {chosen.path} was built by other commands than the grid has now:\n"
                f"  before: {_text(before)}\n  now:    {_text(recipe)}\n"
                f"Remove that folder to build it again, or call the new set something else than '{chosen.name}'."
            )
        return
    for words in chosen.build:
        say(f"anchors {chosen.name}: arf {shlex.join(words)}")
        log = chosen.path / "build.log"
        if run_logged([*ARF, *words], log, environment={"OMP_WAIT_POLICY": "passive"}):
            raise GridError(
                f"The anchor set '{chosen.name}' could not be built; the end of {log}:\n{last_lines(log)}"
            )
    if chosen.captions is not None:
        _copy_captions(grid.anchors[chosen.captions].path, chosen.path)
    if not list_files(chosen.path / "captions", ".parquet") and not list_files(chosen.path / "pairs", ".tar"):
        raise GridError(
            f"The commands of anchor set '{chosen.name}' left neither captions/*.parquet nor pairs/*.tar in "
            f"{chosen.path}; the last one should end in: --out ${{out}}"
        )
    write_json(marker, recipe)


def needed(grid: Grid, names: set[str]) -> list[AnchorSet]:
    """The sets that must be made for some, in order: those whose captions others take come first."""
    wanted = set(names)
    for name in reversed(list(grid.anchors)):  # a set takes captions from an earlier one
        captions = grid.anchors[name].captions
        if name in wanted and captions is not None:
            wanted.add(captions)
    return [chosen for name, chosen in grid.anchors.items() if name in wanted and chosen.is_built]


def _copy_captions(source: Path, target: Path) -> None:
    files = list_files(source / "captions", ".parquet")
    if not files:
        raise GridError(f"{source} has no captions/*.parquet to take over into {target}.")
    for file in files:
        with replacing(target / "captions" / file.name) as temporary:
            shutil.copyfile(file, temporary)


def _text(recipe: Mapping[str, object]) -> str:
    build = recipe.get("build")
    commands = [f"arf {shlex.join(map(str, words))}" for words in build] if isinstance(build, list) else []
    return "; ".join([*commands, *((f"captions of {recipe['captions']}",) if recipe.get("captions") else ())])
