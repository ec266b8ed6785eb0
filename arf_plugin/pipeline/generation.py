"""How captioners generate, whichever library they come from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from arf_plugin.errors import StageError

if TYPE_CHECKING:
    import PIL.Image


class ImageCaptioner(Protocol):
    """A captioner on its device."""

    def inputs(self, images: list[PIL.Image.Image]) -> dict[str, Any]:
        """Turns RGB images into the model's inputs, on the CPU."""

    def captions(self, inputs: dict[str, Any]) -> list[list[str]]:
        """Generates captions for a batch; per image, as many as asked for."""


@dataclass(frozen=True)
class Generation:
    """How captions are generated; names as in transformers' ``generate``.

    Attributes:
        num_beams: 1 is greedy search.
        max_new_tokens, min_new_tokens: length in tokens.
        top_p: nucleus sampling, if given; replaces beam search.
        temperature: of the sampling.
        captions_per_image: several need beams or sampling.
        prompt: text before the caption, for models that take one.
        seed: of the sampling.
    """

    num_beams: int = 1
    max_new_tokens: int = 30
    min_new_tokens: int = 0
    top_p: float | None = None
    temperature: float = 1.0
    captions_per_image: int = 1
    prompt: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.captions_per_image > 1 and self.top_p is None and self.num_beams < self.captions_per_image:
            raise StageError(
                f"{self.captions_per_image} captions per image need sampling (--top-p 0.9) or at least as many beams "
                f"(--num-beams {self.captions_per_image}; found {self.num_beams})."
            )

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``generate``."""
        values: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "num_return_sequences": self.captions_per_image,
            "num_beams": 1 if self.top_p else self.num_beams,
            "do_sample": self.top_p is not None,
        }
        if self.min_new_tokens:
            values["min_new_tokens"] = self.min_new_tokens
        if self.top_p is not None:
            values |= {"top_p": self.top_p, "temperature": self.temperature, "top_k": 0}
        return values

    def config(self) -> dict[str, Any]:
        """The settings as JSON."""
        return asdict(self)
