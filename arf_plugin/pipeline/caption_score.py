"""CLIP-score of captions: the cosine between the image and the caption, by an open_clip model.

Source: Hessel et al., "CLIPScore", EMNLP 2021, without its factor of 2.5 and its cut at zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arf_plugin.errors import FlagError
from arf_plugin.pipeline.embedder import load_model, model_identity

if TYPE_CHECKING:
    import PIL.Image
    import torch


@dataclass(frozen=True)
class Scoring:
    """Which model scores captions, and what it lets through.

    Attributes:
        model, pretrained: open_clip model.
        min_score: captions below are left out; None keeps all.
    """

    model: str
    pretrained: str | None = None
    min_score: float | None = None

    def __post_init__(self) -> None:
        if self.min_score is not None and not -1 <= self.min_score <= 1:
            raise FlagError(f"--min-score {self.min_score}: a cosine lies between -1 and 1.")

    def config(self) -> dict[str, Any]:
        """The settings as JSON."""
        return {"model": model_identity(self.model, self.pretrained), "min_score": self.min_score}


class CaptionScorer:
    """A model that scores captions, on a device.

    Args:
        scoring: which model.
        device: torch device.
        dtype: of weights and pixels.
    """

    def __init__(self, scoring: Scoring, device: torch.device, dtype: torch.dtype) -> None:
        self._model, self._preprocess, self._tokenizer = load_model(
            scoring.model, scoring.pretrained, device, dtype
        )
        self._device, self._dtype = device, dtype

    def pixels(self, images: list[PIL.Image.Image]) -> torch.Tensor:
        """Pixels [n, 3, H, W] of RGB images, on the CPU."""
        import torch

        return torch.stack([self._preprocess(image) for image in images])

    def scores(self, pixels: torch.Tensor, captions: list[list[str]]) -> list[list[float]]:
        """Scores the captions of each image."""
        import torch
        from torch.nn.functional import normalize

        texts = [caption for group in captions for caption in group]
        if not texts:
            return [[] for _ in captions]
        image = torch.tensor([i for i, group in enumerate(captions) for _ in group], device=self._device)
        with torch.inference_mode():
            images = normalize(self._model.encode_image(pixels.to(self._device, self._dtype)).float(), dim=-1)
            found = normalize(
                self._model.encode_text(self._tokenizer(texts).to(self._device)).float(), dim=-1
            )
        cosines = iter((images[image] * found).sum(dim=1).tolist())
        return [[next(cosines) for _ in group] for group in captions]
