"""``arf interpolate``: models made of a start and fine-tuned runs in weight space: written, measured, chosen."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

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
    from arf_plugin.evaluation.candidates import Candidate
    from arf_plugin.evaluation.sets import EvaluationSet
    from arf_plugin.evaluation.suites import Suite
    from arf_plugin.evaluation.sweep import Choice, Family, Point, Scores

K = TypeVar("K", bound="Point")
DESCRIPTION = """\
Makes one model of the weights before fine-tuning and of one or several fine-tuned checkpoints, tensor by tensor:
  wise   WiSE-FT: (1 - alpha) * ORIGINAL + alpha * TUNED
  stock  Model Stock: t * mean + (1 - t) * ORIGINAL, t from how far the updates of two or more TUNED agree
  soup   the mean of two or more TUNED; --greedy takes those that validation data do not object to
  lines  LiNeS: the update of layer l scaled by a + b (l - 1) / (L - 1), so that shallow layers stay near ORIGINAL
Writes ordinary checkpoints (--out, --out-folder), measures them (--suite or --data), and lets validation data choose
alpha, a and b, or the soup's runs (--validation); test data are only reported. The same command goes on where it
stopped: records in --results and --validation-results are not measured again. Images are decoded once for all models
that are in memory together.
"""
EXAMPLES = """\
  arf interpolate original.pt logs/run/checkpoints/epoch_10.pt --alpha 0.5 --out wise.pt
  arf interpolate ViT-B-16-quickgelu@openai tuned.pt --alphas 0.25 0.5 0.75 --out-folder wise
  arf interpolate original.pt tuned.pt --alphas --model ViT-B-16-quickgelu --suite imagenet-shifts --data-root sets \\
      --results results.jsonl                                      the curve from 0 to 1 in tenths
  arf interpolate original.pt tuned.pt --alphas --model local-dir:clip --suite emojinet --data-root data/emojinet \\
      --validation --choose-by ID --results results.jsonl --out wise.pt --json wise.json
  arf interpolate original.pt seed-0.pt seed-1.pt seed-2.pt --method stock --out stock.pt
  arf interpolate original.pt seed-*.pt --method soup --greedy --model local-dir:clip --suite emojinet \\
      --data-root data/emojinet --validation --choose-by ID --out soup.pt
  arf interpolate original.pt tuned.pt --method lines --lines 0 1 --out lines.pt
