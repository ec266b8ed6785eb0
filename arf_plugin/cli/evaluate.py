"""``arf evaluate``: accuracy and calibration of checkpoints on a suite, or on sets of one's own."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arf_plugin.cli import options
from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation import settings
from arf_plugin.untrusted import printable

if TYPE_CHECKING:
    from arf_plugin.evaluation.candidates import Candidate
    from arf_plugin.evaluation.sets import EvaluationSet
    from arf_plugin.evaluation.suites import Suite

EXAMPLES = """\
  arf evaluate runs/flyp.pt runs/arf.pt --model ViT-B-16 --suite imagenet-shifts --data-root /data --out results.jsonl
  arf evaluate --model ViT-B-16-quickgelu --pretrained openai --suite domainnet --data-root /data --skip-missing
  arf evaluate original.pt tuned.pt --wise 0.5 --model local-dir:clip --data sets    own sets; also: both mixed
  arf evaluate tuned.pt --model ViT-B-16 --suite my-suite.yaml --data-root /data --dry-run     what is there?
  torchrun --nproc_per_node 8 --no-python arf evaluate tuned.pt --model ViT-L-14 --suite domainnet --data-root /data

suites that come along: domainnet, emojinet, imagenet-shifts, zero-shot-transfer. Sets are read as CLIP_benchmark's
WebDataset folders (DATA/imagenet1k or DATA/wds_imagenet1k, DATA/wds_vtab-pets ...) or in torchvision's layout.
Rows in --out hold everything that a figure depends on; what is there is not measured again.
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the parser of ``arf evaluate``."""
    parser = options.add_parser(
        subparsers,
        "evaluate",
        "accuracy and calibration of checkpoints",
        "Measures checkpoints on a suite of sets, or on own sets: top-1, top-5, mean per class, macro-F1 and expected\n"
        "calibration error, in percent. Agrees with clip_benchmark eval to the last image. Images are decoded once\n"
        "for all checkpoints.",
        EXAMPLES,
    )
    parser.add_argument("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT", help="weights of --model")
    parser.add_argument(
        "--model", required=True, metavar="M", help="open_clip model, local-dir:FOLDER or hf-hub:NAME"
    )
    parser.add_argument(
        "--pretrained", metavar="P", help="without checkpoints: open_clip tag or checkpoint file"
    )
    parser.add_argument(
        "--wise",
        type=float,
        metavar="ALPHA",
        help="also mix the first checkpoint with each other one in weight space (WiSE-FT)",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--suite", metavar="SUITE", help="name of a suite, or a YAML file")
    data.add_argument("--data-root", type=Path, metavar="FOLDER", help="the suite's sets are below it")
    data.add_argument(
        "--data",
        nargs="+",
        type=Path,
        default=[],
        metavar="FOLDER",
        help="a set, or a folder of sets, without a suite",
    )
    data.add_argument(
        "--sets", nargs="+", default=[], metavar="NAME", help="some of the suite's sets; patterns work"
    )
    data.add_argument("--split", default="test", help="part of the data (default: %(default)s)")
    data.add_argument("--skip-missing", action="store_true", help="go on without sets that are not there")
    data.add_argument("--dry-run", action="store_true", help="say which sets are there, and stop")
    results = parser.add_argument_group("results")
    results.add_argument("--out", type=Path, metavar="FILE", help="append rows to this JSONL file; resumes")
    results.add_argument("--json", type=Path, metavar="FILE", help="write a summary of the figures to FILE")
    settings.add_flags(parser)
    add_device_options(parser)
    parser.set_defaults(run=run)


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say how to measure; :func:`device_options` hands them on."""
    device = parser.add_argument_group("device")
    device.add_argument(
        "--batch-size", type=options.positive, default=256, metavar="N", help="default: %(default)s"
    )
    device.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:N")
    device.add_argument(
        "--precision",
        choices=("fp32", "amp"),
        default="fp32",
        help="amp: autocast, as CLIP_benchmark does by default (default: %(default)s)",
    )
    device.add_argument(
        "--workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="processes that decode images (default: %(default)s)",
    )
    device.add_argument(
        "--models-at-once",
        type=options.positive,
        metavar="N",
        help="in memory together; images are decoded once per such group (default: what half of the memory holds)",
    )


