"""Runs a grid on several pretrained models of a benchmark; scripts/benchmarks/grid.sh starts it."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arf_plugin.ablation.launch import cpu_threads
from arf_plugin.cli.main import main as arf
from benchmarks.download import DownloadError
from benchmarks.files import read_json, write_json
from benchmarks.pretrain import TOWERS, Benchmark, benchmark, build, make_anchors, minutes, pretrain
from benchmarks.recipe import THREADS
from benchmarks.summary import KEPT, finished, keep
from benchmarks.trainer import TrainingError, call, stop_all

GRIDS = Path(__file__).resolve().parent.relative_to(Path.cwd()) / "grids"
# What `--arms main` stands for: the arms that many pretrained models are worth.
MAIN = ("before", "flyp", "distill", "arf", "feature", "together")
# On two idle cores, for estimates alone: images a second of two runs side by side, the same without gradients, and
# seconds that a run takes to start.
TRAINED, EVALUATED, START = 320, 1500, 8
ALPHAS = 4  # checkpoints that an arm is evaluated as: fine-tuned, and three alphas


class Plan:
    """What is to be run.

    Args:
        bench: the benchmark.
        out: the folder of its models.
        args: the command line.
    """

    def __init__(self, bench: Benchmark, out: Path, args: argparse.Namespace) -> None:
        self.bench, self.out, self.args = bench, out, args
        self.grid = GRIDS / f"{bench.name}{'' if args.grid == 'all' else '-' + args.grid}.yaml"
        self.models = [(tower, number) for tower in args.towers for number in range(args.start, args.models)]

    def folder(self, tower: str, number: int) -> Path:
        """Where a model's results go."""
        return self.out / f"{tower}-{number}" / self.args.grid

    def first(self, tower: str) -> Path:
        """The grid of a tower's first model, which others take hyper-parameters from: here, or where it is kept."""
        here = self.folder(tower, 0)
        kept = [one for one in finished(self.bench.name, self.args.grid) if one.parent.name == f"{tower}-0"]
        return here if (here / "choices.json").is_file() or not kept else kept[0]

    def ablate(self, tower: str, number: int, *more: str) -> list[str]:
        """`arf ablate` on one model."""
        arms = MAIN if self.args.arms == ["main"] else self.args.arms
        return [
            *("ablate", str(self.grid), "--out", str(self.folder(tower, number))),
            *("--set", f"data={self.bench.data}", "--set", f"run={self.out / f'{tower}-{number}'}"),
            *(("--arms", *arms) if arms else ()),
            *(("--seeds", *map(str, range(self.args.seeds))) if self.args.seeds else ()),
            *(("--jobs", str(self.args.jobs)) if self.args.jobs else ()),
            *more,
        ]

    def planned(self, tower: str, number: int) -> list[dict[str, Any]]:
        """The runs that one model still needs.

        Raises:
            TrainingError: `arf ablate` refuses the grid.
        """
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            status = arf(self.ablate(tower, number, "--dry-run", "--json"))
        if status:
            raise TrainingError(f"{self.grid} cannot be run: see above")
        runs = [run for run in json.loads(shown.getvalue())["runs"] if not run["finished"]]
        # Candidates are trained with the first model of a tower; one of them becomes the run of the first seed.
        return [run for run in runs if run["candidate"] is None or number == 0]

    def estimate(self) -> float:
        """Prints what all of it takes on two idle cores, in hours, and returns that."""
        numbers = list(range(self.args.start, self.args.models))
        hours = minutes(self.bench, self.args.towers, numbers, self.out) / 60
        print(f"pretraining: {hours:.1f} h")
        test = sum(read_json(self.bench.data / f"{self.bench.name}.json")["evaluation"].values())
        for tower, number in self.models:
            runs = self.planned(tower, number)
            images = sum(run["images"] or 0 for run in runs)
            final = sum(run["candidate"] is None for run in runs)
            evaluated = test * (ALPHAS * final + 0.3 * (len(runs) - final))
            time = (images / TRAINED + len(runs) * START / 2 + evaluated / EVALUATED) / 3600
            print(f"{tower}-{number}: {len(runs)} runs, {images:,} images to train on, {time:.1f} h")
            hours += time
        print(f"in all about {hours:.1f} hours on two idle cores", flush=True)
        return hours

    def run(self) -> None:
        """Runs everything."""
        pretrain(self.bench, self.out, "resnet", 0, THREADS)  # through whose eyes the captioner looks
        for tower, number in self.models:
            clip = pretrain(self.bench, self.out, tower, number, THREADS)
            make_anchors(self.bench, self.out, clip, f"{tower}-{number}")
            folder = self.folder(tower, number)
            if number:
                take_over(self.first(tower), folder)
            call(["arf", *self.ablate(tower, number)])
            call(["arf", "report", str(folder), "--out", str(folder / "report")])
            if self.args.keep:
                keep(folder, KEPT / self.bench.name / folder.parent.name / folder.name)


def take_over(first: Path, folder: Path) -> None:
    """Gives a grid the hyper-parameters that were chosen with another model; alphas stay its own."""
    known = folder / "choices.json"
    chosen = read_json(known) if known.is_file() else {"arms": {}, "wise": {}}
    if (first / "choices.json").is_file():
        arms = {**read_json(first / "choices.json")["arms"], **chosen["arms"]}
        write_json(known, {**chosen, "arms": arms})


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="grid.sh", description=__doc__)
    parser.add_argument("benchmark", choices=("emojinet", "iconnet"))
    parser.add_argument("--grid", choices=("all", "lr"), default="all", help="which grid (default: all arms)")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="these arms alone; 'main': the main ones")
    parser.add_argument(
        "--models", type=int, default=1, metavar="N", help="pretrained models of each tower (default: 1)"
    )
    parser.add_argument("--start", type=int, default=0, metavar="N", help="the first of them (default: 0)")
    parser.add_argument("--towers", nargs="+", default=list(TOWERS), choices=list(TOWERS))
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="fine-tuning seeds (default: those of the grid)"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="runs side by side (default: as cores allow)")
    parser.add_argument("--data", type=Path, help="the benchmark's folder (default: data/BENCHMARK)")
    parser.add_argument("--out", type=Path, help="folder of models and results (default: runs/BENCHMARK)")
    parser.add_argument(
        "--keep", action="store_true", help=f"copy results to {KEPT} when a model has finished"
    )
    parser.add_argument("--dry-run", action="store_true", help="the estimate alone")
    args = parser.parse_args()
    os.environ.update(cpu_threads(THREADS))
    signal.signal(signal.SIGTERM, lambda *_: (stop_all(), sys.exit(143)))
    bench = benchmark(args.benchmark, args.data)
    try:
        build(bench)
        plan = Plan(bench, args.out or Path("runs") / args.benchmark, args)
        plan.estimate()
        if not args.dry_run:
            plan.run()
    except (DownloadError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
