"""``arf interpolate``: WiSE-FT, models on the line between two checkpoints: written, measured, chosen."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arf_plugin.cli import options
from arf_plugin.cli.evaluate import (
    add_data_options,
    add_device_options,
    add_run_flags,
    device_options,
    find,
    run_flags,
    warn_as,
)
from arf_plugin.errors import EvaluationError

if TYPE_CHECKING:
    from arf_plugin.evaluation.sets import EvaluationSet
    from arf_plugin.evaluation.suites import Suite
    from arf_plugin.evaluation.sweep import Choice, Line, Scores

DESCRIPTION = """\
Mixes two checkpoints, (1 - alpha) * ORIGINAL + alpha * TUNED, tensor by tensor. Writes mixtures as ordinary checkpoints
(--out, --out-folder), measures them (--suite or --data), and lets validation data choose alpha (--validation); test
data are only reported. The same command goes on where it stopped: records in --results and --validation-results are not
measured again. Images are decoded once for all alphas that are in memory together.
"""
EXAMPLES = """\
  arf interpolate original.pt logs/run/checkpoints/epoch_10.pt --alpha 0.5 --out wise.pt
  arf interpolate ViT-B-16-quickgelu@openai tuned.pt --alphas 0.25 0.5 0.75 --out-folder wise
  arf interpolate original.pt tuned.pt --alphas --model ViT-B-16-quickgelu --suite imagenet-shifts --data-root sets \\
      --results results.jsonl                                      the curve from 0 to 1 in tenths
  arf interpolate original.pt tuned.pt --alphas --model local-dir:clip --suite emojinet --data-root data/emojinet \\
      --validation --choose-by ID --results results.jsonl --out wise.pt --json wise.json
