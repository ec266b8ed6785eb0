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
  arf report runs/ablation --out runs/ablation/report   the page with tables and figures
"""


def register(subparsers: argparse._SubParsersAction) -> None:
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
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="a YAML file, or a name from --list")
    parser.add_argument("--out", type=Path, metavar="GRID", help="folder of runs and results")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="settings",
        help="value of one of the file's variables; may be given several times",
    )
    parser.add_argument("--list", action="store_true", help="list the grids that come with the package")
    group = parser.add_argument_group("what to do")
    group.add_argument("--arms", nargs="+", metavar="ARM", help="these arms alone (default: all)")
    group.add_argument("--seeds", nargs="+", type=int, metavar="N", help="these of the grid's seeds alone")
    group.add_argument(
        "--restart",
        nargs="+",
        default=[],
        metavar="ARM",
        help="throw these arms' runs and choices away first",
    )
    group.add_argument("--dry-run", action="store_true", help="print commands, steps and cost, and stop")
    group = parser.add_argument_group("where to run")
    group.add_argument(
        "--jobs",
        type=options.positive,
        metavar="N",
        help="runs side by side (default: as many as cores or GPUs allow)",
    )
    group.add_argument(
        "--nproc-per-node",
        type=options.positive,
        metavar="N",
        help="processes, that is GPUs, of one run (default: 'processes' of the file)",
    )
    parser.add_argument("--json", action="store_true", help="print the plan, or the results, as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command; 1 if a run has failed."""
    from arf_plugin.ablation.grid import Ablation, Selection
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
        name, equals, value = entry.partition("=")
        if not equals:
            raise FlagError(f"--set {entry}: expected NAME=VALUE.")
        settings[name] = value
    grid = load_grid(args.config, args.out, settings)
    selection = Selection(args.arms, args.seeds, args.restart, args.nproc_per_node)
    ablation = Ablation(grid, args.out, selection)
    runs = [*ablation.candidates(), *ablation.finals()]
    check_flags(runs)
    if args.dry_run:
        plan(ablation, args.json)
        return 0
    return execute(ablation, args)


def execute(ablation: Ablation, args: argparse.Namespace) -> int:
    """Does what is left and prints the table."""
    from arf_plugin.ablation.launch import stop_all
    from arf_plugin.ablation.schedule import places
    from arf_plugin.ablation.table import as_text

    def end(*_: object) -> None:
        stop_all()
        sys.exit(143)

    signal.signal(signal.SIGTERM, end)
    on_cpu = all(
        arm.flags.get("device") == ("cpu",) for arm in ablation.grid.arms if arm.is_trained and not arm.probe
    )
    result = ablation.run(places(args.jobs, ablation.processes, on_cpu))
    if args.json:
        print(json.dumps({**result, "failed": ablation.failures}, indent=2, ensure_ascii=False))
    else:
        print(as_text(result))
    for name, message in ablation.failures.items():
        print(f"arf ablate: {name} failed: {message.splitlines()[0]}", file=sys.stderr)
    if ablation.failures:
        print("The same command tries what failed again, and nothing else.", file=sys.stderr)
    else:
        print(
            f"Figures: {args.out}/results.json, table.md. Page: arf report {args.out} --out {args.out}/report",
            file=sys.stderr,
        )
    return 1 if ablation.failures else 0


def check_flags(runs: Sequence[Run]) -> None:
    """Lets the trainer's own parser, and that of `arf probe`, look at every command before the first one runs.

    Raises:
        GridError: with the arm's place in the file.
    """
    from arf_plugin.ablation.flags import counts
    from arf_plugin.errors import ArfError, FlagError, GridError
    from arf_plugin.hooks.activation import check_args

    checked = set()
    for run in runs:
        command = run.command()
        if run.arm.name in checked and run.candidate is None:
            continue
        checked.add(run.arm.name)
        try:
            if run.arm.probe:
                _check_own(command[command.index("probe") :])
            else:
                args = check_args(command[command.index("open_clip_train.main") + 1 :])
                for name, count in counts(run.arm.flags).items():  # argparse takes beginnings of names, too
                    if getattr(args, name.replace("-", "_")) != count:
                        raise FlagError(f"one of its flags is short for --{name}; write '{name}'.")
        except ArfError as error:
            raise GridError(f"{run.arm.where}: arm '{run.arm.name}' cannot run: {error}") from error


def _check_own(argv: list[str]) -> None:
    from arf_plugin.cli.main import build_parser
    from arf_plugin.flags import parsing_errors

    with parsing_errors():
        build_parser().parse_args(argv)


def plan(ablation: Ablation, as_json: bool) -> None:
    """Prints what would be run, with its cost, and what is missing for it."""
    from arf_plugin.ablation.plan import missing_inputs
    from arf_plugin.ablation.runs import is_finished

    runs = ablation.planned()
    reference = next((run.images() for run in runs if run.arm.name == ablation.grid.reference), None)
    entries: list[dict[str, Any]] = []
    for run in runs:
        images = run.images()
        entries.append(
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
    anchors: list[dict[str, Any]] = [
        {"name": chosen.name, "out": str(chosen.path), "captions": chosen.captions, "build": chosen.build}
        for chosen in ablation.anchor_sets()
    ]
    missing = missing_inputs(runs)
    result = {"grid": ablation.grid.name, "anchors": anchors, "runs": entries, "missing": missing}
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return
    for entry in anchors:
        print(f"# anchors {entry['name']}: {entry['out']}")
        for words in entry["build"]:
            print(f"arf {shlex.join(words)}")
    for entry in entries:
        print(f"# {entry['run']}: {_cost(entry)}{', finished' if entry['finished'] else ''}")
        print(shlex.join(entry["command"]))
    totals = [entry["images"] for entry in entries if not entry["finished"]]
    known = [count for count in totals if count is not None]
    print(
        f"# in all: {len(entries)} runs, {len(entries) - len(totals)} of them finished; "
        f"{sum(known):,} images to forward"
        + ("" if len(known) == len(totals) else ", and those of runs that are not known yet")
    )
    if any(entry["candidate"] is not None for entry in entries):
        print("# the winners among the candidates (ARM.N-SEED) take the place of that arm's first run")
    if missing:
        print(f"# not there yet: {', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}")


def _cost(entry: dict[str, Any]) -> str:
    if entry["images"] is None:
        return "steps not known: the task data is not there and has no 'samples'"
    relative = f" ({entry['relative']:g} x the reference)" if entry["relative"] else ""
    return f"{entry['steps']} steps, {entry['images']:,} images{relative}"
