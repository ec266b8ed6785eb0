"""Image captioners and how they generate: those of Hugging Face transformers, and the CoCa models of open_clip.

:mod:`arf_plugin.pipeline.endpoint` has those of a server.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from arf_plugin.errors import FlagError, MissingDependencyError, StageError
from arf_plugin.files import folder_digest, not_there
from arf_plugin.flags import check_service
from arf_plugin.pipeline.embedder import ClipModel, load_model, model_identity
from arf_plugin.safe_loading import safe_loading
from arf_plugin.untrusted import printable
from arf_plugin.weights import missing_weights, require_known

if TYPE_CHECKING:
    import PIL.Image
    import torch


COCA = "open_clip:"  # begins the names of open_clip's captioners
PROMPT = "Describe this image in one short sentence."  # for servers, which want one


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
        """Keyword arguments of transformers' ``generate``."""
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

    def grouped(self, texts: list[str]) -> list[list[str]]:
        """The texts of a batch by image."""
        count = self.captions_per_image
        return [texts[start : start + count] for start in range(0, len(texts), count)]


@dataclass(frozen=True)
class Endpoint:
    """A server of chat completions; nothing here changes the captions.

    Attributes:
        url: its address, as OpenAI's clients call it: up to ``/v1``, which is added where there is no path.
        threads: requests under way at once.
        timeout: seconds for a whole answer.
        patience: seconds without any answer after which the server is given up.
    """

    url: str
    threads: int = 8
    timeout: float = 120.0
    patience: float = 300.0

    def __post_init__(self) -> None:
        if "@" in self.url:
            raise FlagError(
                "--captioner-url holds a user name. Give the address alone, and a key in ARF_CAPTIONER_KEY."
            )
        check_service("--captioner", self.url, self.timeout, self.patience, "http://127.0.0.1:8000/v1")

    @property
    def address(self) -> str:
        """The address that ``/chat/completions`` is below."""
        url = self.url.rstrip("/").removesuffix("/chat/completions")
        return url if urlsplit(url).path else f"{url}/v1"


def captioner_identity(name: str) -> str:
    """Name of a hub model, or a digest of local weights: what determines the captions."""
    if name.startswith(COCA):
        identity = model_identity(*_coca_model(name))
        return f"{COCA}{identity['name']}@{identity['weights']}"
    return f"sha256:{folder_digest(Path(name))}" if Path(name).is_dir() else name


def captioner_fetches(name: str) -> str | None:
    """Says, as a clause, that loading a captioner may fetch its weights; None if they are here."""
    if name.startswith(COCA):
        return ClipModel(*_coca_model(name)).fetches()
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return None if HF_HUB_OFFLINE or Path(name).is_dir() else f"{name} may have to be fetched first"


def require_captioner(name: str) -> None:
    """Refuses a name that stands for no captioner, as far as its configuration tells.

    Raises:
        MissingDependencyError: without transformers.
        FlagError: of a CoCa model that open_clip does not know.
        StageError: of one that transformers does not find.
    """
    if name.startswith(COCA):
        require_known(*_coca_model(name))
        return
    if (name.startswith((".", "/")) or name.endswith("/")) and not Path(name).is_dir():
        raise StageError(f"--captioner {not_there(name)}")
    transformers = _transformers()
    try:
        transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as cause:  # of the libraries that read and fetch configurations
        raise _unloadable(name, cause) from cause


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingDependencyError("transformers", "arf caption", "captions") from None
    return transformers


def _unloadable(name: str, cause: Exception) -> StageError:
    return StageError(
        f"{name!r} cannot be loaded as an image captioner: {printable(str(cause))[:600]}\n"
        "Expected a folder in the Hugging Face layout (config.json, weights, tokenizer, image processor) of a "
        "model such as BLIP, GIT or VisionEncoderDecoder, or such a model's name on the hub."
    )


def load_captioner(
    name: str, device: torch.device, dtype: torch.dtype, generation: Generation
) -> Captioner | CocaCaptioner:
    """Loads a captioner of transformers, or of open_clip if the name says so; see the classes for errors."""
    kind = CocaCaptioner if name.startswith(COCA) else Captioner
    return kind(name, device, dtype, generation)


