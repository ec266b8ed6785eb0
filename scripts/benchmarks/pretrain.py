"""Pretrained models of a benchmark, and an anchor set with features for each; what is finished is skipped.

    python scripts/benchmarks/pretrain.py iconnet                            one ResNet and one transformer
    python scripts/benchmarks/pretrain.py emojinet --towers resnet --models 0 1 2 3 4
    python scripts/benchmarks/pretrain.py iconnet --fast --out /tmp/smoke    a smoke run

Writes OUT/TOWER-N/clip (a folder for `--model local-dir:...`), OUT/captioner (one for all models), OUT/TOWER-N/anchors.
N is the seed of pretraining. A transformer learns slowly from so few images, and has a ready teacher: its text tower
begins as that of the ResNet of the same number; both towers then train by the same recipe.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arf_plugin.ablation.launch import cpu_threads
from benchmarks import captioner
from benchmarks.files import replacing
from benchmarks.recipe import MODEL, THREADS, VIT, Recipe
from benchmarks.trainer import Run, TrainingError, call, model_folder, pattern, stop_all, train

WEIGHTS = "open_clip_model.safetensors"
TOWERS = {"resnet": MODEL, "vit": VIT}
# Images a second of pretraining on two idle cores; for estimates alone.
PRETRAINING_SPEED = {"resnet": 160, "vit": 90}


@dataclass(frozen=True)
class Benchmark:
    """One of the benchmarks.

    Attributes:
        name: "emojinet" or "iconnet".
        data: its folder.
        recipe: its hyper-parameters.
        related, unrelated: beginnings of the names of the pool's shards.
    """

    name: str
    data: Path
    recipe: Recipe
    related: str
    unrelated: str

    @property
    def task(self) -> str:
        """The task's training shards."""
        return pattern(sorted((self.data / "task" / "train").glob("*.tar")))

    def pool(self, prefix: str) -> str:
        """The pool's shards of a kind."""
        return pattern(sorted((self.data / "pool").glob(f"{prefix}-*.tar")))

    @property
    def pretraining(self) -> list[Path]:
        """The shards that models and captioner are trained on."""
        return sorted((self.data / "pretraining").glob("*.tar"))


def benchmark(name: str, data: Path | None = None, fast: bool = False) -> Benchmark:
    """A benchmark by its name; its data need not be there yet."""
    folder = data or Path("data") / name
    if name == "emojinet":
        from emojinet import recipe

        return Benchmark(name, folder, recipe.FAST if fast else recipe.FULL, "emoji", "icons")
    from iconnet import recipe as icon_recipe

    return Benchmark(name, folder, icon_recipe.FAST if fast else icon_recipe.FULL, "icons", "unrelated")


def build(bench: Benchmark) -> None:
    """Makes the benchmark's data, unless they are complete."""
    cache = bench.data.parent / "emojinet-cache"
    if bench.name == "emojinet":
        from emojinet.build import build as make
    else:
        from iconnet.build import build as make
    make(bench.data, cache)


def start(run: Path, out: Path, seed: int = 0) -> str:
    """Makes the transformer that pretraining begins with: random images, known texts.

    Args:
        run: the folder of a run with a pretrained ResNet, as `run/clip`.
        out: folder of the model.
        seed: of the image tower's weights.

    Returns:
        What to give to `--model`.
    """
    import open_clip
    import torch
    from safetensors.torch import load_file, save_file

    name = model_folder(out, config=VIT)
    if not (out / WEIGHTS).is_file():
        torch.manual_seed(seed)
        weights = open_clip.create_model(name).state_dict()
        known = load_file(run / "clip" / WEIGHTS)
        weights |= {key: known[key] for key in weights if not key.startswith("visual.")}
        with replacing(out / WEIGHTS) as temporary:
            save_file(weights, temporary)
    return name


def pretrain(bench: Benchmark, out: Path, tower: str, number: int, threads: int) -> str:
    """Pretrains a model; returns what `--model` gets."""
    folder = out / f"{tower}-{number}"
    if (folder / "clip" / WEIGHTS).is_file():
        return f"local-dir:{folder / 'clip'}"
    if tower == "vit":
        pretrain(bench, out, "resnet", number, threads)
        begun = start(out / f"resnet-{number}", folder / "clip-config", number)
    else:
        begun = model_folder(folder / "clip-config")
    run = Run(folder / "pretraining", begun, pattern(bench.pretraining), bench.recipe.pretraining, number)
    return model_folder(folder / "clip", train(run, f"pretrain {folder.name}", threads), TOWERS[tower])


def make_anchors(bench: Benchmark, out: Path, clip: str, name: str) -> None:
    """Builds the model's anchor set: captions, retrieved pairs, and what the model gives them."""
    speaker = out / "captioner"
    captioner.train(
        bench.pretraining, out / "resnet-0" / "clip" / WEIGHTS, speaker, bench.recipe.captioner_steps
    )
    pool = f"{bench.pool(bench.related)}::{bench.pool(bench.unrelated)}"
    call(
        [
            *("arf", "anchors", "--task-data", bench.task, "--pool", pool, "--model", clip),
            *("--captioner", str(speaker), "--prompt", captioner.IMAGE_TOKEN, "--max-new-tokens", "20"),
            *("--k", str(bench.recipe.neighbours), "--out", str(out / name / "anchors")),
        ]
    )


def minutes(bench: Benchmark, towers: list[str], numbers: list[int], out: Path) -> float:
    """What pretraining takes on two idle cores, roughly; without what is there already."""
    every = {*towers, "resnet"}  # a transformer needs its ResNet
    left = [t for t in every for n in numbers if not (out / f"{t}-{n}" / "clip" / WEIGHTS).is_file()]
    training = bench.recipe.pretraining
    return sum(training.epochs * training.samples / PRETRAINING_SPEED[t] for t in left) / 60


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", choices=("emojinet", "iconnet"))
    parser.add_argument("--towers", nargs="+", default=list(TOWERS), choices=list(TOWERS))
    parser.add_argument(
        "--models", nargs="+", type=int, default=[0], metavar="N", help="seeds of pretraining"
    )
    parser.add_argument("--data", type=Path, help="the benchmark's folder (default: data/BENCHMARK)")
    parser.add_argument("--out", type=Path, help="folder of the models (default: runs/BENCHMARK)")
    parser.add_argument("--threads", type=int, default=THREADS, help="CPU threads (default: %(default)s)")
    parser.add_argument("--no-anchors", action="store_true", help="models alone")
    parser.add_argument("--fast", action="store_true", help="hardly any training")
    args = parser.parse_args()
    os.environ.update(cpu_threads(args.threads))
    signal.signal(signal.SIGTERM, lambda *_: (stop_all(), sys.exit(143)))
    bench, out = benchmark(args.benchmark, args.data, args.fast), args.out or Path("runs") / args.benchmark
    try:
        build(bench)
        print(
            f"about {minutes(bench, args.towers, args.models, out):.0f} minutes on two idle cores", flush=True
        )
        began = time.monotonic()
        for number in args.models:
            for tower in args.towers:
                clip = pretrain(bench, out, tower, number, args.threads)
                if not args.no_anchors:
                    pretrain(bench, out, "resnet", 0, args.threads)  # through whose eyes the captioner looks
                    make_anchors(bench, out, clip, f"{tower}-{number}")
        print(f"{(time.monotonic() - began) / 60:.1f} minutes")
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
