"""Image captioners from Hugging Face transformers: BLIP, GIT, VisionEncoderDecoder, image-text-to-text models."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arf_plugin.anchors.files import folder_digest
from arf_plugin.errors import MissingDependencyError, StageError

if TYPE_CHECKING:
    import PIL.Image
    import torch


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


def captioner_identity(name: str) -> str:
    """Name of a hub model, or a digest of a local folder: what determines the captions."""
    return f"sha256:{folder_digest(Path(name))}" if Path(name).is_dir() else name


class Captioner:
    """A captioner on a device.

    Args:
        name: folder in the Hugging Face layout, or a model name on the hub.
        device: torch device.
        dtype: of the weights and pixels.
        generation: see :class:`Generation`.

    Raises:
        MissingDependencyError: without transformers.
        StageError: if the folder holds no captioner that transformers can load.
    """

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype, generation: Generation) -> None:
        try:
            import transformers
        except ImportError:
            raise MissingDependencyError("transformers", "arf caption", "captions") from None
        transformers.utils.logging.disable_progress_bar()  # our own bar counts images
        self._device, self._dtype, self._generation = device, dtype, generation
        # Renamed in transformers 4.46; both map VisionEncoderDecoder, BLIP and GIT.
        auto = (
            getattr(transformers, "AutoModelForImageTextToText", None) or transformers.AutoModelForVision2Seq
        )
        try:
            self._model = auto.from_pretrained(name).to(device, dtype).eval()
            self._processor = _load_processor(transformers, name)
        except (OSError, ValueError, KeyError, ImportError) as cause:
            raise StageError(
                f"{name!r} cannot be loaded as an image captioner: {cause}\n"
                "Expected a folder in the Hugging Face layout (config.json, weights, tokenizer, image processor) of a "
                "model such as BLIP, GIT or VisionEncoderDecoder, or such a model's name on the hub."
            ) from cause

    def inputs(self, images: list[PIL.Image.Image]) -> dict[str, Any]:
        """Turns RGB images into the model's inputs, on the CPU."""
        prompt = self._generation.prompt
        if not prompt:
            return dict(self._processor(images=images, return_tensors="pt"))
        if getattr(self._processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            prompt = self._processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        return dict(
            self._processor(images=images, text=[prompt] * len(images), return_tensors="pt", padding=True)
        )

    def captions(self, inputs: dict[str, Any]) -> list[list[str]]:
        """Generates captions for a batch; per image, as many as asked for."""
        import torch

        moved = {
            name: value.to(self._device, self._dtype) if value.is_floating_point() else value.to(self._device)
            for name, value in inputs.items()
        }
        with torch.inference_mode():
            tokens = self._model.generate(**moved, **self._generation.arguments())
        count = self._generation.captions_per_image
        prompt = moved.get("input_ids")
        if prompt is not None and tokens.shape[1] >= prompt.shape[1]:
            repeated = prompt.repeat_interleave(count, dim=0)
            if torch.equal(
                tokens[:, : prompt.shape[1]], repeated
            ):  # models without an encoder echo the prompt
                tokens = tokens[:, prompt.shape[1] :]
        texts = self._processor.batch_decode(tokens, skip_special_tokens=True)
        return [texts[start : start + count] for start in range(0, len(texts), count)]


class _Pair:
    """An image processor and a tokenizer as one processor, for models that are saved without one."""

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self._image_processor, self._tokenizer = image_processor, tokenizer

    def __call__(self, images: list[Any], text: list[str] | None = None, **options: Any) -> dict[str, Any]:
        if text is not None:
            raise StageError(
                "This captioner takes no prompt (it has no joint processor). Leave out --prompt."
            )
        return self._image_processor(images=images, **options)

    def batch_decode(self, tokens: Any, **options: Any) -> list[str]:
        return self._tokenizer.batch_decode(tokens, **options)


def _load_processor(transformers: Any, name: str) -> Any:
    """The model's joint processor; AutoProcessor returns only half of it for VisionEncoderDecoder folders."""
    try:
        processor = transformers.AutoProcessor.from_pretrained(name)
        if hasattr(processor, "image_processor") and hasattr(processor, "tokenizer"):
            return processor
    except (OSError, ValueError):
        pass
    image_processor = transformers.AutoImageProcessor.from_pretrained(name)
    return _Pair(image_processor, transformers.AutoTokenizer.from_pretrained(name))