"""


def register(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the parser of ``arf interpolate``."""
    parser = options.add_parser(
        subparsers,
        "interpolate",
        "mix or merge checkpoints in weight space (WiSE-FT, Model Stock, soups, LiNeS)",
        DESCRIPTION,
        EXAMPLES,
    )
    add = parser.add_argument
    add("original", metavar="ORIGINAL", help="checkpoint before fine-tuning, or MODEL@PRETRAINED")
    add(
        "tuned",
        type=Path,
        nargs="+",
        metavar="TUNED",
        help="checkpoints after it; several for stock and soup",
    )
    add("--method", choices=("wise", "stock", "soup", "lines"), default="wise", help="default: %(default)s")
    which = parser.add_mutually_exclusive_group().add_argument
    one = "wise: 0: ORIGINAL, 1: TUNED (default: 0.5, if nothing is measured)"
    which("--alpha", type=float, metavar="A", help=one)
    which("--alphas", type=float, nargs="*", metavar="A", help="wise: several; without numbers 0, 0.1, ... 1")
    lines = (
        "lines: a and b; may be given several times (default: 0 1; with --validation, 0 1, 0.25 0.75, 0.5 0.5, "
        "0.75 0.25 and 1 0, which leave the last layer's update as it is)"
    )
    which("--lines", type=float, nargs=2, action="append", metavar=("A", "B"), help=lines)
    greedy = "soup: best first, each TUNED that does not lower the validation score of the soup"
    which("--greedy", action="store_true", help=greedy)
    add("--dry-run", action="store_true", help="check the input, print the plan and stop")
    add = parser.add_argument_group("checkpoints").add_argument
    add("--out", type=Path, metavar="FILE", help="write the one model, or the chosen one")
    add(
        "--out-folder",
        type=Path,
        metavar="DIR",
        help="write every one: DIR/alpha-A.pt, lines-A-B.pt, stock.pt, soup.pt",
    )
    form = "in --out-folder (default: %(default)s)"
    add("--format", choices=("pt", "safetensors"), default="pt", help=form)
    add = parser.add_argument_group("measuring").add_argument
    model = "open_clip model of the checkpoints, local-dir:FOLDER or hf-hub:NAME"
    add("--model", metavar="M", help=model)
    results = "append a record per model and set to this JSONL file; resumes"
    add("--results", type=Path, metavar="FILE", help=results)
    add("--json", type=Path, metavar="FILE", help="write the scores and the choice to FILE")
    add_data_options(parser)
    add = parser.add_argument_group("choosing alpha, a and b, or the soup's runs").add_argument
    validation = "choose on these sets; without FOLDER on the suite's validation split"
    add("--validation", nargs="*", type=Path, metavar="FOLDER", help=validation)
    by = (
        "set or average of the validation data that chooses (default: the only set, or the suite's first average of "
        "kind id); of equal alphas the one nearer 0.5 is taken, then the smaller; of equal a the smaller, then of b"
    )
    add("--choose-by", metavar="NAME", help=by)
    add("--validation-results", type=Path, metavar="FILE", help="as --results, for validation records")
    add("--only-chosen", action="store_true", help="measure the chosen one alone on the test sets")
    add_run_flags(parser)
    add_device_options(parser)
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class _Job:
    """The command's input, checked and opened.

    Attributes:
        args: the command line.
        first: whether this process writes and prints.
        family: the checkpoints and the method.
        models: by alpha, a and b, or the method's name; in ascending order.
        size: bytes of one model.
        suite: gives averages; None for sets without a suite.
        test: sets to report on.
        validation: sets to choose on.
        by: what chooses; None if nothing does.
    """

    args: argparse.Namespace
    first: bool
    family: Family
    models: dict[Point, Candidate]
    size: int
    suite: Suite | None
    test: list[EvaluationSet]
    validation: list[EvaluationSet]
    by: str | None

    @property
    def title(self) -> str:
        """What points are."""
        return "alpha" if self.family.method == "wise" else self.family.method

    def measure(
        self, models: Mapping[K, Candidate], sets: list[EvaluationSet], out: Path | None
    ) -> dict[K, Scores]:
        """Measures models; how images are prepared depends on the name of the original's weights, if it has one."""
        from arf_plugin.evaluation.sweep import measure

        original, settings = self.args.original, device_options(self.args)
        pretrained = None if Path(original).is_file() else original.rpartition("@")[2] or None
        settings |= {"out": out, "pretrained": pretrained}
        return measure(models, self.args.model, sets, self.suite, **settings)

    def targets(self, chosen: Point | None = None) -> dict[Path, Point]:
        """Points by the files to write their models to."""
        from arf_plugin.evaluation.sweep import text

        args, found = self.args, dict[Path, Any]()
        if args.out_folder:
            for point in self.models:
                name = (
                    text(point) if isinstance(point, str) else f"{self.title}-{text(point).replace(' ', '-')}"
                )
                found[args.out_folder / f"{name}.{args.format}"] = point
        if args.out:
            found[args.out] = next(iter(self.models)) if chosen is None else chosen
        return found


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from arf_plugin.evaluation.distributed import Processes
    from arf_plugin.evaluation.sweep import text
    from arf_plugin.files import write_json

    with Processes() as processes:  # one group for both measurements
        warn_as("arf interpolate", processes.first)
        job = _open(args, processes.first)
        if args.dry_run:
            if job.first:
                options.show(_plan(job), False, "plan")
            return 0
        summary = _summary(job)
        chosen = None
        if args.greedy:
            job = _choose_runs(job, summary)
        elif job.by:
            chosen = _choose(job, summary).point
        targets = job.targets(chosen)
        if targets and job.first:
            _write(job, targets)
        wise = job.family.method == "wise"
        summary["written"] = {str(path): point if wise else text(point) for path, point in targets.items()}
        if job.test:
            _report(job, summary, chosen)
        if job.first and args.json:
            write_json(args.json, summary)
    return 0


