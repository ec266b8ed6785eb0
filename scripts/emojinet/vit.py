"""Pretrains EmojiNet's CLIP with a vision transformer in the ResNet's place, for the grid emojinet-frontier-vit.

A transformer learns slowly from so few images. It has a ready teacher here: the text tower begins as that of the
quickstart's CLIP, which was trained on the same pool; both towers then train by the quickstart's own recipe.

python scripts/emojinet/vit.py data/emojinet runs/quickstart runs/ablation/vit      a quarter of an hour on two cores
python scripts/emojinet/vit.py DATA RUN OUT --fast                                  a smoke run
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.pretrain import start
from benchmarks.recipe import THREADS, VIT
from benchmarks.trainer import Run, TrainingError, model_folder, pattern, train

from arf_plugin.ablation.launch import cpu_threads
from emojinet.recipe import FAST, FULL


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="EmojiNet's folder")
    parser.add_argument("run", type=Path, help="a quickstart's folder")
    parser.add_argument("out", type=Path, help="OUT/clip will be the model")
    parser.add_argument("--fast", action="store_true", help="hardly any training")
    args = parser.parse_args()
    os.environ.update(cpu_threads(THREADS))
    training = (FAST if args.fast else FULL).pretraining
    shards = sorted((args.data / "pretraining").glob("*.tar"))
    begun = start(args.run, args.out / "clip-config")
    try:
        weights = train(Run(args.out / "pretraining", begun, pattern(shards), training), "pretrain")
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(model_folder(args.out / "clip", weights, VIT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
