"""Small real models and evaluation sets."""

from __future__ import annotations

import json
from pathlib import Path

from support import building
from support.tars import write_tar

NAMES = [f"{colour} thing" for colour in building.COLOURS]
TEMPLATES = ["a drawing of a {c}.", "this is a {c}"]


def save_config(folder: Path) -> str:
    """A tiny CLIP's configuration without weights; returns its model name."""
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return f"local-dir:{folder}"


def weights(clip: str, seed: int) -> dict:
    """Random weights, larger than at the start of training, so that images' features and predictions differ."""
    import open_clip
    import torch

    torch.manual_seed(seed)
    return {k: 5 * v if v.ndim > 1 else v for k, v in open_clip.create_model(clip).state_dict().items()}


def save_checkpoint(clip: str, path: Path, seed: int) -> Path:
    """Random weights as open_clip's trainer saves them."""
    import torch

    torch.save({"epoch": 1, "state_dict": weights(clip, seed), "optimizer": {}}, path)
    return path


def save_model(folder: Path, seed: int) -> str:
    """A tiny CLIP with random weights of its own; returns its model name."""
    from safetensors.torch import save_file

    clip = save_config(folder)
    own = {name: tensor.contiguous() for name, tensor in weights(clip, seed).items()}
    save_file(own, folder / "open_clip_model.safetensors")
    return clip


def write_set(
    root: Path, images: int = 18, shards: int = 2, split: str = "test", names: list[str] | None = None
) -> Path:
    """A set in CLIP_benchmark's WebDataset layout: drawings whose class is their colour."""
    per = images // shards
    for shard in range(shards):
        members = []
        for n in range(per * shard, per * (shard + 1)):
            members += [(f"{n:04d}.jpg", building.drawing(n)), (f"{n:04d}.cls", str(n % 6).encode())]
        write_tar(root / split / f"{shard}.tar", members)
    (root / split / "nshards.txt").write_text(f"{shards}\n")
    write_texts(root, names)
    return root


def write_texts(root: Path, names: list[str] | None = None) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "classnames.txt").write_text("\n".join(names or NAMES) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")


def write_folders(root: Path, images: int = 12) -> Path:
    """The same drawings in one folder per colour."""
    for n in range(images):
        folder = root / f"{building.COLOURS[n % 6]}_thing"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{n:03d}.png").write_bytes(building.drawing(n, "PNG"))
    return root


def select(records: list[dict], **wanted: object) -> list[dict]:
    """Records whose fields equal those named: ``select(records, set="id", alpha=None)``."""
    return [record for record in records if all(record.get(name) == value for name, value in wanted.items())]
