"""arf evaluate against a bare loop of CLIP_benchmark, and a sweep of eleven alphas against eleven evaluations.

python scripts/bench/evaluate.py --json runs/bench/evaluate.json
python scripts/bench/evaluate.py --model ViT-B-32 --data sets/imagenetv2 --workers 8

The bare loop is CLIP_benchmark's own functions in the order of its `eval` command: model, WebDataset folder,
classifier, classification, all with the same number of workers. Left out is its last step, the counting, which fails
with numpy 2.4; on our side it is in, and so are the checkpoint's digest, the index of the tars and the calibration
error. The sweep and the eleven evaluations are timed in one process: starting Python eleven times would be in the
sweep's favour.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import open_clip
import torch
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics.zeroshot_classification import run_classification, zero_shot_classifier
from clip_benchmark.models import load_clip
from common import Bar, interleave, paired_ratio, parser, report
from PIL import Image

from arf_plugin.evaluation.candidates import Candidate
from arf_plugin.evaluation.run import evaluate
from arf_plugin.evaluation.sets import find_sets

ALPHAS = [number / 10 for number in range(11)]
VISION = {"image_size": 224, "patch_size": 32, "width": 256, "layers": 6, "head_width": 64}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2}


def main() -> int:
    args_parser = parser(__doc__.split("\n")[0], rounds=5)
    args_parser.add_argument("--images", type=int, default=1200, help="in the set that is made up")
    args_parser.add_argument("--tars", type=int, default=6, help="it has")
    args_parser.add_argument("--classes", type=int, default=20, help="it has")
    args_parser.add_argument("--data", type=Path, help="a set of one's own in CLIP_benchmark's layout")
    args_parser.add_argument("--model", help="an architecture of open_clip's; a small ViT if not given")
    args_parser.add_argument("--batch-size", type=int, default=128)
    args_parser.add_argument("--workers", type=int, default=2)
    args = args_parser.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(_Quiet(sys.stderr)):
        folder = Path(name)
        data = args.data or write_set(folder / "set", args.images, args.tars, args.classes)
        model = args.model or add_model(folder / "models")
        original, tuned = save_ends(model, folder)
        settings = {"batch_size": args.batch_size, "workers": args.workers, "device": "cpu"}
        mixtures = [Candidate(tuned, original, alpha) for alpha in ALPHAS]

        def ours(*candidates: Candidate) -> list:
            return evaluate(candidates, model, find_sets(data), models_at_once=len(ALPHAS), **settings)

        images = ours(Candidate(original))[0]["images"]
        plain = interleave(
            {
                "CLIP_benchmark": lambda: bare(model, original, data, args.batch_size, args.workers),
                "arf evaluate": lambda: ours(Candidate(original)),
            },
            args.rounds,
        )
        sweep = interleave(
            {
                "11 evaluations": lambda: [ours(mixture) for mixture in mixtures],
                "sweep of 11 alphas": lambda: ours(*mixtures),
            },
            max(1, args.rounds // 2),
            warmup=0,
        )
    rates = {name: images / statistics.median(seconds) for name, seconds in plain.items()}
    facts = {
        "set": f"{images} images, batches of {args.batch_size}, {args.workers} workers",
        "model": args.model or f"ViT, width {VISION['width']}, {VISION['layers']} layers, 224 pixels",
        **{f"{name}, images/s": f"{rate:.1f}" for name, rate in rates.items()},
        "sweep, of the time of 11 evaluations": f"{paired_ratio(*reversed(sweep.values())):.2f}",
    }
    faster = paired_ratio(plain["CLIP_benchmark"], plain["arf evaluate"])
    bars = [
        Bar("rate, of CLIP_benchmark's", faster, 1.0, at_most=False),
        Bar("time of a sweep, of 11 evaluations", paired_ratio(*reversed(sweep.values())), 1.0),
    ]
    return report("evaluate: cost of measuring", {**plain, **sweep}, bars, args.json, **facts)


def bare(model: str, checkpoint: Path, data: Path, batch_size: int, workers: int) -> None:
    """What `clip_benchmark eval --dataset wds/... --no_amp` does up to the counting."""
    built, transform, tokenizer = load_clip("open_clip", model, str(checkpoint), None, device="cpu")
    built.eval()
    dataset = build_dataset("wds/set", root=str(data), transform=transform, split="test")
    loader = torch.utils.data.DataLoader(dataset.batched(batch_size), batch_size=None, num_workers=workers)
    classifier = zero_shot_classifier(built, tokenizer, dataset.classes, dataset.templates, "cpu", amp=False)
    run_classification(built, classifier, loader, "cpu", amp=False)


def write_set(root: Path, images: int, tars: int, classes: int) -> Path:
    """Images as large as web images are, 400 x 300, with soft structure and some noise."""
    rng = np.random.default_rng(0)
    (root / "test").mkdir(parents=True)
    for number in range(tars):
        with tarfile.open(root / "test" / f"{number}.tar", "w") as tar:
            for i in range(images // tars):
                coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((400, 300))
                pixels = np.asarray(coarse) + rng.normal(0, 8, (300, 400, 3))
                buffer = io.BytesIO()
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
                key = f"{number:02d}{i:05d}"
                for name, content in (
                    (f"{key}.jpg", buffer.getvalue()),
                    (f"{key}.cls", str(i % classes).encode()),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    (root / "test" / "nshards.txt").write_text(f"{tars}\n")
    (root / "classnames.txt").write_text("".join(f"thing number {i}\n" for i in range(classes)))
    templates = ("a photo of a {c}.", "a picture of a {c}.", "a good photo of a {c}.", "this is a {c}.")
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n")
    return root


def add_model(folder: Path) -> str:
    """Tells open_clip of a small architecture; returns its name."""
    folder.mkdir()
    config = {"embed_dim": 128, "vision_cfg": VISION, "text_cfg": TEXT}
    (folder / "small-vit.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return "small-vit"


def save_ends(model: str, folder: Path) -> tuple[Path, Path]:
    """Two checkpoints of the architecture: random weights, and these a little changed."""
    state = open_clip.create_model(model).state_dict()
    torch.save({"state_dict": state}, folder / "original.pt")
    changed = {k: v + 0.01 * torch.randn_like(v) if v.is_floating_point() else v for k, v in state.items()}
    torch.save({"state_dict": changed}, folder / "tuned.pt")
    return folder / "original.pt", folder / "tuned.pt"


class _Quiet(io.TextIOBase):
    """Standard error without the bars of the runs that are timed."""

    def __init__(self, shown) -> None:
        self.shown = shown

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> int:
        return self.shown.write(text) if "rounds" in text else len(text)


if __name__ == "__main__":
    sys.exit(main())
