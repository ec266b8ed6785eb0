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

from benchmarks.files import replacing
from benchmarks.recipe import THREADS, VIT
from benchmarks.trainer import Run, TrainingError, model_folder, train

from arf_plugin.ablation.launch import cpu_threads
from emojinet.quickstart import pattern
from emojinet.recipe import FAST, FULL

WEIGHTS = "open_clip_model.safetensors"


def start(run: Path, out: Path) -> str:
    """Makes the model that pretraining begins with: random images, known texts.

    Args:
        run: a quickstart's folder.
        out: folder of the model.

    Returns:
        What to give to `--model`.
    """
    import open_clip
    import torch
    from safetensors.torch import load_file, save_file

    name = model_folder(out, config=VIT)
    if not (out / WEIGHTS).is_file():
        torch.manual_seed(0)
        weights = open_clip.create_model(name).state_dict()
        known = load_file(run / "clip" / WEIGHTS)
        weights |= {key: known[key] for key in weights if not key.startswith("visual.")}
        with replacing(out / WEIGHTS) as temporary:
            save_file(weights, temporary)
    return name


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
