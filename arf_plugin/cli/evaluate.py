"""``arf evaluate``: accuracy and calibration of checkpoints on a suite, or on sets of one's own."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arf_plugin.cli import options
from arf_plugin.errors import EvaluationError, FlagError
from arf_plugin.untrusted import printable

if TYPE_CHECKING:
    from arf_plugin.evaluation.candidates import Candidate
    from arf_plugin.evaluation.records import EvalRecord
    from arf_plugin.evaluation.run_settings import Settings
    from arf_plugin.evaluation.sets import EvaluationSet
    from arf_plugin.evaluation.suites import Suite

EXAMPLES = """\
  arf evaluate runs/flyp.pt runs/arf.pt --model ViT-B-16 --suite imagenet-shifts --data-root /data --out results.jsonl
  arf evaluate --model ViT-B-16-quickgelu --pretrained openai --suite domainnet --data-root /data --skip-missing
  arf evaluate original.pt tuned.pt --wise 0.5 --model local-dir:clip --data sets    own sets; also: both mixed
  arf evaluate tuned.pt --model ViT-B-16 --suite my-suite.yaml --data-root /data --dry-run     what is there?
  arf evaluate --compare flyp arf --among runs/ablation/results.jsonl                      is ARF ahead? by image
  arf evaluate --compare flyp+wise@0.5 'runs/arf-*' --among a/results.jsonl b/results.jsonl
  torchrun --nproc_per_node 8 --no-python arf evaluate tuned.pt --model ViT-L-14 --suite domainnet --data-root /data

suites that come along: domainnet, emojinet, imagenet-shifts, zero-shot-transfer. Sets are read as CLIP_benchmark's
WebDataset folders (DATA/imagenet1k or DATA/wds_imagenet1k, DATA/wds_vtab-pets ...) or in torchvision's layout.
Records in --out hold everything that a score depends on; what is there is not measured again.
"""


def register(subparsers: argparse._SubParsersAction[Any]) -> None:
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
    add = parser.add_argument
    add("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT", help="weights of --model")
    add("--model", metavar="M", help="open_clip model, local-dir:FOLDER or hf-hub:NAME; needed to measure")
    add("--pretrained", metavar="P", help="without checkpoints: open_clip tag or checkpoint file")
    wise = "also mix the first checkpoint with each other one in weight space (WiSE-FT)"
    add("--wise", type=float, metavar="ALPHA", help=wise)
    add = add_data_options(parser).add_argument
    add("--split", default="test", help="part of the data (default: %(default)s)")
    add("--dry-run", action="store_true", help="say which sets are there, and stop")
    add = parser.add_argument_group("results").add_argument
    add("--out", type=Path, metavar="FILE", help="append records to this JSONL file; resumes")
    add("--json", type=Path, metavar="FILE", help="write a summary of the scores to FILE")
    text = (
        "say where AFTER is ahead of BEFORE, paired by image: each a checkpoint, a pattern of checkpoints or an arm "
        "(several runs are seeds, by their folders ARM-SEED), with +wise@ALPHA for mixtures; or a file of records. "
        "Without --model nothing is measured"
    )
    add("--compare", nargs=2, metavar=("BEFORE", "AFTER"), help=text)
    text = "records to compare, a file per grid or model (default: what is measured, or --out)"
    add("--among", nargs="+", type=Path, default=[], metavar="FILE", help=text)
    add_run_flags(parser)
    add_device_options(parser)
    parser.set_defaults(run=run)


def add_data_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the flags that name sets; :func:`find` opens them."""
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--suite", metavar="SUITE", help="name of a suite, or a YAML file")
    add("--data-root", type=Path, metavar="FOLDER", help="the suite's sets are below it")
    own = "a set, or a folder of sets, without a suite"
    add("--data", nargs="+", type=Path, default=[], metavar="FOLDER", help=own)
    add("--sets", nargs="+", default=[], metavar="NAME", help="some of the suite's sets; patterns work")
    add("--skip-missing", action="store_true", help="go on without sets that are not there")
    return group


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the trainer's flags that change how a model sees images and texts; :func:`run_flags` reads them."""
    add = parser.add_argument_group(
        "the run's flags",
        "As the trainer has them. By default those of the run that a checkpoint comes from: its params.txt is found\n"
        "beside checkpoints/, and a checkpoint that arf has written tells itself.",
    ).add_argument
    add("--image-mean", type=float, nargs="+", metavar="MEAN")
    add("--image-std", type=float, nargs="+", metavar="STD")
    add("--image-interpolation", choices=("bicubic", "bilinear", "random"))
    add("--image-resize-mode", choices=("shortest", "longest", "squash"))
    add("--force-image-size", type=int, nargs="+", metavar="PX")
    add("--force-quick-gelu", action=argparse.BooleanOptionalAction)
    add("--force-custom-text", action=argparse.BooleanOptionalAction)
    add("--force-context-length", type=int, metavar="N")
    add("--cache-dir", metavar="DIR", help="where open_clip keeps downloaded weights")