def _summary(job: _Job) -> dict[str, Any]:
    """What a summary begins with."""
    args = job.args
    found: dict[str, Any] = {
        name: str(getattr(args, name) or "") or None for name in ("original", "model", "suite")
    }
    tuned = [str(path) for path in args.tuned]
    if args.method == "wise":
        return {**found, "tuned": tuned[0], "alphas": list(job.models)}
    lines = {"lines": list(job.models)} if args.method == "lines" else {}
    return {**found, "tuned": tuned, "method": args.method, **lines}


def _open(args: argparse.Namespace, first: bool) -> _Job:
    from arf_plugin.evaluation.candidates import find_original
    from arf_plugin.evaluation.sets import find_sets
    from arf_plugin.evaluation.sweep import Family, check_by

    points = _points(args)
    _check(args, points)
    family = Family(args.method, find_original(args.original), tuple(args.tuned), args.original)
    size = family.check()
    models = {point: family.at(point) for point in points}
    suite, test = find(args, "test") if args.suite or args.data else (None, [])
    validation: list[EvaluationSet] = []
    if args.validation:
        sets = [found for folder in args.validation for found in find_sets(folder)]
        validation = [replace(found, split="validation") for found in sets]
    elif args.validation is not None:
        validation = find(args, "validation")[1]
    by = check_by(args.choose_by, validation, suite) if validation else None
    return _Job(args, first, family, models, size, suite, test, validation, by)


def _points(args: argparse.Namespace) -> list[Point]:
    """The models that are asked for: alphas, pairs of a and b, or the method's name."""
    from arf_plugin.evaluation.interpolation import ALPHAS, check_alpha
    from arf_plugin.evaluation.merging import LINES

    given = {"wise": ("alpha", "alphas"), "lines": ("lines",), "soup": ("greedy",), "stock": ()}
    for method, flags in given.items():
        for flag in flags:
            if method != args.method and not (getattr(args, flag) is None or getattr(args, flag) is False):
                raise EvaluationError(f"--{flag} is for --method {method}, not for {args.method}.")
    if args.method in ("stock", "soup"):
        return [args.method]
    if args.method == "lines":
        pairs = [(a, b) for a, b in args.lines or (LINES if args.validation is not None else LINES[:1])]
        return sorted(set(pairs))
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


def _check(args: argparse.Namespace, points: Sequence[Point]) -> None:
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
    what = "alpha" if args.method == "wise" else "pair of a and b"
    if args.out and len(points) > 1 and args.validation is None:
        raise EvaluationError(
            f"--out takes one {what}, {len(points)} were given. Use --out-folder, or let --validation choose one."
        )
    if args.greedy and args.validation is None:
        raise EvaluationError("A greedy soup is made by validation data: give --validation, too.")
    if args.validation is not None and (
        args.method == "stock" or (args.method == "soup" and not args.greedy)
    ):
        hint = " A soup's runs are chosen with --greedy." if args.method == "soup" else ""
        raise EvaluationError(f"--validation has nothing to choose with --method {args.method}.{hint}")
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
    from arf_plugin.evaluation.sweep import text

    files = len(job.targets())
    if job.family.method in ("stock", "soup"):
        greedy = "greedy " if job.args.greedy else ""
        models = {"method": f"{greedy}{job.title} of {len(job.family.tuned)} checkpoints"}
    elif job.family.method == "lines":
        models = {"lines, a b": ", ".join(map(text, job.models))}
    else:
        models = {"alphas": " ".join(map(text, job.models))}
    return {
        **models,
        "model size": f"{job.size / 1e6:.1f} MB",
        "checkpoints": f"{files}, {files * job.size / 1e9:.2f} GB in all",
        "validation": _count(job.validation),
        "chosen by": job.by or "nothing",
        "test": _count(job.test),
    }


