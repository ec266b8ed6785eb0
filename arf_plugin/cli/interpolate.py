"""``arf interpolate``: WiSE-FT, models on the line between two checkpoints: written, measured, chosen."""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arf_plugin.cli import options
from arf_plugin.cli.evaluate import add_device_options, device_options, find
from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation import settings

if TYPE_CHECKING:
    from arf_plugin.evaluation.sets import EvaluationSet
    from arf_plugin.evaluation.suites import Suite
    from arf_plugin.evaluation.sweep import Choice, Figures, Line

DESCRIPTION = """\
Mixes two checkpoints, (1 - alpha) * ORIGINAL + alpha * TUNED, tensor by tensor, whatever their size. Writes mixtures as
ordinary checkpoints (--out, --out-folder), measures them (--suite or --data), and lets validation data choose alpha
(--validation); test data are only reported. The same command goes on where it stopped: rows in --results and
--validation-results are not measured again. Images are decoded once for all alphas that are in memory together.
"""
EXAMPLES = """\
  arf interpolate original.pt logs/run/checkpoints/epoch_10.pt --alpha 0.5 --out wise.pt
  arf interpolate ViT-B-16-quickgelu@openai tuned.pt --alphas 0.25 0.5 0.75 --out-folder wise
  arf interpolate original.pt tuned.pt --alphas --model ViT-B-16-quickgelu --suite imagenet-shifts --data-root sets \\
      --results results.jsonl                                      the curve from 0 to 1 in tenths
  arf interpolate original.pt tuned.pt --alphas --model local-dir:clip --suite emojinet --data-root data/emojinet \\
      --validation --choose-by ID --results results.jsonl --out wise.pt --json wise.json
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the parser of ``arf interpolate``."""
    parser = options.add_parser(
        subparsers, "interpolate", "mix two checkpoints in weight space (WiSE-FT)", DESCRIPTION, EXAMPLES
    )
    parser.add_argument(
        "original", metavar="ORIGINAL", help="checkpoint before fine-tuning, or MODEL@PRETRAINED"
    )
    parser.add_argument("tuned", type=Path, metavar="TUNED", help="checkpoint after fine-tuning")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--alpha",
        type=float,
        metavar="A",
        help="0: ORIGINAL, 1: TUNED (default: 0.5, if nothing is measured)",
    )
    which.add_argument(
        "--alphas", type=float, nargs="*", metavar="A", help="several; without numbers 0, 0.1, ... 1"
    )
    parser.add_argument("--dry-run", action="store_true", help="check the input, print the plan and stop")
    written = parser.add_argument_group("checkpoints")
    written.add_argument("--out", type=Path, metavar="FILE", help="write the one alpha, or the chosen one")
    written.add_argument("--out-folder", type=Path, metavar="DIR", help="write every alpha as DIR/alpha-A.pt")
    written.add_argument(
        "--format", choices=("pt", "safetensors"), default="pt", help="in --out-folder (default: %(default)s)"
    )
    _add_data_options(parser)
    settings.add_flags(parser)
    add_device_options(parser)
    parser.set_defaults(run=run)


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("measuring")
    group.add_argument(
        "--model", metavar="M", help="open_clip model of the checkpoints, local-dir:FOLDER or hf-hub:NAME"
    )
    group.add_argument("--suite", metavar="SUITE", help="name of a suite, or a YAML file")
    group.add_argument("--data-root", type=Path, metavar="FOLDER", help="the suite's sets are below it")
    group.add_argument(
        "--data", nargs="+", type=Path, default=[], metavar="FOLDER", help="a set, or a folder of sets"
    )
    group.add_argument(
        "--sets", nargs="+", default=[], metavar="NAME", help="some of the suite's sets; patterns work"
    )
    group.add_argument("--skip-missing", action="store_true", help="go on without sets that are not there")
    group.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="append a row per alpha and set to this JSONL file; resumes",
    )
    group.add_argument("--json", type=Path, metavar="FILE", help="write the figures and the choice to FILE")
    choosing = parser.add_argument_group("choosing alpha")
    choosing.add_argument(
        "--validation",
        nargs="*",
        type=Path,
        metavar="FOLDER",
        help="choose on these sets; without FOLDER on the suite's validation split",
    )
    choosing.add_argument(
        "--choose-by",
        metavar="NAME",
        help="set or average of the validation data that chooses (default: the only set, or the suite's first "
        "average of kind id); of equal alphas the one nearer 0.5 is taken, then the smaller",
    )
    choosing.add_argument(
        "--validation-results", type=Path, metavar="FILE", help="as --results, for validation rows"
    )
    choosing.add_argument(
        "--only-chosen", action="store_true", help="measure the chosen alpha alone on the test sets"
    )


@dataclass(frozen=True)
class _Job:
    """The command's input, checked and opened.

    Attributes:
        line: the two checkpoints.
        alphas: ascending.
        size: bytes of one model.
        suite: gives averages; None for sets without a suite.
        test: sets to report on.
        validation: sets to choose on.
        by: what chooses; None if nothing does.
    """

    line: Line
    alphas: list[float]
    size: int
    suite: Suite | None
    test: list[EvaluationSet]
    validation: list[EvaluationSet]
    by: str | None


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from arf_plugin.anchors.files import write_json
    from arf_plugin.evaluation.distributed import Processes

    with Processes() as processes:  # one group for both measurements
        first = processes.first
        warnings.showwarning = lambda message, *rest, **named: _say(f"warning: {message}") if first else None
        alphas = _alphas(args)
        _check(args, alphas)
        job = _open(args, alphas)
        if args.dry_run:
            if first:
                options.show(_plan(args, job), False, "plan")
            return 0
        summary: dict[str, Any] = {
            name: str(getattr(args, name) or "") or None for name in ("original", "tuned", "model", "suite")
        }
        summary["alphas"] = alphas
        choice = _choose(args, job, summary, first) if job.by else None
        targets = _targets(args, alphas, choice)
        if targets and first:
            _write(job.line, targets, settings.of_flags(args))
        summary["written"] = {str(path): alpha for path, alpha in targets.items()}
        if job.test:
            _report(args, job, summary, choice, first)
        if first and args.json:
            write_json(args.json, summary)
    return 0


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