def run_flags(args: argparse.Namespace) -> Settings:
    """The trainer's flags on the command line.

    Raises:
        EvaluationError: one cannot be.
    """
    from arf_plugin.evaluation.run_settings import settings_of

    return settings_of(vars(args), "The command line")


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say how to measure; :func:`device_options` hands them on."""
    add = parser.add_argument_group("device").add_argument
    add("--batch-size", type=options.positive, default=256, metavar="N", help="default: %(default)s")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:N")
    amp = "amp: autocast, as CLIP_benchmark does by default (default: %(default)s)"
    add("--precision", choices=("fp32", "amp"), default="fp32", help=amp)
    workers = "processes that decode images (default: %(default)s)"
    add("--workers", type=int, default=min(4, os.cpu_count() or 1), metavar="N", help=workers)
    models = (
        "in memory together; images are decoded once per such group (default: what half of the memory holds)"
    )
    add("--models-at-once", type=options.positive, metavar="N", help=models)
    add("--quiet", action="store_true", help="print the result alone: no progress, no warnings")


def device_options(args: argparse.Namespace) -> dict[str, Any]:
    """How to measure, as :func:`arf_plugin.evaluation.run.evaluate` takes it."""
    names = ("batch_size", "device", "precision", "workers", "models_at_once", "cache_dir")
    return {**{name: getattr(args, name) for name in names}, "flags": run_flags(args)}


def warn_as(command: str, first: bool = True) -> None:
    """Has warnings shown as one line of the command's, by the first of several processes."""

    def show(message: Warning | str, *rest: object, **named: object) -> None:
        if first:
            print(f"{command}: warning: {printable(str(message))}", file=sys.stderr)

    warnings.showwarning = show


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from arf_plugin.evaluation.distributed import Processes
    from arf_plugin.evaluation.run import evaluate
    from arf_plugin.evaluation.tables import summary, table
    from arf_plugin.files import write_json

    first = Processes().first
    warn_as("arf evaluate", first)
    records, content, shown = None, {}, []
    if args.model is not None:
        suite, sets = find(args, args.split, dry_run=args.dry_run)
        candidates = _candidates(args)
        if args.dry_run:
            print(_plan(args, sets, candidates))
            return 0
        how = {**device_options(args), "pretrained": args.pretrained, "out": args.out}
        records = evaluate(candidates, args.model, sets, suite=suite.name if suite else None, **how)
        content, shown = summary(records, suite), [table(records, suite)]
    elif args.compare is None or args.checkpoints or args.dry_run:
        raise FlagError("--model is needed to measure: an open_clip model, local-dir:FOLDER or hf-hub:NAME.")
    if first:
        if args.compare:
            compared, text = compare(args, records)
            content, shown = {**content, **compared}, [*shown, text]
        if args.json:
            write_json(args.json, content)
        print("\n\n".join(shown))
    return 0


