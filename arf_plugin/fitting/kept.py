"""What a model has kept, without further data: does it still find the text of an image it was never fine-tuned on?

A thousand pairs of the pool that no anchor uses are set aside. On them, image-text retrieval (R@1 and R@5, the mean of
both directions, in percent) and CKA between the image features and those of the starting model (Kornblith et al.,
ICML 2019) are measured. Ours: retrieval asks for everything that the pool is about, where a zero-shot set asks for its
classes; it needs no labels.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from arf_plugin.anchors.images import IMAGE_EXTENSIONS, decode_image
from arf_plugin.anchors.pairs import RawPair, list_pair_shards, read_pairs
from arf_plugin.anchors.tars import add_member, scan_samples
from arf_plugin.errors import PoolError
from arf_plugin.evaluation.metrics import linear_cka
from arf_plugin.files import replacing

PAIRS = 1000
_BATCH = 64  # in a forward
_TARS = 8  # that pairs are taken from, at most: a pool may have thousands


def set_aside(pool: Sequence[str], anchors: Path | None, out: Path) -> list[RawPair]:
    """Pairs of a pool that no anchor uses, kept as one tar; those of the tar if it is there.

    Which ones depends on the pool's names alone, never on their order. A tar gives its first pairs.

    Raises:
        PoolError: A tar that cannot be read.
    """
    if out.is_file():
        return list(read_pairs(str(out)))
    used = {
        _content(pair.image)
        for url in (list_pair_shards(str(anchors)) if anchors else ())
        for pair in read_pairs(url)
    }
    chosen = sorted(pool, key=lambda url: hashlib.sha256(Path(url).name.encode()).digest())[:_TARS]
    each = -(-PAIRS // len(chosen))
    found: dict[bytes, tuple[str, bytes, bytes]] = {}
    for url in chosen:
        enough = len(found) + each
        for sample in scan_samples(url, PoolError, read=(*IMAGE_EXTENSIONS, "txt")):
            image, text = sample.image, sample.members.get("txt")
            if image is None or text is None or not image.data or not (text.data or b"").strip():
                continue
            content = _content(image.data)
            if content in used or content in found or _undecodable(image.data):
                continue
            found[content] = (image.ext, image.data, text.data or b"")
            if len(found) == enough:
                break
    with replacing(out) as temporary, tarfile.open(temporary, "w") as tar:
        for number, (ext, image_bytes, text_bytes) in enumerate(found.values()):
            add_member(tar, f"{number:06d}.{ext}", image_bytes)
            add_member(tar, f"{number:06d}.txt", text_bytes)
    return list(read_pairs(str(out)))


def _content(image: bytes) -> bytes:
    return hashlib.sha256(image).digest()


def _undecodable(image: bytes) -> bool:
    try:
        decode_image(image)
    except ValueError:
        return True
    return False


def features(
    model: Any, pairs: Sequence[RawPair], preprocess: Callable[[Any], torch.Tensor], tokenizer: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit features of images and texts of pairs, ``[n, D]`` each, float32 on the CPU."""
    device = next(model.parameters()).device
    images, texts = [], []
    with torch.inference_mode():
        for start in range(0, len(pairs), _BATCH):
            some = pairs[start : start + _BATCH]
            pixels = torch.stack([preprocess(decode_image(pair.image)) for pair in some])
            tokens = tokenizer([pair.text.decode("utf-8", "replace") for pair in some])
            images.append(model.encode_image(pixels.to(device), normalize=True).float().cpu())
            texts.append(model.encode_text(tokens.to(device), normalize=True).float().cpu())
    return torch.cat(images), torch.cat(texts)


def scores(
    found: tuple[torch.Tensor, torch.Tensor], start: tuple[torch.Tensor, torch.Tensor]
) -> dict[str, float]:
    """R@1 and R@5 in percent, the mean of both directions, and CKA to the start, 0 to 1."""
    image, text = found
    similarity = image @ text.T
    right = torch.arange(len(image))[:, None]
    values = {"cka": float(linear_cka(image, start[0]))}
    for k in (1, 5):
        hits = [
            (s.topk(min(k, len(s))).indices == right).any(1).float().mean()
            for s in (similarity, similarity.T)
        ]
        values[f"r@{k}"] = 100 * float(sum(hits)) / 2
    return values