def _open(args: argparse.Namespace, alphas: list[float]) -> _Job:
    from arf_plugin.evaluation.originals import find_original
    from arf_plugin.evaluation.sets import find_sets
    from arf_plugin.evaluation.sweep import Line, check_by

    line = Line(find_original(args.original), args.tuned, args.original)
    size = line.check()
    suite, test = find(_with(args, split="test")) if args.suite or args.data else (None, [])
    validation: list[EvaluationSet] = []
    if args.validation:
        sets = [found for folder in args.validation for found in find_sets(folder)]
        validation = [replace(found, split="validation") for found in sets]
    elif args.validation is not None:
        validation = find(_with(args, split="validation"))[1]
    by = check_by(args.choose_by, validation, suite) if validation else None
    return _Job(line, alphas, size, suite, test, validation, by)


def _with(args: argparse.Namespace, **more: Any) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), **more, "dry_run": False})


def _targets(args: argparse.Namespace, alphas: list[float], choice: Choice | None) -> dict[Path, float]:
    """Alphas by the files to write them to."""
    targets = {}
    if args.out_folder:
        targets = {args.out_folder / f"alpha-{alpha:g}.{args.format}": alpha for alpha in alphas}
    if args.out:
        targets[args.out] = choice.alpha if choice else alphas[0]
    return targets


def _plan(args: argparse.Namespace, job: _Job) -> dict[str, Any]:
    """What a run would do."""
    files = len(_targets(args, job.alphas, None))
    return {
        "alphas": " ".join(f"{alpha:g}" for alpha in job.alphas),
        "model size": f"{job.size / 1e6:.1f} MB",
        "checkpoints": f"{files}, {files * job.size / 1e9:.2f} GB in all",
        "validation": _count(job.validation),
        "chosen by": job.by or "nothing",
        "test": _count(job.test),
    }


def _choose(args: argparse.Namespace, job: _Job, summary: dict[str, Any], first: bool) -> Choice:
    from arf_plugin.evaluation import sweep

    assert job.by is not None
    found = _measure(args, job, job.alphas, job.validation, args.validation_results)
    choice = sweep.choose(found, job.by)
    summary["validation"] = {f"{alpha:g}": figures.as_json() for alpha, figures in found.items()}
    summary["chosen"] = choice.as_json()
    if first:
        print(f"validation, {_count(job.validation)}:\n{sweep.table(found, choice.alpha)}")
        ties = ", ".join(f"{alpha:g}" for alpha in choice.tied)
        print(f"chosen by {choice.by}: alpha {choice.alpha:g} ({choice.value:.2f})", end="")
        print(f"; as good: {ties}, and the rule is: {sweep.TIES}" if ties else "", flush=True)
    return choice


def _write(line: Line, targets: dict[Path, float], flags: settings.Settings) -> None:
    from arf_plugin.evaluation.interpolation import write_mixtures
    from arf_plugin.evaluation.tensor_files import WeightsFile
    from arf_plugin.pipeline.progress import Progress

    original, tuned = WeightsFile(line.original), WeightsFile(line.tuned)
    with Progress("interpolate", len(targets) * len(tuned.tensors), unit="tensors") as progress:
        write_mixtures(original, tuned, targets, progress.advance, flags)
    for path in targets:
        print(path)


def _report(
    args: argparse.Namespace, job: _Job, summary: dict[str, Any], choice: Choice | None, first: bool
) -> None:
    from arf_plugin.evaluation import sweep

    alphas = [choice.alpha] if choice and args.only_chosen else job.alphas
    found = _measure(args, job, alphas, job.test, args.results)
    summary["test"] = {f"{alpha:g}": figures.as_json() for alpha, figures in found.items()}
    if not first:
        return
    print(f"test, {_count(job.test)}:\n{sweep.table(found, choice.alpha if choice else None)}")
    if choice:
        figures = found[choice.alpha]
        values = (figures.averages or figures.sets).items()
        print(f"test at alpha {choice.alpha:g}: {', '.join(f'{name} {value:.2f}' for name, value in values)}")


def _measure(
    args: argparse.Namespace, job: _Job, alphas: list[float], sets: list[EvaluationSet], out: Path | None
) -> dict[float, Figures]:
    from arf_plugin.evaluation.sweep import measure

    return measure(
        job.line,
        alphas,
        args.model,
        sets,
        job.suite,
        out=out,
        flags=settings.of_flags(args),
        cache_dir=args.cache_dir,
        pretrained=_pretrained(args.original),
        **device_options(args),
    )


def _pretrained(original: str) -> str | None:
    """The name of the original's weights, if it is ``MODEL@PRETRAINED``: how images are prepared depends on it."""
    return None if Path(original).is_file() else original.rpartition("@")[2] or None


def _count(sets: list[EvaluationSet]) -> str:
    return f"{len(sets)} sets, {sum(dataset.images for dataset in sets)} images" if sets else "none"


def _say(text: str) -> None:
    print(f"arf interpolate: {text}", file=sys.stderr)
