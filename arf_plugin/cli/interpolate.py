"""``arf interpolate``: WiSE-FT, the mean of two checkpoints' weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from arf_plugin.cli import options

EXAMPLES = """\
  arf interpolate original.pt logs/run/checkpoints/epoch_10.pt --alpha 0.5 --out wise.pt
  for a in 0.2 0.4 0.6 0.8; do arf interpolate original.pt tuned.pt --alpha $a --out wise-$a.pt; done
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the parser of ``arf interpolate``."""
    parser = options.add_parser(
        subparsers,
        "interpolate",
        "mix two checkpoints in weight space (WiSE-FT)",
        "Writes (1 - alpha) * ORIGINAL + alpha * TUNED, tensor by tensor, as an ordinary checkpoint.",
        EXAMPLES,
    )
    parser.add_argument("original", type=Path, metavar="ORIGINAL", help="checkpoint before fine-tuning")
    parser.add_argument("tuned", type=Path, metavar="TUNED", help="checkpoint after fine-tuning")
    parser.add_argument(
        "--alpha", type=float, default=0.5, help="0: ORIGINAL, 1: TUNED (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .pt or .safetensors file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from arf_plugin.evaluation.interpolation import interpolate_files

    interpolate_files(args.original, args.tuned, args.alpha, args.out)
    print(args.out)
    return 0