def _choose(job: _Job, summary: dict[str, Any]) -> Choice:
    from arf_plugin.evaluation import sweep

    assert job.by is not None
    found = job.measure(job.models, job.validation, job.args.validation_results)
    choice = sweep.choose(found, job.by)
    summary["validation"] = {sweep.text(point): asdict(scores) for point, scores in found.items()}
    summary["chosen"] = choice.as_json()
    if job.first:
        print(f"validation, {_count(job.validation)}:\n{sweep.table(found, choice.point, job.title)}")
        ties = ", ".join(map(sweep.text, choice.tied))
        print(f"chosen by {choice.by}: {choice.name} {sweep.text(choice.point)} ({choice.value:.2f})", end="")
        print(f"; as good: {ties}, and the rule is: {choice.ties}" if ties else "", flush=True)
    return choice


def _choose_runs(job: _Job, summary: dict[str, Any]) -> _Job:
    """Makes the greedy soup; the job's one model is then that of the runs that it keeps."""
    from arf_plugin.evaluation import sweep

    assert job.by is not None

    def measured(models: Mapping[str, Candidate]) -> dict[str, Scores]:
        return job.measure(models, job.validation, job.args.validation_results)

    chosen, alone = sweep.greedy_soup(job.family.tuned, job.by, measured)
    summary["validation"] = {path: asdict(scores) for path, scores in alone.items()}
    summary["chosen"] = chosen.as_json()
    if job.first:
        print(f"validation, {_count(job.validation)}:\n{sweep.table(alone, title='checkpoint')}")
        for step in chosen.steps:
            kept = "kept" if step["kept"] else "left out"
            print(f"{step['run']}: {step['value']:.2f}, the soup with it {step['with_it']:.2f}: {kept}")
        print(f"soup of {len(chosen.runs)} by {chosen.by}: {chosen.value:.2f}", flush=True)
    return replace(job, models={"soup": sweep.soup(chosen.runs)})


def _write(job: _Job, targets: Mapping[Path, Point]) -> None:
    from arf_plugin.console import progress
    from arf_plugin.evaluation.checkpoints import open_checkpoint
    from arf_plugin.evaluation.interpolation import write_mixtures
    from arf_plugin.evaluation.merging import Merge, write_merges

    original, flags = open_checkpoint(job.family.original), run_flags(job.args)
    runs = [open_checkpoint(path) for path in next(iter(job.models.values())).runs]
    with progress("interpolate", "checkpoints", len(targets)) as bar:
        if job.family.method == "wise":
            alphas = {path: point for path, point in targets.items() if isinstance(point, float)}
            write_mixtures(original, runs[0], alphas, bar.update, flags)
        else:
            merges = {path: job.models[point].merge or Merge("soup") for path, point in targets.items()}
            write_merges(original, runs, merges, bar.update, flags)
    for path in targets:
        print(path)


def _report(job: _Job, summary: dict[str, Any], chosen: Point | None) -> None:
    from arf_plugin.evaluation import sweep

    models = job.models
    if chosen is not None and job.args.only_chosen:
        models = {chosen: models[chosen]}
    found = job.measure(models, job.test, job.args.results)
    summary["test"] = {sweep.text(point): asdict(scores) for point, scores in found.items()}
    if not job.first:
        return
    print(f"test, {_count(job.test)}:\n{sweep.table(found, chosen, job.title)}")
    if chosen is not None:
        scores = found[chosen]
        values = (scores.averages or scores.sets).items()
        told = ", ".join(f"{name} {value:.2f}" for name, value in values)
        print(f"test at {job.title} {sweep.text(chosen)}: {told}")


def _count(sets: list[EvaluationSet]) -> str:
    return f"{len(sets)} sets, {sum(dataset.images for dataset in sets)} images" if sets else "none"
