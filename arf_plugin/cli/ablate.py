"""``arf ablate``: a grid of arms and seeds through the real trainer, to a table."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arf_plugin.cli import options

if TYPE_CHECKING:
    from arf_plugin.ablation.grid import Ablation
    from arf_plugin.ablation.plan import Run

EXAMPLES = """\
  arf ablate --list                                     grids that come with the package
  arf ablate emojinet --out runs/ablation --dry-run     commands, steps and cost, nothing else
  arf ablate emojinet --out runs/ablation               again: goes on where it stopped
  arf ablate emojinet --out runs/ablation --arms flyp arf --seeds 0 --jobs 2
  arf ablate my-grid.yaml --set data=/data/mine --out runs/mine
  arf ablate my-grid.yaml --out runs/mine --restart arf after a change of that arm's settings
  arf report runs/ablation --out runs/ablation/report   the page with tables and plots
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the parser of ``arf ablate``."""
    parser = options.add_parser(
        subparsers,
        "ablate",
        "run a grid of arms and seeds through the trainer, to a table",
        "Builds the anchor sets a grid needs, chooses open hyper-parameters on validation sets, trains every arm with\n"
        "every seed (torchrun -m open_clip_train.main ...), evaluates all of it, also mixed with the model before\n"
        "(WiSE-FT), and writes a table. What is finished is skipped; a failed run lets the others finish.",
        EXAMPLES,
    )
    add = parser.add_argument
    add("config", nargs="?", metavar="CONFIG", help="a YAML file, or a name from --list")
    add("--out", type=Path, metavar="GRID", help="folder of runs and results")
    text = "value of one of the file's variables; may be given several times"
    add("--set", action="append", default=[], metavar="NAME=VALUE", dest="settings", help=text)
    add("--list", action="store_true", help="list the grids that come with the package")
    add("--json", action="store_true", help="print the plan, or the results, as JSON")
    add = parser.add_argument_group("what to do").add_argument
    add("--arms", nargs="+", metavar="ARM", help="these arms alone (default: all)")
    add("--seeds", nargs="+", type=int, metavar="N", help="these of the grid's seeds alone")
    text = "throw these arms' runs and choices away first"
    add("--restart", nargs="+", default=[], metavar="ARM", help=text)
    add("--dry-run", action="store_true", help="print commands, steps and cost, and stop")
    add = parser.add_argument_group("where to run").add_argument
    text = "runs side by side (default: as many as cores or GPUs allow)"
    add("--jobs", type=options.positive, metavar="N", help=text)
    text = "processes, that is GPUs, of one run (default: 'processes' of the file)"
    add("--nproc-per-node", type=options.positive, metavar="N", help=text)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command; 1 if a run has failed."""
    from arf_plugin.ablation.grid import Ablation
    from arf_plugin.ablation.reader import load_grid, ready
    from arf_plugin.errors import FlagError

    if args.list:
        for name, path in ready().items():
            print(f"{name:<22} {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")
        return 0
    if args.config is None or args.out is None:
        raise FlagError("CONFIG and --out are needed. Ready grids: arf ablate --list")
    settings = {}
    for entry in args.settings:
        name, equals, settings[name] = entry.partition("=")
        if not equals:
            raise FlagError(f"--set {entry}: expected NAME=VALUE.")
    grid = load_grid(args.config, args.out, settings)
    ablation = Ablation(grid, args.out, args.arms, args.seeds, args.restart, args.nproc_per_node)
    check_flags([*ablation.candidates(), *ablation.finals()])
    if args.dry_run:
        plan(ablation, args.json)
        return 0
    return execute(ablation, args)