def compare(args: argparse.Namespace, measured: list[EvalRecord] | None) -> tuple[dict[str, Any], str]:
    """Compares two arms by image.

    Args:
        args: the command line.
        measured: records of this command; None if it has measured nothing.

    Returns:
        The verdicts for JSON, and as text.

    Raises:
        EvaluationError: the arms are not there, or nothing can be paired.
    """
    from arf_plugin.evaluation import verdicts
    from arf_plugin.evaluation.records import read_records
    from arf_plugin.evaluation.suites import known_suites, load_suite
    from arf_plugin.evaluation.tables import comparison_table

    files = [measured is None and Path(name).suffix == ".jsonl" for name in args.compare]
    if args.among or measured is None:
        pools = [read_records(path) for path in args.among or [args.out] if path]
    else:
        pools = [measured]
    if not all(files) and (not pools or (any(files) and len(pools) > 1)):
        raise FlagError(
            f"--compare {' '.join(map(printable, args.compare))}: expected two files of records (.jsonl), or two arms "
            "and the files that their records are in (--among FILE, or --out)."
        )

    def arms(name: str, pools: list[list[EvalRecord]]) -> list[verdicts.ByRun]:
        # What is compared is top-1, whatever heads a set's column.
        of_split = [
            [{**one, "headline": "top1"} for one in pool if one.get("split") in (None, args.split)]
            for pool in pools
        ]
        return [verdicts.find_arm(pool, name) for pool in of_split]

    sides = [
        arms("*", [read_records(Path(name))]) if is_file else arms(name, pools)
        for name, is_file in zip(args.compare, files, strict=True)
    ]
    before, after = verdicts.joined(*sides)
    records = [record for run in after.values() for record in run.values()]
    suites = {record.get("suite") for record in records} & set(known_suites())
    suite = args.suite or (suites.pop() if len(suites) == 1 else None)
    averages = load_suite(suite).averages if suite else {}
    by_set = verdicts.compare(
        after, before, verdicts.single(record["set"] for record in records), mean=not averages
    )
    by_average = verdicts.compare(after, before, averages, mean=True)
    if not by_set.verdicts:
        why = "; ".join(dict.fromkeys(by_set.unpaired.values())) or "no run of one has a run of the other"
        raise EvaluationError(f"{' and '.join(map(printable, args.compare))} cannot be compared: {why}.")
    told = {"before": args.compare[0], "after": args.compare[1], "unpaired": by_set.unpaired}
    for key, one in (("sets", by_set), ("averages", by_average)):
        told[key] = {name: verdict.as_json() for name, verdict in one.verdicts.items()}
    return {"compare": told}, comparison_table(*args.compare, by_set, by_average)


def find(
    args: argparse.Namespace, split: str, dry_run: bool = False
) -> tuple[Suite | None, list[EvaluationSet]]:
    """Opens the sets that the command line names.

    Raises:
        EvaluationError: if some are missing, unless `--skip-missing` or `dry_run` allows it.
    """
    from arf_plugin.evaluation.sets import find_sets
    from arf_plugin.evaluation.sources import find_suite, missing_text
    from arf_plugin.evaluation.suites import load_suite

    if bool(args.suite) == bool(args.data):
        raise EvaluationError(
            "Name either a suite (--suite NAME --data-root FOLDER) or folders of sets (--data FOLDER)."
        )
    if not args.suite:
        return None, [found for folder in args.data for found in find_sets(folder, split)]
    suite = load_suite(args.suite)
    if args.data_root is None:
        raise EvaluationError(f"--suite {args.suite} needs --data-root FOLDER, the folder its sets are in.")
    found = find_suite(suite, args.data_root, split, args.sets)
    if found.missing and not (args.skip_missing or dry_run):
        raise EvaluationError(
            f"{missing_text(suite, found)}\nCopy them there, name those that are with --sets, or use --skip-missing."
        )
    if found.missing:
        warnings.warn(missing_text(suite, found), stacklevel=2)
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
    """What a run would do; of the model's own weights it is not known what is finished."""
    from arf_plugin.console import text_table
    from arf_plugin.evaluation.records import Results
    from arf_plugin.evaluation.run import describe, describe_set

    described = []
    for candidate in candidates:
        if candidate.checkpoint is not None:
            candidate.check()
            way = candidate.resolve(args.model, run_flags(args), args.pretrained)[0]
            told = {"model": args.model, "precision": args.precision, "preprocess": way.flags()}
            described.append({**describe(candidate, args.model), **told})
    results = Results(None, Results.read(args.out))
    lines = []
    for dataset in sets:
        finished = sum(results.has({**one, **describe_set(dataset)}) for one in described)
        done = f"{finished}/{len(candidates)}"
        lines.append((dataset.name, dataset.place, dataset.images, len(dataset.classnames), done))
    images = sum(dataset.images for dataset in sets)
    problems = [f"warning: {problem}" for dataset in sets if (problem := dataset.truncated())]
    total = f"{len(sets)} sets, {images} images, {len(candidates)} checkpoints or mixtures"
    plan = text_table(("set", "place", "images", "classes", "finished"), lines, left=2)
    return "\n".join([plan, *map(printable, problems), total])