def device_options(args: argparse.Namespace) -> dict[str, Any]:
    """How to measure, as :func:`arf_plugin.evaluation.run.evaluate` takes it."""
    names = ("batch_size", "device", "precision", "workers", "models_at_once")
    return {name: getattr(args, name) for name in names}


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from arf_plugin.anchors.files import write_json
    from arf_plugin.evaluation.distributed import Processes
    from arf_plugin.evaluation.run import evaluate
    from arf_plugin.evaluation.tables import summary, table

    first = Processes().first
    warnings.showwarning = lambda message, *rest, **named: _warn(str(message)) if first else None
    suite, sets = find(args)
    candidates = _candidates(args)
    if args.dry_run:
        print(printable(_plan(args, sets, candidates)))
        return 0
    rows = evaluate(
        candidates,
        args.model,
        sets,
        suite=suite.name if suite else None,
        pretrained=args.pretrained,
        out=args.out,
        flags=settings.of_flags(args),
        cache_dir=args.cache_dir,
        **device_options(args),
    )
    if first:
        if args.json:
            write_json(args.json, summary(rows, suite))
        print(table(rows, suite))
    return 0


def find(args: argparse.Namespace) -> tuple[Suite | None, list[EvaluationSet]]:
    """Opens the sets that `--suite`, `--data-root`, `--sets`, `--split` and `--data` name.

    Raises:
        EvaluationError: if some are missing, unless `--skip-missing` allows it.
    """
    from arf_plugin.evaluation.sets import find_sets
    from arf_plugin.evaluation.sources import find_suite, missing_text
    from arf_plugin.evaluation.suites import load_suite

    if bool(args.suite) == bool(args.data):
        raise EvaluationError(
            "Name either a suite (--suite NAME --data-root FOLDER) or folders of sets (--data FOLDER)."
        )
    if not args.suite:
        return None, [found for folder in args.data for found in find_sets(folder, args.split)]
    suite = load_suite(args.suite)
    if args.data_root is None:
        raise EvaluationError(f"--suite {args.suite} needs --data-root FOLDER, the folder its sets are in.")
    found = find_suite(suite, args.data_root, args.split, args.sets)
    if found.missing and not (args.skip_missing or args.dry_run):
        raise EvaluationError(
            f"{missing_text(suite, found)}\nCopy them there, name those that are with --sets, or use --skip-missing."
        )
    if found.missing:
        _warn(missing_text(suite, found))
    if not found.sets:
        raise EvaluationError(f"No set of the suite '{suite.name}' is below {args.data_root}.")
    return suite, found.sets


def _candidates(args: argparse.Namespace) -> list[Candidate]:
    from arf_plugin.evaluation.candidates import Candidate

    if args.wise is not None and len(args.checkpoints) < 2:
        raise EvaluationError(
            f"--wise mixes the first checkpoint with the others; {len(args.checkpoints)} were given."
        )
    plain = [Candidate(path) for path in args.checkpoints] or [Candidate(None)]
    if args.wise is None:
        return plain
    original, *tuned = args.checkpoints
    return plain + [Candidate(path, original, args.wise) for path in tuned]


def _plan(args: argparse.Namespace, sets: list[EvaluationSet], candidates: list[Candidate]) -> str:
    """What a run would do."""
    from arf_plugin.evaluation.rows import Results

    known = Results.read(args.out)
    width = max(len(dataset.name) for dataset in sets)
    lines = [f"{'set':<{width}} {'images':>8} {'classes':>7} {'finished':>8}  place"]
    for dataset in sets:
        count = _finished(known, dataset, candidates, args)
        lines.append(
            f"{dataset.name:<{width}} {dataset.images:>8} {len(dataset.classnames):>7} "
            f"{f'{count}/{len(candidates)}':>8}  {dataset.place}"
        )
        if problem := dataset.truncated():
            lines.append(f"  warning: {problem}")
    images = sum(dataset.images for dataset in sets)
    return "\n".join(
        [*lines, f"{len(sets)} sets, {images} images, {len(candidates)} checkpoints or mixtures"]
    )


def _finished(
    known: list[dict[str, Any]], dataset: EvaluationSet, candidates: list[Candidate], args: argparse.Namespace
) -> int:
    """How many candidates have a finished row on a set; the model's own weights are not looked at."""
    from arf_plugin.evaluation.rows import Results
    from arf_plugin.evaluation.run import describe, describe_set

    results = Results(None, known)
    count = 0
    for candidate in candidates:
        if candidate.checkpoint is not None:
            candidate.check()
            way = candidate.resolve(args.model, settings.of_flags(args), args.pretrained)[0]
            row = {**describe(candidate, args.model), **describe_set(dataset), "preprocess": way.flags()}
            count += results.has({**row, "model": args.model, "precision": args.precision})
    return count


def _warn(text: str) -> None:
    print(f"arf evaluate: warning: {printable(text)}", file=sys.stderr)