def execute(ablation: Ablation, args: argparse.Namespace) -> int:
    """Does what is left and prints the table."""
    from arf_plugin.ablation.launch import stop_all
    from arf_plugin.ablation.runs import places
    from arf_plugin.ablation.table import as_text

    def end(*_: object) -> None:
        stop_all()
        sys.exit(143)

    signal.signal(signal.SIGTERM, end)
    on_cpu = all(arm.flags.get("device") == ("cpu",) for arm in ablation.grid.arms if arm.is_mixable)
    result = ablation.run(places(args.jobs, ablation.processes, on_cpu))
    failed, out = ablation.failures, args.out
    print(
        json.dumps({**result, "failed": failed}, indent=2, ensure_ascii=False)
        if args.json
        else as_text(result)
    )
    for name, message in failed.items():
        print(f"arf ablate: {name} failed: {message.splitlines()[0]}", file=sys.stderr)
    last = f"Scores: {out}/results.json, table.md. Page: arf report {out} --out {out}/report"
    if failed:
        last = "The same command tries what failed again, and nothing else."
    print(last, file=sys.stderr)
    return 1 if failed else 0


def check_flags(runs: Sequence[Run]) -> None:
    """Lets the trainer's own parser, and that of `arf probe`, look at every command before the first one runs.

    Raises:
        GridError: with the arm's place in the file.
    """
    from arf_plugin.ablation.config import COUNTS
    from arf_plugin.cli.main import build_parser
    from arf_plugin.errors import ArfError, FlagError, GridError
    from arf_plugin.flags import parsing_errors
    from arf_plugin.hooks.activation import check_args

    checked = set()
    for run in runs:
        command = run.command()
        if run.arm.name in checked and run.candidate is None:
            continue
        checked.add(run.arm.name)
        try:
            if run.arm.is_probe:
                with parsing_errors():
                    build_parser().parse_args(command[command.index("probe") :])
            else:
                args = check_args(command[command.index("open_clip_train.main") + 1 :])
                for name in COUNTS:  # argparse takes beginnings of names, too
                    if getattr(args, name.replace("-", "_")) != run.count(name):
                        raise FlagError(f"one of its flags is short for --{name}; write '{name}'.")
        except ArfError as error:
            raise GridError(f"{run.arm.where}: arm '{run.arm.name}' cannot run: {error}") from error


def plan(ablation: Ablation, as_json: bool) -> None:
    """Prints what would be run, with its cost, and what is missing for it."""
    from arf_plugin.ablation.plan import missing_inputs
    from arf_plugin.ablation.runs import is_finished

    planned = ablation.planned()
    reference = next((run.images() for run in planned if run.arm.name == ablation.grid.reference), None)
    runs: list[dict[str, Any]] = []
    for run in planned:
        images = run.images()
        runs.append(
            {
                "run": run.name,
                "arm": run.arm.name,
                "seed": run.seed,
                "candidate": run.candidate,
                "finished": is_finished(run),
                "steps": run.steps(),
                "images": images,
                "relative": round(images / reference, 2) if images is not None and reference else None,
                "command": run.command(),
            }
        )
    anchors = [
        {"name": chosen.name, "out": str(chosen.path), "captions": chosen.captions, "build": chosen.build}
        for chosen in ablation.anchor_sets()
    ]
    missing = missing_inputs(planned)
    if as_json:
        result = {"grid": ablation.grid.name, "anchors": anchors, "runs": runs, "missing": missing}
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    for chosen in ablation.anchor_sets():
        print(f"# anchors {chosen.name}: {chosen.path}")
        for words in chosen.build:
            print(f"arf {shlex.join(words)}")
    for entry in runs:
        print(f"# {entry['run']}: {_cost(entry)}{', finished' if entry['finished'] else ''}")
        print(shlex.join(entry["command"]))
    left = [entry["images"] for entry in runs if not entry["finished"]]
    known = [count for count in left if count is not None]
    unknown = "" if len(known) == len(left) else ", and those of runs that are not known yet"
    print(
        f"# in all: {len(runs)} runs, {len(runs) - len(left)} of them finished; "
        f"{sum(known):,} images to forward{unknown}"
    )
    if any(run.candidate is not None for run in planned):
        print("# the winners among the candidates (ARM.N-SEED) take the place of that arm's first run")
    if missing:
        print(f"# not there yet: {', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}")


def _cost(entry: dict[str, Any]) -> str:
    if entry["images"] is None:
        return "steps not known: the task data is not there and has no 'samples'"
    relative = f" ({entry['relative']:g} x the reference)" if entry["relative"] else ""
    return f"{entry['steps']} steps, {entry['images']:,} images{relative}"