class Captioner:
    """A captioner of transformers on a device: BLIP, GIT, VisionEncoderDecoder, image-text-to-text models.

    Args:
        name: folder in the Hugging Face layout, or a model name on the hub.
        device: torch device.
        dtype: of the weights and pixels.
        generation: see :class:`Generation`.

    Raises:
        MissingDependencyError: without transformers.
        StageError: if the folder holds no captioner that transformers can load, or one that takes no prompt.
    """

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype, generation: Generation) -> None:
        transformers = _transformers()
        transformers.utils.logging.disable_progress_bar()  # our own bar counts images
        self._device, self._dtype, self._generation = device, dtype, generation
        # Renamed in transformers 4.46; both map VisionEncoderDecoder, BLIP and GIT.
        kind = getattr(transformers, "AutoModelForImageTextToText", None)
        kind = kind or transformers.AutoModelForVision2Seq
        try:
            with safe_loading():
                model, info = kind.from_pretrained(name, output_loading_info=True, trust_remote_code=False)
                self._model = model.to(device, dtype).eval()
                self._processor, self._tokenizer = _load_processors(transformers, name)
        except Exception as cause:  # of the libraries that read configurations, weights and tokenizers
            raise _unloadable(name, cause) from cause
        if random := missing_weights(info):
            raise StageError(
                f"{len(random)} weights of the captioner {name!r} are not in its files and would be random: "
                f"{', '.join(random[:3])}{', ...' if len(random) > 3 else ''}. Expected a folder or a hub model with "
                "all weights of a captioner, not those of its vision or text model alone."
            )
        if generation.prompt and self._processor is not self._tokenizer:
            raise StageError(
                "This captioner takes no prompt (it has no joint processor). Leave out --prompt."
            )
        self._talks = bool(getattr(self._processor, "chat_template", None))
        self._find_prompt(name)

    def _find_prompt(self, name: str) -> None:
        """Takes the first prompt that a blank image can be captioned with: some models want a place for it there."""
        import PIL.Image

        given, token = self._generation.prompt, getattr(self._processor, "image_token", None)
        prompts = [given or PROMPT] if self._talks else [given]
        if not self._talks and isinstance(token, str) and token not in given:
            prompts.append(f"{token}{given}")
        problem = None
        for self._prompt in prompts:
            try:
                self.captions(self.inputs([PIL.Image.new("RGB", (64, 64))]))
                return
            except Exception as cause:  # of the libraries that read configurations, weights and tokenizers
                problem = cause
        raise StageError(
            f"The captioner {name!r} cannot caption a blank image with {' or '.join(map(repr, prompts))} as prompt: "
            f"{printable(str(problem))[:300]}. Give it the prompt of its model card, with --prompt "
            "(arf fit: --captioner-prompt)."
        ) from problem

    def inputs(self, images: list[PIL.Image.Image]) -> dict[str, Any]:
        """Turns RGB images into the model's inputs, on the CPU."""
        more: dict[str, Any] = {}
        if prompt := self._prompt:
            if self._talks:
                content = [{"type": "image"}, {"type": "text", "text": prompt}]
                talk = [{"role": "user", "content": content}]
                prompt = self._processor.apply_chat_template(talk, add_generation_prompt=True)
            more = {"text": [prompt] * len(images), "padding": True}
        return dict(self._processor(images=images, return_tensors="pt", **more))

    def captions(self, inputs: dict[str, Any]) -> list[list[str]]:
        """Generates captions for a batch; per image, as many as asked for."""
        import torch

        moved = {
            name: value.to(self._device, self._dtype) if value.is_floating_point() else value.to(self._device)
            for name, value in inputs.items()
        }
        with torch.inference_mode():
            tokens = self._model.generate(**moved, **self._generation.arguments())
        if (prompt := moved.get("input_ids")) is not None:
            prompt = prompt.repeat_interleave(self._generation.captions_per_image, dim=0)
            length = prompt.shape[1]
            if torch.equal(tokens[:, :length], prompt):  # models without an encoder echo it
                tokens = tokens[:, length:]
        return self._generation.grouped(self._tokenizer.batch_decode(tokens, skip_special_tokens=True))


def _load_processors(transformers: Any, name: str) -> tuple[Any, Any]:
    """The model's joint processor, twice; or an image processor and a tokenizer, for models saved without one.

    AutoProcessor returns only a part of it for VisionEncoderDecoder folders.
    """
    try:
        joint = transformers.AutoProcessor.from_pretrained(name, trust_remote_code=False)
        if hasattr(joint, "image_processor") and hasattr(joint, "tokenizer"):
            return joint, joint
    except (OSError, ValueError):
        pass
    parts = (transformers.AutoImageProcessor, transformers.AutoTokenizer)
    image_processor, tokenizer = (kind.from_pretrained(name, trust_remote_code=False) for kind in parts)
    return image_processor, tokenizer


