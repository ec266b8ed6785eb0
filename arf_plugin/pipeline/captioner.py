"""Image captioners from Hugging Face transformers: BLIP, GIT, VisionEncoderDecoder, image-text-to-text models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from arf_plugin.anchors.files import folder_digest
from arf_plugin.errors import MissingDependencyError, StageError
from arf_plugin.pipeline import coca
from arf_plugin.pipeline.generation import Generation, ImageCaptioner
from arf_plugin.untrusted import printable
from arf_plugin.weights import missing_weights, tensors_only

if TYPE_CHECKING:
    import PIL.Image
    import torch


def captioner_identity(name: str) -> str:
    """Name of a hub model, or a digest of a local folder: what determines the captions."""
    if name.startswith(coca.PREFIX):
        return coca.coca_identity(name)
    return f"sha256:{folder_digest(Path(name))}" if Path(name).is_dir() else name


def load_captioner(
    name: str, device: torch.device, dtype: torch.dtype, generation: Generation
) -> ImageCaptioner:
    """Loads a captioner of transformers, or of open_clip if the name says so; see the classes for errors."""
    kind = coca.CocaCaptioner if name.startswith(coca.PREFIX) else Captioner
    return kind(name, device, dtype, generation)


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
            with tensors_only():
                model, info = auto.from_pretrained(name, output_loading_info=True, trust_remote_code=False)
                self._model = model.to(device, dtype).eval()
                self._processor = _load_processor(transformers, name)
        except Exception as cause:  # of the libraries that read configurations, weights and tokenizers
            raise StageError(
                f"{name!r} cannot be loaded as an image captioner: {printable(str(cause))[:600]}\n"
                "Expected a folder in the Hugging Face layout (config.json, weights, tokenizer, image processor) of a "
                "model such as BLIP, GIT or VisionEncoderDecoder, or such a model's name on the hub."
            ) from cause
        if random := missing_weights(info):
            raise StageError(
                f"{len(random)} weights of the captioner {name!r} are not in its files and would be random: "
                f"{', '.join(random[:3])}{', ...' if len(random) > 3 else ''}. Expected a folder or a hub model with "
                "all weights of a captioner, not those of its vision or text model alone."
            )

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
        processor = transformers.AutoProcessor.from_pretrained(name, trust_remote_code=False)
        if hasattr(processor, "image_processor") and hasattr(processor, "tokenizer"):
            return processor
    except (OSError, ValueError):
        pass
    image_processor = transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    return _Pair(image_processor, transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False))
