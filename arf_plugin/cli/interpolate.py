"""``arf interpolate``: models made of a start and fine-tuned runs in weight space: written, measured, chosen."""

from __future__ import annotations

import argparse
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
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
    from arf_plugin.evaluation.merging import Merge
    from arf_plugin.evaluation.sets import EvaluationSet
    from arf_plugin.evaluation.sweep import Scores

K = TypeVar("K", bound=Hashable)
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
    tuned = "checkpoints after it; several for stock and soup"
    add("tuned", type=Path, nargs="+", metavar="TUNED", help=tuned)
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
    every = "write every one: DIR/alpha-A.pt, lines-A-B.pt, stock.pt, soup.pt"
    add("--out-folder", type=Path, metavar="DIR", help=every)
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


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from arf_plugin.evaluation import sweep
    from arf_plugin.evaluation.candidates import find_original
    from arf_plugin.evaluation.distributed import Processes
    from arf_plugin.evaluation.merging import Merge
    from arf_plugin.files import write_json

    with Processes() as processes:  # one group for both measurements
        first = processes.first
        warn_as("arf interpolate", first)
        methods = _methods(args)
        _check(args, len(methods))
        original, tuned = find_original(args.original), tuple(args.tuned)
        size = sweep.check_ends(methods[0], original, tuned)
        models = {how: sweep.made(how, original, tuned, args.original) for how in methods}
        suite, test = find(args, "test") if args.suite or args.data else (None, [])
        validation = _validation(args)
        by = sweep.check_by(args.choose_by, validation, suite) if validation else None
        if args.dry_run:
            files = len(_targets(args, methods))
            plan = {
                **_planned(args, methods),
                "model size": f"{size / 1e6:.1f} MB",
                "checkpoints": f"{files}, {files * size / 1e9:.2f} GB in all",
                "validation": _count(validation),
                "chosen by": by or "nothing",
                "test": _count(test),
            }
            if first:
                options.show(plan, False, "plan")
            return 0

        def measure(
            which: Mapping[K, Candidate], sets: list[EvaluationSet], out: Path | None
        ) -> dict[K, Scores]:
            # How images are prepared depends on the name of the original's weights, if it has one.
            pretrained = None if Path(args.original).is_file() else args.original.rpartition("@")[2] or None
            settings = {**device_options(args), "out": out, "pretrained": pretrained}
            return sweep.measure(which, args.model, sets, suite, **settings)

        def tell(
            title: str, sets: list[EvaluationSet], scores: Mapping[str, Scores], star: str | None, of: str
        ) -> None:
            summary[title] = {name: each._asdict() for name, each in scores.items()}
            say(f"{title}, {_count(sets)}:\n{sweep.table(scores, star, of)}")

        say = print if first else (lambda *texts: None)
        title = "alpha" if args.method == "wise" else args.method
        summary = _summary(args, methods)
        chosen = None
        if args.greedy:
            assert by is not None
            kept, summary["chosen"], alone = sweep.greedy_soup(
                tuned, by, lambda which: measure(which, validation, args.validation_results)
            )
            models = {Merge("soup"): sweep.soup(kept)}
            tell("validation", validation, alone, None, "checkpoint")
            for step in summary["chosen"]["steps"]:
                word = "kept" if step["kept"] else "left out"
                say(f"{step['run']}: {step['value']:.2f}, the soup with it {step['with_it']:.2f}: {word}")
            say(f"soup of {len(kept)} by {by}: {summary['chosen']['value']:.2f}")
        elif by is not None:
            found = measure(models, validation, args.validation_results)
            chosen, *tied = sweep.choose(found, by)
            ties, value = sweep.TIES[args.method], found[chosen].rank(by)
            summary["chosen"] = {title: _plain(chosen), "by": by, "value": value}
            summary["chosen"] |= {"tied": list(map(_plain, tied)), "ties": ties}
            tell("validation", validation, _by_text(found), chosen.text, title)
            also = (
                f"; as good: {', '.join(how.text for how in tied)}, and the rule is: {ties}" if tied else ""
            )
            say(f"chosen by {by}: {title} {chosen.text} ({value:.2f}){also}")
        targets = _targets(args, models, chosen)
        if targets and first:
            _write(args, original, next(iter(models.values())).runs, targets)
        summary["written"] = {
            str(path): how.numbers[0] if how.method == "wise" else how.text for path, how in targets.items()
        }
        if test:
            asked = {chosen: models[chosen]} if chosen is not None and args.only_chosen else models
            found = measure(asked, test, args.results)
            tell("test", test, _by_text(found), chosen.text if chosen else None, title)
            if chosen is not None:
                scores = found[chosen].averages or found[chosen].sets
                told = ", ".join(f"{name} {value:.2f}" for name, value in scores.items())
                say(f"test at {title} {chosen.text}: {told}")
        if first and args.json:
            write_json(args.json, summary)
    return 0