"""


def register(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the parser of ``arf interpolate``."""
    parser = options.add_parser(
        subparsers, "interpolate", "mix two checkpoints in weight space (WiSE-FT)", DESCRIPTION, EXAMPLES
    )
    add = parser.add_argument
    add("original", metavar="ORIGINAL", help="checkpoint before fine-tuning, or MODEL@PRETRAINED")
    add("tuned", type=Path, metavar="TUNED", help="checkpoint after fine-tuning")
    which = parser.add_mutually_exclusive_group().add_argument
    one = "0: ORIGINAL, 1: TUNED (default: 0.5, if nothing is measured)"
    which("--alpha", type=float, metavar="A", help=one)
    which("--alphas", type=float, nargs="*", metavar="A", help="several; without numbers 0, 0.1, ... 1")
    add("--dry-run", action="store_true", help="check the input, print the plan and stop")
    add = parser.add_argument_group("checkpoints").add_argument
    add("--out", type=Path, metavar="FILE", help="write the one alpha, or the chosen one")
    add("--out-folder", type=Path, metavar="DIR", help="write every alpha as DIR/alpha-A.pt")
    form = "in --out-folder (default: %(default)s)"
    add("--format", choices=("pt", "safetensors"), default="pt", help=form)
    add = parser.add_argument_group("measuring").add_argument
    model = "open_clip model of the checkpoints, local-dir:FOLDER or hf-hub:NAME"
    add("--model", metavar="M", help=model)
    results = "append a record per alpha and set to this JSONL file; resumes"
    add("--results", type=Path, metavar="FILE", help=results)
    add("--json", type=Path, metavar="FILE", help="write the scores and the choice to FILE")
    add_data_options(parser)
    add = parser.add_argument_group("choosing alpha").add_argument
    validation = "choose on these sets; without FOLDER on the suite's validation split"
    add("--validation", nargs="*", type=Path, metavar="FOLDER", help=validation)
    by = (
        "set or average of the validation data that chooses (default: the only set, or the suite's first average of "
        "kind id); of equal alphas the one nearer 0.5 is taken, then the smaller"
    )
    add("--choose-by", metavar="NAME", help=by)
    add("--validation-results", type=Path, metavar="FILE", help="as --results, for validation records")
    add("--only-chosen", action="store_true", help="measure the chosen alpha alone on the test sets")
    add_run_flags(parser)
    add_device_options(parser)
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class _Job:
    """The command's input, checked and opened.

    Attributes:
        args: the command line.
        first: whether this process writes and prints.
        line: the two checkpoints.
        alphas: ascending.
        size: bytes of one model.
        suite: gives averages; None for sets without a suite.
        test: sets to report on.
        validation: sets to choose on.
        by: what chooses; None if nothing does.
    """

    args: argparse.Namespace
    first: bool
    line: Line
    alphas: list[float]
    size: int
    suite: Suite | None
    test: list[EvaluationSet]
    validation: list[EvaluationSet]
    by: str | None

    def measure(
        self, alphas: list[float], sets: list[EvaluationSet], out: Path | None
    ) -> dict[float, Scores]:
        """Measures mixtures; how images are prepared depends on the name of the original's weights, if it has one."""
        from arf_plugin.evaluation.sweep import measure

        original, settings = self.args.original, device_options(self.args)
        pretrained = None if Path(original).is_file() else original.rpartition("@")[2] or None
        settings |= {"out": out, "pretrained": pretrained}
        return measure(self.line, alphas, self.args.model, sets, self.suite, **settings)

    def targets(self, choice: Choice | None = None) -> dict[Path, float]:
        """Alphas by the files to write them to."""
        args, targets = self.args, {}
        if args.out_folder:
            targets = {args.out_folder / f"alpha-{alpha:g}.{args.format}": alpha for alpha in self.alphas}
        if args.out:
            targets[args.out] = choice.alpha if choice else self.alphas[0]
        return targets


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from arf_plugin.evaluation.distributed import Processes
    from arf_plugin.files import write_json

    with Processes() as processes:  # one group for both measurements
        warn_as("arf interpolate", processes.first)
        job = _open(args, processes.first)
        if args.dry_run:
            if job.first:
                options.show(_plan(job), False, "plan")
            return 0
        names = ("original", "tuned", "model", "suite")
        summary: dict[str, Any] = {name: str(getattr(args, name) or "") or None for name in names}
        summary["alphas"] = job.alphas
        choice = _choose(job, summary) if job.by else None
        targets = job.targets(choice)
        if targets and job.first:
            _write(job, targets)
        summary["written"] = {str(path): alpha for path, alpha in targets.items()}
        if job.test:
            _report(job, summary, choice)
        if job.first and args.json:
            write_json(args.json, summary)
    return 0


def _open(args: argparse.Namespace, first: bool) -> _Job:
    from arf_plugin.evaluation.candidates import find_original
    from arf_plugin.evaluation.sets import find_sets
    from arf_plugin.evaluation.sweep import Line, check_by

    alphas = _alphas(args)
    _check(args, alphas)
    line = Line(find_original(args.original), args.tuned, args.original)
    size = line.check()
    suite, test = find(args, "test") if args.suite or args.data else (None, [])
    validation: list[EvaluationSet] = []
    if args.validation:
        sets = [found for folder in args.validation for found in find_sets(folder)]
        validation = [replace(found, split="validation") for found in sets]
    elif args.validation is not None:
        validation = find(args, "validation")[1]
    by = check_by(args.choose_by, validation, suite) if validation else None
    return _Job(args, first, line, alphas, size, suite, test, validation, by)


def _alphas(args: argparse.Namespace) -> list[float]:
    from arf_plugin.evaluation.interpolation import ALPHAS, check_alpha

    if args.alpha is not None:
        found = [args.alpha]
    elif args.alphas is not None or _measures(args):
        found = args.alphas or list(ALPHAS)
    else:
        found = [0.5]
    for alpha in found:
        check_alpha(alpha)
    return sorted(set(found))


def _measures(args: argparse.Namespace) -> bool:
    return bool(args.suite or args.data or args.validation is not None)


