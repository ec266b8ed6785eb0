"""``arf check``: is an anchor set good, and does it fit the task data?"""

from __future__ import annotations

import argparse
import dataclasses
import json

from arf_plugin.cli import options
from arf_plugin.console import progress
from arf_plugin.flags import ArfConfig, spelling
from arf_plugin.untrusted import printable

EXAMPLES = """\
  arf check ANCHORS
  arf check ANCHORS --train-data 'task/{000..099}.tar'
  arf check ANCHORS --train-data 'task/{000..099}.tar' --arf-classnames names.txt --batch-size 512 --workers 4
  arf check ANCHORS --train-data train.csv --csv-img-key path --csv-separator , --full --json
"""

# Flags of training, as which the set is judged.
_FEATURES = "does the set have the features that training needs with the same flag?"
_AS_IN_TRAINING = {
    "missing_caption": "judge samples without a caption as training would with the same flag",
    "pair_loss": _FEATURES,
    "caption_loss": _FEATURES,
    "classnames": "class names, or imagenet: judge each sample's `cls` as training would with the same flag",
}


def register(subparsers: options.Subparsers) -> None:
    """Adds the parser of ``arf check``."""
    parser = options.add_parser(
        subparsers,
        "check",
        "validate an anchor set and say what training would see",
        "Checks captions and pairs, and the captions against the task data: coverage, counts, missing\n"
        "captions, unreadable images, pairs without text, duplicates. Exit status 1 if training would refuse the set.",
        EXAMPLES,
    )
    parser.add_argument("anchors", metavar="ANCHORS", help="folder or fsspec URL")
    options.add_task_options(parser, required=False)
    flags = {field.name: field for field in dataclasses.fields(ArfConfig)}
    for name, text in _AS_IN_TRAINING.items():
        takes = flags[name].metadata["options"] | {"help": text}
        parser.add_argument(spelling(name), default=flags[name].default, **takes)
    parser.add_argument(
        "--csv-caption-key", default="title", metavar="COLUMN", help="column of a CSV's texts"
    )
    shape = parser.add_argument_group("run", "with --batch-size, also: does every loader worker get a batch?")
    shape.add_argument("--batch-size", type=options.positive, metavar="N", help="per process, as in training")
    shape.add_argument("--accum-freq", type=options.positive, default=1, metavar="N")
    shape.add_argument("--workers", type=int, default=4, metavar="N", help="default: open_clip's %(default)s")
    shape.add_argument("--nproc-per-node", type=options.positive, default=1, metavar="N", help="processes")
    parser.add_argument(
        "--full",
        action="store_true",
        help="decode every image, rather than look at its last bytes, and trust no cache",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Checks and reports."""
    from arf_plugin.checks.report import check_anchor_set
    from arf_plugin.data.prompts import load_classnames
    from arf_plugin.data.startup import inputs_of, shape_of_run

    with progress("check", "shards") as bar:
        args.train_data = args.task_data
        inputs = inputs_of(
            args,
            anchors=args.anchors,
            **{name: getattr(args, f"arf_{name}") for name in _AS_IN_TRAINING if name != "classnames"},
            classes=load_classnames(args.arf_classnames) if args.arf_classnames else None,
            texts_known=args.arf_classnames is not None,
            full=args.full,
            advance=lambda url: bar.update(),
        )
        if args.batch_size and args.task_data:
            inputs.run = shape_of_run(args, len(inputs.pair_shards), args.nproc_per_node)
        report = check_anchor_set(inputs)
    if args.json:
        print(json.dumps(dataclasses.asdict(report), indent=2, ensure_ascii=False))
    else:
        print(printable("\n".join(report.lines())))
    return 1 if report.errors else 0
