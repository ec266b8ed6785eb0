"""Options and output that the anchor-building sub-commands share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from arf_plugin.flags import number_type
from arf_plugin.untrusted import printable, printable_json

if TYPE_CHECKING:
    from arf_plugin.pipeline.execution import Execution
    from arf_plugin.pipeline.source import Source
    from arf_plugin.pipeline.stage import Stage

_T = TypeVar("_T")
Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

positive = number_type(int, lambda value: value >= 1, "a whole number >= 1")


def add_parser(
    subparsers: Subparsers, name: str, summary: str, description: str, examples: str
) -> argparse.ArgumentParser:
    """Adds a sub-command with a description and examples."""
    return subparsers.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_task_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds the flags that name task data, called as open_clip calls them; ``--task-data`` is an older spelling."""
    add = parser.add_argument_group("task data").add_argument
    data = "WebDataset tars with braces and ::, or a CSV/TSV file; as for open_clip"
    add("--train-data", "--task-data", dest="task_data", required=required, metavar="DATA", help=data)
    add("--dataset-type", choices=("auto", "webdataset", "csv"), default="auto")
    add("--csv-img-key", default="filepath", metavar="COLUMN", help="column of image paths")
    add("--csv-separator", default="\t", metavar="CHAR", help="default: tab, as open_clip's")


def add_device_options(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """Adds the flags of stages that run a model."""
    add = parser.add_argument_group("device").add_argument
    add("--batch-size", type=positive, default=batch_size, metavar="N", help="default: %(default)s")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:N")
    precision = "auto: fp16 on a GPU, fp32 on the CPU"
    add("--precision", choices=("auto", "fp32", "fp16", "bf16"), default="auto", help=precision)
    add("--workers", type=int, default=2, metavar="N", help="threads that decode images (%(default)s)")


def add_run_options(parser: argparse.ArgumentParser, restart_stages: Collection[str] = ()) -> None:
    """Adds the flags of every stage; ``--restart`` takes the name of a stage where there are several."""
    add = parser.add_argument_group("run").add_argument
    add(
        "--dry-run",
        action="store_true",
        help="print the plan, with time, memory and disk after a trial of seconds, and stop",
    )
    if restart_stages:
        stages = "throw earlier work away: all of it, or that of a stage and those after it"
        add("--restart", nargs="?", const="all", choices=restart_stages, help=stages)
    else:
        add("--restart", action="store_true", help="throw earlier work in --out away")
    bad = "stop if more than this fraction of the samples is rejected (default: %(default)s)"
    add("--max-bad-fraction", type=float, default=0.01, metavar="F", help=bad)
    add("--json", action="store_true", help="print the summary as JSON")
    add("--quiet", action="store_true", help="print the summary alone: no progress, no notes")
    processes = (
        "share the work between N processes on this machine, without torchrun or SLURM (default: %(default)s)"
    )
    add("--processes", type=positive, default=1, metavar="N", help=processes)


def part_or_source(text: str) -> float | str:
    """Type of ``--val``: a part from 0 to 1, or a source of images."""
    try:
        part = float(text)
    except ValueError:
        return text
    if not 0 <= part < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a part from 0 to 1, or a source of images")
    return part


def byte_size(text: str) -> int:
    """Type of a flag that takes a number of bytes, such as ``500M`` or ``1.5G`` (powers of 1024)."""
    number, unit = text[:-1], text[-1:].upper()
    try:
        return int(float(number) * 1024 ** ("KMGT".index(unit) + 1)) if unit in "KMGT" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 500M or 4G") from None


def execution(args: argparse.Namespace) -> Execution:
    """How to execute, from the command line and the environment's ranks."""
    from arf_plugin.cli.processes import is_child
    from arf_plugin.pipeline.execution import Execution, ranks

    rank, world = ranks()
    on_this_node = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    names = ("device", "workers", "batch_size", "max_bad_fraction")
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return Execution(rank, world, on_this_node, restart=bool(args.restart) and not is_child(), **given)


def from_args(kind: type[_T], args: argparse.Namespace, **others: Any) -> _T:
    """A data class whose fields are called as their flags; those that are not are given by name."""
    names = {field.name for field in fields(kind)} - set(others)  # type: ignore[arg-type]
    return kind(**others, **{name: getattr(args, name) for name in names})


def task_source(args: argparse.Namespace) -> Source:
    """Opens task data, having checked that its ids are unique."""
    from arf_plugin.anchors.task import expand_urls, is_csv, require_files, scan_task_ids
    from arf_plugin.console import progress
    from arf_plugin.errors import TaskDataError
    from arf_plugin.pipeline.source import CsvSource, TarSource

    csv = is_csv(args.task_data, args.dataset_type)
    require_files(args.task_data, csv=csv)
    if csv:
        return CsvSource(args.task_data, args.csv_img_key, args.csv_separator)
    with progress("task data", "shards") as bar:
        scan_task_ids(args.task_data, args.dataset_type, advance=lambda url: bar.update())
    return TarSource(expand_urls(args.task_data), TaskDataError)


def execute(stage: Stage, args: argparse.Namespace) -> int:
    """Runs a stage, or shows its plan, and prints what came of it."""
    from arf_plugin.cli import processes
    from arf_plugin.pipeline.estimate import estimate, readable
    from arf_plugin.pipeline.runner import describe, restart, run_stage

    if args.dry_run:
        plan = describe(stage) | estimate(stage, execution(args))
        show(plan if args.json else readable(plan), args.json, "plan")
        return 0
    if processes.wanted(args):
        if args.restart:
            restart(stage)
        processes.share(args)
        args.restart = False  # what is left is to finalize, if the last process has not, and to tell
    show(run_stage(stage, execution(args)), args.json, "done")
    return 0


def show(summary: dict[str, Any], as_json: bool, title: str) -> None:
    """Prints a summary on standard output: JSON for machines, else one line per entry."""
    if as_json:
        print(printable_json(summary, indent=2))
        return
    print(f"{title}:")
    for key, value in summary.items():
        text = printable(str(value) if isinstance(value, (str, int, float)) else printable_json(value))
        print(f"  {key:<16} {text if len(text) <= 200 else text[:200] + ' ...'}")
    sys.stdout.flush()
