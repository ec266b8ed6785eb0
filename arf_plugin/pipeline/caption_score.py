"""CLIP-score of captions: the cosine between the image and the caption, by an open_clip model.

Source: Hessel et al., "CLIPScore", EMNLP 2021, without its factor of 2.5 and its cut at zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arf_plugin.errors import FlagError
from arf_plugin.pipeline.embedder import ClipModel, LoadedClip

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Scoring:
    """Which model scores captions, and what it lets through.

    Attributes:
        model: the open_clip model.
        min_score: captions below are left out; None keeps all.
    """

    model: ClipModel
    min_score: float | None = None

    def __post_init__(self) -> None:
        if self.min_score is not None and not -1 <= self.min_score <= 1:
            raise FlagError(f"--min-score {self.min_score}: a cosine lies between -1 and 1.")

    def config(self) -> dict[str, Any]:
        """The settings as JSON."""
        return {"model": self.model.identity(), "min_score": self.min_score}


def scores(clip: LoadedClip, pixels: Sequence[torch.Tensor], captions: list[list[str]]) -> list[list[float]]:
    """Scores the captions of each of the images [3, H, W]."""
    texts = [caption for group in captions for caption in group]
    if not texts:
        return [[] for _ in captions]
    image = [i for i, group in enumerate(captions) for _ in group]
    cosines = iter((clip.images(pixels)[image] * clip.texts(texts)).sum(dim=1).tolist())
    return [[next(cosines) for _ in group] for group in captions]