def _methods(args: argparse.Namespace) -> list[Merge]:
    """The models that are asked for, in ascending order of alpha, or a and b."""
    from arf_plugin.evaluation.merging import ALPHAS, LINES, Merge

    given = {"wise": ("alpha", "alphas"), "lines": ("lines",), "soup": ("greedy",), "stock": ()}
    for method, flags in given.items():
        for flag in flags:
            if method != args.method and not (getattr(args, flag) is None or getattr(args, flag) is False):
                raise EvaluationError(f"--{flag} is for --method {method}, not for {args.method}.")
    numbers: list[tuple[float, ...]] = [()]
    if args.method == "lines":
        numbers = [(a, b) for a, b in args.lines or (LINES if args.validation is not None else LINES[:1])]
    elif args.method == "wise":
        swept = args.alphas is not None or _measures(args)
        alphas = (args.alphas or ALPHAS) if swept else (0.5,)
        numbers = [(alpha,) for alpha in (alphas if args.alpha is None else (args.alpha,))]
    return [Merge(args.method, each) for each in sorted(set(numbers))]


def _measures(args: argparse.Namespace) -> bool:
    return bool(args.suite or args.data or args.validation is not None)


def _check(args: argparse.Namespace, models: int) -> None:
    """Refuses combinations of flags that cannot work."""
    measures, chooses = _measures(args), args.validation is not None
    what = "alpha" if args.method == "wise" else "pair of a and b"
    fixed = args.method == "stock" or (args.method == "soup" and not args.greedy)
    hint = " A soup's runs are chosen with --greedy." if args.method == "soup" else ""
    refused = {
        "Nothing to do. Name a file with --out or a folder with --out-folder to write to, or data to measure "
        "with --suite and --data-root, or with --data.": not (measures or args.out or args.out_folder),
        "Measuring needs --model, open_clip's name of the checkpoints' architecture, such as ViT-B-16-quickgelu.": (
            measures and not args.model
        ),
        f"--out takes one {what}, {models} were given. Use --out-folder, or let --validation choose one.": (
            args.out and models > 1 and not chooses
        ),
        "A greedy soup is made by validation data: give --validation, too.": args.greedy and not chooses,
        f"--validation has nothing to choose with --method {args.method}.{hint}": chooses and fixed,
        "--validation without a folder means the suite's validation split: give --suite and --data-root, or name "
        "a folder of sets.": args.validation == [] and not args.suite,
        "--choose-by needs --validation.": args.choose_by and not chooses,
        "--validation-results needs --validation.": args.validation_results and not chooses,
        "--only-chosen needs --validation.": args.only_chosen and not chooses,
    }
    for message, wrong in refused.items():
        if wrong:
            raise EvaluationError(message)


def _validation(args: argparse.Namespace) -> list[EvaluationSet]:
    """The sets to choose on."""
    from arf_plugin.evaluation.sets import find_sets

    if args.validation is None:
        return []
    if not args.validation:
        return find(args, "validation")[1]
    sets = [found for folder in args.validation for found in find_sets(folder)]
    return [replace(found, split="validation") for found in sets]


def _planned(args: argparse.Namespace, methods: Sequence[Merge]) -> dict[str, str]:
    if args.method in ("stock", "soup"):
        greedy = "greedy " if args.greedy else ""
        return {"method": f"{greedy}{args.method} of {len(args.tuned)} checkpoints"}
    if args.method == "lines":
        return {"lines, a b": ", ".join(how.text for how in methods)}
    return {"alphas": " ".join(how.text for how in methods)}


def _summary(args: argparse.Namespace, methods: Sequence[Merge]) -> dict[str, Any]:
    """What a summary begins with."""
    found: dict[str, Any] = {
        name: str(getattr(args, name) or "") or None for name in ("original", "model", "suite")
    }
    tuned = [str(path) for path in args.tuned]
    if args.method == "wise":
        return {**found, "tuned": tuned[0], "alphas": list(map(_plain, methods))}
    lines = {"lines": list(map(_plain, methods))} if args.method == "lines" else {}
    return {**found, "tuned": tuned, "method": args.method, **lines}


def _plain(how: Merge) -> float | tuple[float, ...]:
    """A method's numbers for JSON: alpha, or a and b."""
    return how.numbers[0] if how.method == "wise" else how.numbers


def _by_text(scores: Mapping[Merge, Scores]) -> dict[str, Scores]:
    return {how.text: each for how, each in scores.items()}


def _targets(
    args: argparse.Namespace, models: Iterable[Merge], chosen: Merge | None = None
) -> dict[Path, Merge]:
    """What to write, by file."""
    found: dict[Path, Merge] = {}
    kind = {"wise": "alpha-", "lines": "lines-"}.get(args.method, "")
    if args.out_folder:
        for how in models:
            found[args.out_folder / f"{kind}{how.text.replace(' ', '-')}.{args.format}"] = how
    if args.out:
        found[args.out] = chosen or next(iter(models))
    return found


def _write(
    args: argparse.Namespace, original: Path, runs: Sequence[Path], targets: Mapping[Path, Merge]
) -> None:
    from arf_plugin.console import progress
    from arf_plugin.evaluation.checkpoints import open_checkpoint
    from arf_plugin.evaluation.merging import write_merges

    with progress("interpolate", "checkpoints", len(targets)) as bar:
        opened = [open_checkpoint(path) for path in runs]
        write_merges(open_checkpoint(original), opened, targets, bar.update, run_flags(args))
    for path in targets:
        print(path)


def _count(sets: list[EvaluationSet]) -> str:
    return f"{len(sets)} sets, {sum(dataset.images for dataset in sets)} images" if sets else "none"
