"""The tiny models of both benchmarks, and which hyper-parameters there are; the values are in their recipe.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# open_clip's model configuration: a ResNet-10 and a text tower of two layers, for 48-pixel images.
MODEL: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 128,
        "vision_cfg": {
            "timm_model_name": "resnet10t",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 48,
        },
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2},
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "squash",
    },
}

# The same with a vision transformer of open_clip's own: 64 patches of six pixels, about as many FLOPs.
VIT: dict[str, Any] = {
    **MODEL,
    "model_cfg": {
        **MODEL["model_cfg"],
        "vision_cfg": {"image_size": 48, "patch_size": 6, "layers": 6, "width": 128, "head_width": 32},
    },
}


# CPU threads of whatever runs alone: sums are made in another order with more, so figures would differ in their noise.
THREADS = 2


@dataclass(frozen=True)
class Training:
    """Arguments of one run of open_clip's trainer.

    Attributes:
        epochs: passes over the training data.
        batch_size: samples per step.
        lr: peak learning rate; warm-up, then cosine.
        warmup: steps of warm-up.
        scale: smallest share of an image's area that a random crop keeps.
        weight_decay: AdamW's.
        samples: samples per epoch; 0 takes all.
    """

    epochs: int
    batch_size: int
    lr: float
    warmup: int
    scale: float
    weight_decay: float = 0.1
    samples: int = 0

    def arguments(self) -> list[str]:
        """As flags of open_clip's trainer."""
        return [
            *("--epochs", str(self.epochs)),
            *("--batch-size", str(self.batch_size)),
            *("--lr", str(self.lr)),
            *("--wd", str(self.weight_decay)),
            *("--warmup", str(self.warmup)),
            *("--aug-cfg", f"scale=({self.scale},1.0)"),
            *(("--train-num-samples", str(self.samples)) if self.samples else ()),
        ]


@dataclass(frozen=True)
class Recipe:
    """What a benchmark runs.

    Attributes:
        pretraining: the tiny CLIP, on the pretraining pool.
        captioner_steps: steps of the captioner's training, on the same.
        neighbours: pool pairs retrieved per task image (k).
        fine_tuning: the same for every arm.
        wise: WiSE-FT's alpha.
    """

    pretraining: Training
    captioner_steps: int
    neighbours: int
    fine_tuning: Training
    wise: float = 0.5


# A smoke run: every step, but too short to mean anything.
FAST = Recipe(
    pretraining=Training(epochs=2, batch_size=64, lr=1e-3, warmup=10, scale=0.6, samples=512),
    captioner_steps=20,
    neighbours=2,
    fine_tuning=Training(epochs=2, batch_size=64, lr=5e-4, warmup=2, scale=0.6),
)