def _check(args: argparse.Namespace, alphas: list[float]) -> None:
    """Refuses combinations of flags that cannot work."""
    if not (_measures(args) or args.out or args.out_folder):
        raise EvaluationError(
            "Nothing to do. Name a file with --out or a folder with --out-folder to write to, or data to measure "
            "with --suite and --data-root, or with --data."
        )
    if _measures(args) and not args.model:
        raise EvaluationError(
            "Measuring needs --model, open_clip's name of the checkpoints' architecture, such as ViT-B-16-quickgelu."
        )
    if args.out and len(alphas) > 1 and args.validation is None:
        raise EvaluationError(
            f"--out takes one alpha, {len(alphas)} were given. Use --out-folder, or let --validation choose one."
        )
    if args.validation == [] and not args.suite:
        raise EvaluationError(
            "--validation without a folder means the suite's validation split: give --suite and --data-root, or name "
            "a folder of sets."
        )
    for flag in ("choose_by", "validation_results", "only_chosen"):
        if getattr(args, flag) and args.validation is None:
            raise EvaluationError(f"--{flag.replace('_', '-')} needs --validation.")


def _plan(job: _Job) -> dict[str, Any]:
    """What a run would do."""
    files = len(job.targets())
    return {
        "alphas": " ".join(f"{alpha:g}" for alpha in job.alphas),
        "model size": f"{job.size / 1e6:.1f} MB",
        "checkpoints": f"{files}, {files * job.size / 1e9:.2f} GB in all",
        "validation": _count(job.validation),
        "chosen by": job.by or "nothing",
        "test": _count(job.test),
    }


def _choose(job: _Job, summary: dict[str, Any]) -> Choice:
    from arf_plugin.evaluation import sweep

    assert job.by is not None
    found = job.measure(job.alphas, job.validation, job.args.validation_results)
    choice = sweep.choose(found, job.by)
    summary["validation"] = {f"{alpha:g}": asdict(scores) for alpha, scores in found.items()}
    summary["chosen"] = choice.as_json()
    if job.first:
        print(f"validation, {_count(job.validation)}:\n{sweep.table(found, choice.alpha)}")
        ties = ", ".join(f"{alpha:g}" for alpha in choice.tied)
        print(f"chosen by {choice.by}: alpha {choice.alpha:g} ({choice.value:.2f})", end="")
        print(f"; as good: {ties}, and the rule is: {sweep.TIES}" if ties else "", flush=True)
    return choice


def _write(job: _Job, targets: dict[Path, float]) -> None:
    from arf_plugin.console import progress
    from arf_plugin.evaluation.checkpoints import open_checkpoint
    from arf_plugin.evaluation.interpolation import write_mixtures

    original, tuned = open_checkpoint(job.line.original), open_checkpoint(job.line.tuned)
    with progress("interpolate", "checkpoints", len(targets)) as bar:
        write_mixtures(original, tuned, targets, bar.update, run_flags(job.args))
    for path in targets:
        print(path)


def _report(job: _Job, summary: dict[str, Any], choice: Choice | None) -> None:
    from arf_plugin.evaluation import sweep

    alphas = [choice.alpha] if choice and job.args.only_chosen else job.alphas
    found = job.measure(alphas, job.test, job.args.results)
    summary["test"] = {f"{alpha:g}": asdict(scores) for alpha, scores in found.items()}
    if not job.first:
        return
    print(f"test, {_count(job.test)}:\n{sweep.table(found, choice.alpha if choice else None)}")
    if choice:
        scores = found[choice.alpha]
        values = (scores.averages or scores.sets).items()
        print(f"test at alpha {choice.alpha:g}: {', '.join(f'{name} {value:.2f}' for name, value in values)}")


def _count(sets: list[EvaluationSet]) -> str:
    return f"{len(sets)} sets, {sum(dataset.images for dataset in sets)} images" if sets else "none"
