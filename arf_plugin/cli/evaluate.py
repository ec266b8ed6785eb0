"""``arf evaluate``: zero-shot accuracy of checkpoints on sets in CLIP_benchmark's layout."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from arf_plugin.cli import options

EXAMPLES = """\
  arf evaluate logs/flyp/checkpoints/epoch_10.pt logs/arf/checkpoints/epoch_10.pt --model ViT-B-16 --data sets/imagenet
  arf evaluate --model ViT-B-16 --pretrained openai --data sets --json before.json       every set below a folder
  arf evaluate original.pt tuned.pt --wise 0.5 --model local-dir:clip --data sets    also: both mixed
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the parser of ``arf evaluate``."""
    parser = options.add_parser(
        subparsers,
        "evaluate",
        "zero-shot accuracy of checkpoints",
        "Measures top-1 accuracy of each checkpoint on each set (CLIP_benchmark's WebDataset layout).\n"
        "Images are decoded once for all checkpoints.",
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
        "--data", nargs="+", type=Path, required=True, metavar="FOLDER", help="a set, or a folder of sets"
    )
    parser.add_argument(
        "--wise",
        type=float,
        metavar="ALPHA",
        help="also mix the first checkpoint with each other one in weight space (WiSE-FT)",
    )
    parser.add_argument(
        "--batch-size", type=options.positive, default=256, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from arf_plugin.anchors.files import write_json
    from arf_plugin.evaluation.run import evaluate

    result = evaluate(
        args.checkpoints,
        args.model,
        args.data,
        pretrained=args.pretrained,
        wise=args.wise,
        batch_size=args.batch_size,
        device=args.device,
    )
    if args.json:
        write_json(args.json, result)
    print(table(result))
    return 0


def table(result: dict[str, Any]) -> str:
    """Lays results out as text: one line per set, one column per checkpoint, numbered below if names are long."""
    names = list(result["accuracy"])
    width = max(len(name) for name in [*result["samples"], "top-1 %"])
    lines = [
        f"{'top-1 %':<{width}} {'images':>7} " + " ".join(f"{f'[{i}]':>6}" for i in range(1, len(names) + 1))
    ]
    for dataset, count in result["samples"].items():
        figures = " ".join(f"{result['accuracy'][name][dataset]:6.1f}" for name in names)
        lines.append(f"{dataset:<{width}} {count:>7} {figures}")
    return "\n".join([*lines, *(f"[{i}] {name}" for i, name in enumerate(names, 1))])
