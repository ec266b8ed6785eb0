"""``arf probe``: a linear probe, as a checkpoint."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from arf_plugin.cli import options
from arf_plugin.errors import FlagError
from arf_plugin.evaluation import run_flags, settings
from arf_plugin.flags import number_type

if TYPE_CHECKING:
    import torch

    from arf_plugin.evaluation.probe import Features

EXAMPLES = """\
  arf probe --task-data 'task/{000..099}.tar' --classnames imagenet --out probe.pt \\
      --model ViT-B-16-quickgelu --pretrained openai
  arf probe --task-data ... --validation 'val/{00..09}.tar' --classnames names.txt --model local-dir:clip --out probe.pt
  arf evaluate probe.pt --model ViT-B-16 ...             the head on sets of its classes, zero-shot on the others
  torchrun -m open_clip_train.main --arf-head probe.pt --arf-classnames names.txt --train-data ...             LP-FT
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the parser of ``arf probe``."""
    parser = options.add_parser(
        subparsers,
        "probe",
        "fit a linear probe on frozen image features",
        "Fits multinomial logistic regression on the unit image features of the task data (KEY.cls, or a column\n"
        "'cls'). Validation accuracy chooses the penalty. Writes the model's weights with a linear head beside them:\n"
        "the baseline 'linear probe', and where LP-FT (--arf-head) starts. The result depends on no random numbers\n"
        "but the choice of a validation part.",
        EXAMPLES,
    )
    options.add_task_options(parser)
    parser.add_argument(
        "--classnames", required=True, metavar="FILE", help="class names, one per line, or imagenet"
    )
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", required=True, metavar="M", help="open_clip model, local-dir:FOLDER or hf-hub:NAME"
    )
    group.add_argument("--pretrained", metavar="P", help="open_clip tag or checkpoint file")
    settings.add_flags(parser)
    group = parser.add_argument_group("validation")
    group.add_argument(
        "--validation",
        metavar="DATA",
        help="task data to choose the penalty by; the probe is then fitted to --task-data alone",
    )
    group.add_argument(
        "--validation-fraction",
        type=number_type(float, lambda value: 0 < value < 1, "a part, between 0 and 1 (0.1 is a tenth)"),
        default=0.2,
        metavar="F",
        help="without --validation: part of each class to choose by; the probe is then fitted to all (%(default)s)",
    )
    group.add_argument("--seed", type=int, default=0, help="draws that part (default: %(default)s)")
    group = parser.add_argument_group("device")
    group.add_argument(
        "--batch-size", type=options.positive, default=256, metavar="N", help="default: %(default)s"
    )
    group.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:N")
    group.add_argument(
        "--workers", type=int, default=2, metavar="N", help="threads that decode images (%(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the checkpoint, .pt or .safetensors"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from arf_plugin.data.prompts import load_classnames
    from arf_plugin.evaluation.candidates import Candidate, build, weights_file
    from arf_plugin.evaluation.checkpoints import write_weights
    from arf_plugin.evaluation.probe import GRID, probe
    from arf_plugin.pipeline.device import pick_device
    from arf_plugin.pipeline.progress import Progress

    warnings.showwarning = lambda message, *rest, **named: print(f"warning: {message}", file=sys.stderr)
    names = load_classnames(args.classnames, "--classnames")
    device = pick_device(args.device)
    if not args.pretrained and ":" not in args.model:
        raise FlagError(
            f"--model {args.model} needs weights: add --pretrained TAG_OR_FILE (tags: open_clip.list_pretrained()), or "
            "name a model that brings them along (local-dir:FOLDER, hf-hub:NAME)."
        )
    flags = settings.of_flags(args)
    way, made_by = Candidate(None).resolve(args.model, flags, args.pretrained)
    if made_by is not None and made_by.settings.given():
        print(f"{args.pretrained}: probed with {way.flags()} ({made_by.source})", file=sys.stderr)
    model, preprocess, _ = build(
        args.model, args.pretrained, device, own_weights=True, settings=way, cache_dir=args.cache_dir
    )
    task = _features(args, "task data", args.task_data, model, preprocess, device, len(names))
    validation = None
    if args.validation:
        validation = _features(args, "validation", args.validation, model, preprocess, device, len(names))
    with Progress("fit", len(GRID), "penalties") as progress:
        head, summary = probe(
            task,
            names,
            validation,
            args.validation_fraction,
            args.seed,
            device,
            advance=progress.advance,
        )
    _warn(summary, task)
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if made_by is None and args.pretrained:
        named = None if weights_file(args.model, args.pretrained) else args.pretrained
        made_by = run_flags.Run(way, args.model if named else None, named, args.out)
    told = run_flags.note(made_by, way)
    write_weights(args.out, {**weights, **head.tensors()}, f"linear probe of {args.model}", told)
    if not args.json:
        for tried in summary.pop("grid"):
            chosen = "  chosen" if tried["l2"] == summary["l2"] else ""
            print(
                f"penalty {tried['l2']:<8.2g} validation top-1 {tried['top1']:5.1f} %, loss {tried['loss']:.4f}{chosen}"
            )
    options.show({"checkpoint": str(args.out), **summary}, args.json, "done")
    return 0


def _features(
    args: argparse.Namespace,
    what: str,
    data: str,
    model: torch.nn.Module,
    preprocess: object,
    device: torch.device,
    classes: int,
) -> Features:
    from arf_plugin.anchors.task import scan_task_ids
    from arf_plugin.evaluation.probe import embed, labelled_images
    from arf_plugin.pipeline.progress import Progress

    reading = (args.dataset_type, args.csv_img_key, args.csv_separator)
    total = len(scan_task_ids(data, *reading).ids)
    samples = labelled_images(data, classes, *reading)
    with Progress(what, total) as progress:
        return embed(model, preprocess, samples, device, args.batch_size, args.workers, progress.advance)  # type: ignore[arg-type]


def _warn(summary: dict, task: Features) -> None:
    if task.skipped:
        name, reason = next(iter(task.skipped.items()))
        print(f"warning: {len(task.skipped)} images were skipped, first: {name} {reason}", file=sys.stderr)
    if summary["classes_without_samples"]:
        print(
            f"warning: {summary['classes_without_samples']} classes have no sample and will hardly ever be predicted",
            file=sys.stderr,
        )
    if summary["at_edge_of_grid"]:
        print(
            f"warning: the best penalty, {summary['l2']:g}, is at the edge of those that were tried",
            file=sys.stderr,
        )
