"""``arf probe``: a linear probe, as a checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arf_plugin.cli import options
from arf_plugin.cli.evaluate import add_run_flags, run_flags, warn_as
from arf_plugin.errors import FlagError
from arf_plugin.flags import number_type

if TYPE_CHECKING:
    from arf_plugin.evaluation.probe import Features

EXAMPLES = """\
  arf probe --train-data 'task/{000..099}.tar' --classnames imagenet --out probe.pt \\
      --model ViT-B-16-quickgelu --pretrained openai
  arf probe --train-data ... --validation 'val/{00..09}.tar' --classnames names.txt --model local-dir:clip \\
      --out probe.pt
  arf evaluate probe.pt --model ViT-B-16 ...             the head on sets of its classes, zero-shot on the others
  torchrun -m open_clip_train.main --arf-head probe.pt --arf-classnames names.txt --train-data ...             LP-FT
"""
_fraction = number_type(float, lambda value: 0 < value < 1, "a part, between 0 and 1 (0.1 is a tenth)")


def register(subparsers: argparse._SubParsersAction[Any]) -> None:
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
    add = parser.add_argument
    add("--classnames", required=True, metavar="FILE", help="class names, one per line, or imagenet")
    add("--out", type=Path, required=True, metavar="FILE", help="the checkpoint, .pt or .safetensors")
    add("--json", action="store_true", help="print the summary as JSON")
    add = parser.add_argument_group("model").add_argument
    add("--model", required=True, metavar="M", help="open_clip model, local-dir:FOLDER or hf-hub:NAME")
    add("--pretrained", metavar="P", help="open_clip tag or checkpoint file")
    add_run_flags(parser)
    add = parser.add_argument_group("validation").add_argument
    validation = "task data to choose the penalty by; the probe is then fitted to the other data alone"
    add("--validation", metavar="DATA", help=validation)
    part = (
        "without --validation: part of each class to choose by; the probe is then fitted to all (%(default)s)"
    )
    add("--validation-fraction", type=_fraction, default=0.2, metavar="F", help=part)
    add("--seed", type=int, default=0, help="draws that part (default: %(default)s)")
    add = parser.add_argument_group("device").add_argument
    add("--batch-size", type=options.positive, default=256, metavar="N", help="default: %(default)s")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:N")
    add("--workers", type=int, default=2, metavar="N", help="threads that decode images (%(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from arf_plugin.anchors.task import scan_task_ids
    from arf_plugin.console import progress
    from arf_plugin.data.prompts import load_classnames
    from arf_plugin.evaluation.candidates import Candidate, build, weights_file
    from arf_plugin.evaluation.checkpoints import write_weights
    from arf_plugin.evaluation.probe import GRID, embed, labelled_images, probe
    from arf_plugin.evaluation.run_settings import Run, note
    from arf_plugin.pipeline.execution import pick_device

    warn_as("arf probe")
    names = load_classnames(args.classnames, "--classnames")
    device = pick_device(args.device)
    if not args.pretrained and ":" not in args.model:
        raise FlagError(
            f"--model {args.model} needs weights: add --pretrained TAG_OR_FILE (tags: open_clip.list_pretrained()), or "
            "name a model that brings them along (local-dir:FOLDER, hf-hub:NAME)."
        )
    way, made_by = Candidate(None).resolve(args.model, run_flags(args), args.pretrained)
    if made_by is not None and made_by.settings.given():
        print(f"{args.pretrained}: probed with {way.flags()} ({made_by.source})", file=sys.stderr)
    model, preprocess, _ = build(
        args.model, args.pretrained, device, own_weights=True, settings=way, cache_dir=args.cache_dir
    )

    def embedded(what: str, data: str) -> Features:
        reading = (args.dataset_type, args.csv_img_key, args.csv_separator)
        samples = labelled_images(data, len(names), *reading)
        with progress(what, "images", len(scan_task_ids(data, *reading).ids)) as bar:
            return embed(model, preprocess, samples, device, args.batch_size, args.workers, bar.update)

    task = embedded("task data", args.task_data)
    validation = embedded("validation", args.validation) if args.validation else None
    with progress("fit", "penalties", len(GRID)) as bar:
        head, summary = probe(
            task, names, validation, args.validation_fraction, args.seed, advance=bar.update
        )
    _warn(summary, task)
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if made_by is None and args.pretrained:
        named = None if weights_file(args.model, args.pretrained) else args.pretrained
        made_by = Run(way, args.model if named else None, named, args.out)
    write_weights(
        args.out, {**weights, **head.tensors()}, f"linear probe of {args.model}", note(made_by, way)
    )
    if not args.json:
        for tried in summary.pop("grid"):
            chosen = "  chosen" if tried["l2"] == summary["l2"] else ""
            print(
                f"penalty {tried['l2']:<8.2g} validation top-1 {tried['top1']:5.1f} %, loss {tried['loss']:.4f}{chosen}"
            )
    options.show({"checkpoint": str(args.out), **summary}, args.json, "done")
    return 0


def _warn(summary: dict[str, Any], task: Features) -> None:
    warnings = []
    if task.skipped:
        name, reason = next(iter(task.skipped.items()))
        warnings.append(f"{len(task.skipped)} images were skipped, first: {name} {reason}")
    if absent := summary["classes_without_samples"]:
        warnings.append(f"{absent} classes have no sample and will never be predicted")
    if summary["at_edge_of_grid"]:
        warnings.append(f"the best penalty, {summary['l2']:g}, is at the edge of those that were tried")
    for text in warnings:
        print(f"warning: {text}", file=sys.stderr)
