"""Image captioners of open_clip: CoCa models, named ``open_clip:MODEL`` or ``open_clip:MODEL@PRETRAINED``.

Decoding is ours and not ``CoCa.generate``, which needs names that current releases of transformers no longer have.
Greedy search, beam search and nucleus sampling follow the definitions of transformers' ``generate``; beams are ranked
by their mean log-probability per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from arf_plugin.errors import StageError
from arf_plugin.pipeline.embedder import load_model, model_identity
from arf_plugin.pipeline.generation import Generation

if TYPE_CHECKING:
    import PIL.Image
    import torch

PREFIX = "open_clip:"


def split_name(name: str) -> tuple[str, str | None]:
    """Model and pretrained tag or file of a captioner's name."""
    model, _, pretrained = name.removeprefix(PREFIX).partition("@")
    return model, pretrained or None


def coca_identity(name: str) -> str:
    """What determines the captions: model and weights, local ones by their digest."""
    identity = model_identity(*split_name(name))
    return f"{PREFIX}{identity['name']}@{identity['weights']}"


class CocaCaptioner:
    """A CoCa model on a device.

    Args:
        name: ``open_clip:MODEL`` or ``open_clip:MODEL@PRETRAINED``.
        device: torch device.
        dtype: of the weights and pixels.
        generation: see :class:`arf_plugin.pipeline.generation.Generation`.

    Raises:
        StageError: if the model is no CoCa, or the settings do not suit one.
    """

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype, generation: Generation) -> None:
        self._model, self._preprocess, self._tokenizer = load_model(*split_name(name), device, dtype)
        self._device, self._dtype, self._generation = device, dtype, generation
        if not hasattr(self._model, "text_decoder"):
            raise StageError(
                f"{name!r} is a {type(self._model).__name__}, which cannot speak. Expected a CoCa model of open_clip, "
                "such as open_clip:coca_ViT-L-14@mscoco_finetuned_laion2b_s13b_b90k."
            )
        if generation.prompt:
            raise StageError("CoCa models take no prompt. Leave out --prompt.")
        self._start = getattr(self._tokenizer, "sot_token_id", None)
        self._end = getattr(self._tokenizer, "eot_token_id", None)
        if self._start is None or self._end is None:
            raise StageError(f"{name!r} has a tokenizer without start and end tokens; expected CLIP's own.")
        longest = int(self._tokenizer.context_length) - 1  # the start token takes a place
        self._length = min(generation.max_new_tokens, longest)

    def inputs(self, images: list[PIL.Image.Image]) -> dict[str, Any]:
        """Pixels [n, 3, H, W] of RGB images, on the CPU."""
        import torch

        return {"pixel_values": torch.stack([self._preprocess(image) for image in images])}

    def captions(self, inputs: dict[str, Any]) -> list[list[str]]:
        """Generates captions for a batch; per image, as many as asked for."""
        import torch

        pixels = inputs["pixel_values"].to(self._device, self._dtype)
        with torch.inference_mode():
            found = self._model(pixels)
            tokens = (self._sample if self._generation.top_p else self._search)(found, len(pixels))
        texts = [self._text(row) for row in tokens.flatten(0, 1).tolist()]
        count = self._generation.captions_per_image
        return [texts[start : start + count] for start in range(0, len(texts), count)]

    def _log_probabilities(self, encoded: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [n, vocabulary] of the next token after tokens [n, length], in fp32."""
        out = self._model(
            None,
            tokens,
            image_latent=encoded["image_features"],
            image_embs=encoded["image_embs"],
            output_labels=False,
        )
        logits = out["logits"][:, -1].float() / (
            self._generation.temperature if self._generation.top_p else 1.0
        )
        logits[:, self._start] = -float("inf")
        if tokens.shape[1] <= self._generation.min_new_tokens:
            logits[:, self._end] = -float("inf")
        return logits.log_softmax(dim=-1)

    def _search(self, encoded: dict[str, Any], images: int) -> torch.Tensor:
        """Beam search, which is greedy with one beam; returns tokens [images, captions, length]."""
        import torch

        beams = self._generation.num_beams
        encoded = {
            name: encoded[name].repeat_interleave(beams, 0) for name in ("image_features", "image_embs")
        }
        tokens = torch.full((images, beams, 1), self._start, device=self._device)
        scores = torch.full((images, beams), -float("inf"), device=self._device)
        scores[:, 0] = 0  # all beams start alike: only one counts
        lengths = torch.zeros((images, beams), device=self._device)
        for _ in range(self._length):
            over = (tokens[:, :, 1:] == self._end).any(dim=2)
            if over.all():
                break
            step = self._log_probabilities(encoded, tokens.flatten(0, 1)).view(images, beams, -1)
            step[over] = -float("inf")  # a finished beam goes on in one way, at no cost
            step[..., self._end] = step[..., self._end].masked_fill(over, 0)
            width = step.shape[2]
            scores, best = (scores.unsqueeze(2) + step).flatten(1).topk(beams, dim=1)
            parent, token = best // width, best % width
            tokens = torch.cat(
                [tokens.gather(1, parent.unsqueeze(2).expand_as(tokens)), token.unsqueeze(2)], dim=2
            )
            lengths = lengths.gather(1, parent) + ~over.gather(1, parent)
        order = (scores / lengths.clamp(min=1)).sort(dim=1, descending=True, stable=True).indices
        order = order[:, : self._generation.captions_per_image, None].expand(-1, -1, tokens.shape[2])
        return tokens.gather(1, order)

    def _sample(self, encoded: dict[str, Any], images: int) -> torch.Tensor:
        """Nucleus sampling (Holtzman et al., 2020); returns tokens [images, captions, length]."""
        import torch

        count, top_p = self._generation.captions_per_image, self._generation.top_p
        encoded = {
            name: encoded[name].repeat_interleave(count, 0) for name in ("image_features", "image_embs")
        }
        tokens = torch.full((images * count, 1), self._start, device=self._device)
        for _ in range(self._length):
            over = (tokens[:, 1:] == self._end).any(dim=1)
            if over.all():
                break
            likely, order = self._log_probabilities(encoded, tokens).exp().sort(dim=1, descending=True)
            likely[likely.cumsum(dim=1) - likely >= top_p] = 0  # what comes after the nucleus
            drawn = order.gather(1, likely.multinomial(1)).squeeze(1)
            tokens = torch.cat([tokens, drawn.masked_fill(over, self._end).unsqueeze(1)], dim=1)
        return tokens.view(images, count, -1)

    def _text(self, tokens: list[int]) -> str:
        """The words between start and end."""
        words = tokens[1:]
        return self._tokenizer.decode(words[: words.index(self._end)] if self._end in words else words)