def _coca_model(name: str) -> tuple[str, str | None]:
    """Model and pretrained tag or file of a captioner ``open_clip:MODEL@PRETRAINED``."""
    model, _, pretrained = name.removeprefix(COCA).partition("@")
    return model, pretrained or None


class CocaCaptioner:
    """A CoCa model of open_clip on a device.

    Decoding is ours and not ``CoCa.generate``: that refuses transformers from release 5 on, knows one caption per
    image, its beam search is the diverse one of several groups, and its sampling ends every text that is cut with an
    end token. Greedy search, beam search and nucleus sampling follow the definitions of transformers' ``generate``;
    beams are ranked by their mean log-probability per token.

    Arguments are those of :class:`Captioner`; the name is ``open_clip:MODEL`` or ``open_clip:MODEL@PRETRAINED``.

    Raises:
        StageError: if the model is no CoCa, or the settings do not suit one.
    """

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype, generation: Generation) -> None:
        self._model, self._preprocess, self._tokenizer = load_model(*_coca_model(name), device, dtype)
        self._device, self._dtype, self._generation = device, dtype, generation
        if not hasattr(self._model, "text_decoder"):
            raise StageError(
                f"{name!r} is a {type(self._model).__name__}, which cannot speak. Expected a CoCa model of open_clip, "
                "such as open_clip:coca_ViT-L-14@mscoco_finetuned_laion2b_s13b_b90k."
            )
        if generation.prompt:
            raise StageError("CoCa models take no prompt. Leave out --prompt.")
        start, end = (getattr(self._tokenizer, one, None) for one in ("sot_token_id", "eot_token_id"))
        if start is None or end is None:
            raise StageError(f"{name!r} has a tokenizer without start and end tokens; expected CLIP's own.")
        self._start, self._end = int(start), int(end)
        longest = int(self._tokenizer.context_length) - 1  # the start token takes a place
        self._length = min(generation.max_new_tokens, longest)

    def inputs(self, images: list[PIL.Image.Image]) -> dict[str, Any]:
        """Pixels [n, 3, H, W] of RGB images, on the CPU."""
        import torch

        return {"pixel_values": torch.stack([self._preprocess(image) for image in images])}

    def captions(self, inputs: dict[str, Any]) -> list[list[str]]:
        """Generates captions for a batch; per image, as many as asked for."""
        import torch

        how = self._generation
        pixels = inputs["pixel_values"].to(self._device, self._dtype)
        with torch.inference_mode():
            found = self._model(pixels)
            copies = how.captions_per_image if how.top_p else how.num_beams
            encoded = {
                "image_latent": found["image_features"].repeat_interleave(copies, 0),
                "image_embs": found["image_embs"].repeat_interleave(copies, 0),
            }
            given = (encoded, len(pixels))
            tokens = self._sample(*given, how.top_p) if how.top_p else self._search(*given)
        return how.grouped([self._text(words) for words in tokens.flatten(0, 1).tolist()])

    def _log_probabilities(self, encoded: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [n, vocabulary] of the next token after tokens [n, length], in fp32."""
        out = self._model(None, tokens, output_labels=False, **encoded)
        temperature = self._generation.temperature if self._generation.top_p else 1.0
        logits: torch.Tensor = out["logits"][:, -1].float() / temperature
        logits[:, self._start] = -float("inf")
        if tokens.shape[1] <= self._generation.min_new_tokens:
            logits[:, self._end] = -float("inf")
        return logits.log_softmax(dim=-1)

    def _search(self, encoded: dict[str, Any], images: int) -> torch.Tensor:
        """Beam search, which is greedy with one beam; returns tokens [images, captions, length]."""
        import torch

        beams = self._generation.num_beams
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
            before = tokens.gather(1, parent.unsqueeze(2).expand_as(tokens))
            tokens = torch.cat([before, token.unsqueeze(2)], dim=2)
            lengths = lengths.gather(1, parent) + ~over.gather(1, parent)
        order = (scores / lengths.clamp(min=1)).sort(dim=1, descending=True, stable=True).indices
        order = order[:, : self._generation.captions_per_image, None].expand(-1, -1, tokens.shape[2])
        return tokens.gather(1, order)

    def _sample(self, encoded: dict[str, Any], images: int, top_p: float) -> torch.Tensor:
        """Nucleus sampling (Holtzman et al., 2020); returns tokens [images, captions, length]."""
        import torch

        count = self._generation.captions_per_image
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
        end = words.index(self._end) if self._end in words else None
        return str(self._tokenizer.decode(words[:end]))
