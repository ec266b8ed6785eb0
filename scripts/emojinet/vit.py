"""Pretrains EmojiNet's CLIP with a vision transformer in the ResNet's place, for the grid emojinet-frontier-vit.

python scripts/emojinet/vit.py data/emojinet runs/ablation/vit          half an hour and more on two cores
python scripts/emojinet/vit.py DATA OUT --fast                          a smoke run
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from emojinet.quickstart import pattern
from emojinet.recipe import FAST, VIT, VIT_PRETRAINING
from emojinet.trainer import Run, TrainingError, model_folder, train


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="EmojiNet's folder")
    parser.add_argument("out", type=Path, help="OUT/clip will be the model")
    parser.add_argument("--fast", action="store_true", help="hardly any training")
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    training = FAST.pretraining if args.fast else VIT_PRETRAINING
    shards = sorted((args.data / "pretraining").glob("*.tar"))
    untrained = model_folder(args.out / "clip-config", config=VIT)
    try:
        weights = train(Run(args.out / "pretraining", untrained, pattern(shards), training), "pretrain")
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(model_folder(args.out / "clip", weights, VIT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
