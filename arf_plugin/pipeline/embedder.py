"""open_clip models as the stages use them: loaded, identified, and their outputs normalized."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arf_plugin.errors import FlagError, StageError
from arf_plugin.files import digest, file_digest, folder_digest
from arf_plugin.pipeline.execution import Execution, pick_dtype
from arf_plugin.safe_loading import safe_loading
from arf_plugin.untrusted import printable
from arf_plugin.weights import WEIGHT_SUFFIXES, has_weights, watching

if TYPE_CHECKING:
    import torch

_LOCAL_DIR = "local-dir:"


@dataclass(frozen=True)
class ClipModel:
    """Which open_clip model: the flags ``--model``, ``--pretrained`` and ``--precision``."""

    name: str
    pretrained: str | None = None
    precision: str = "auto"

    def identity(self) -> dict[str, str]:
        """Name and weights; see :func:`model_identity`."""
        return model_identity(self.name, self.pretrained)

    def fetches(self) -> str | None:
        """Says, as a clause, that loading it may fetch its weights; None if they are here."""
        from huggingface_hub.constants import HF_HUB_OFFLINE

        own = self.pretrained is None and not self.name.startswith("hf-hub:")
        here = HF_HUB_OFFLINE or own or (self.pretrained is not None and Path(self.pretrained).exists())
        return None if here else f"weights of {self.name} may have to be fetched first"

    def load(self, execution: Execution) -> LoadedClip:
        """Loads it on this process's device; see :func:`load_model`."""
        device = execution.torch_device()
        dtype = pick_dtype(self.precision, device)
        return LoadedClip(*load_model(self.name, self.pretrained, device, dtype), device, dtype)


@dataclass(frozen=True)
class LoadedClip:
    """A model on a device; ``preprocess`` makes pixels [3, H, W] of an image, ``tokenizer`` tokens [n, L] of texts."""

    model: Any
    preprocess: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype

    @property
    def dimension(self) -> int:
        """Of its vectors."""
        return int(self.model.encode_text(self.tokenizer(["a"]).to(self.device)).shape[-1])

    def images(self, pixels: Sequence[torch.Tensor]) -> torch.Tensor:
        """Unit vectors [n, d], fp32, of images [3, H, W]."""
        import torch

        return self._unit(self.model.encode_image, torch.stack(list(pixels)).to(self.device, self.dtype))

    def texts(self, texts: list[str]) -> torch.Tensor:
        """Unit vectors [n, d], fp32, of texts."""
        return self._unit(self.model.encode_text, self.tokenizer(texts).to(self.device))

    @staticmethod
    def _unit(encode: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        import torch

        with torch.inference_mode():
            return torch.nn.functional.normalize(encode(inputs).float(), dim=-1)


def as_fp16(vectors: torch.Tensor) -> np.ndarray:
    """Vectors [n, d] as clip-retrieval stores them."""
    import torch

    stored: np.ndarray = vectors.to(torch.float16).cpu().numpy()
    return stored


def load_model(
    model: str, pretrained: str | None, device: torch.device, dtype: torch.dtype
) -> tuple[Any, Any, Any]:
    """Loads an open_clip model for inference; a file of ``pretrained`` also where open_clip would pass over it.

    Returns:
        The model, its preprocessing (PIL image to [3, H, W]) and its tokenizer (texts to [n, L]).

    Raises:
        FlagError: if there are no weights, or some that open_clip would pass over.
        StageError: if open_clip cannot load it, or leaves some of its weights random.
    """
    import open_clip
    import torch

    file = _weights_file(model, pretrained)
    precision = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    arguments: dict[str, Any] = {"pretrained": pretrained, "precision": precision, "device": device}
    if file is not None:
        known = inspect.signature(open_clip.create_model_and_transforms).parameters
        without = ("load_weights", "pretrained_text", "pretrained_hf")  # as far as this release has them
        arguments |= {"pretrained": None} | {name: False for name in without if name in known}
    try:
        with watching() as loaded, safe_loading():
            built = open_clip.create_model_and_transforms(model, **arguments)
            if file is not None:
                open_clip.factory.load_checkpoint(built[0], str(file))
            tokenizer = open_clip.get_tokenizer(model)
    except Exception as cause:  # open_clip raises many kinds for names, files and downloads
        reason = printable(str(cause))
        raise StageError(
            f"open_clip cannot load the model {model!r} with pretrained {pretrained!r}: "
            f"{reason[:600]}{' ...' if len(reason) > 600 else ''}"
        ) from cause
    if random := loaded.random_parts(built[0]):
        total = sum(1 for _ in built[0].parameters())
        raise StageError(
            f"{len(random)} of about {total} weights of the model {model!r} are in no file of its own or of pretrained "
            f"{pretrained!r} and would be random: {', '.join(random[:3])}{', ...' if len(random) > 3 else ''}. Name a "
            "checkpoint of the whole model with --pretrained."
        )
    return built[0].eval(), built[2], tokenizer


def _weights_file(model: str, pretrained: str | None) -> Path | None:
    """The file to load into a model that open_clip would not load it into: one that is named by its place.

    Raises:
        FlagError: if there are no weights.
    """
    file = Path(pretrained) if pretrained and Path(pretrained).is_file() else None
    if ":" not in model:
        if not pretrained:
            raise FlagError(
                f"--model {model} needs weights: add --pretrained TAG_OR_FILE (tags: open_clip.list_pretrained()), or "
                "name a model that brings them along (local-dir:FOLDER, hf-hub:NAME)."
            )
        return None
    if pretrained and file is None:
        raise FlagError(
            f"--pretrained {pretrained} is no file, and --model {model} brings its own weights along. Name a file "
            "whose weights take their place, or leave --pretrained out."
        )
    if file is None and model.startswith(_LOCAL_DIR):
        folder = Path(model[len(_LOCAL_DIR) :])
        if folder.is_dir() and not has_weights(folder):
            raise StageError(
                f"{folder} has no weights (*{', *'.join(WEIGHT_SUFFIXES)}), so the model would be random. Put them "
                "there, or name a file with --pretrained."
            )
    return file


def model_identity(model: str, pretrained: str | None) -> dict[str, str]:
    """Returns name and weights of a model as JSON; local weights by their digest, wherever they lie."""
    file = file_digest(Path(pretrained)) if pretrained and Path(pretrained).is_file() else None
    if model.startswith(_LOCAL_DIR):
        folder = Path(model[len(_LOCAL_DIR) :])
        if not folder.is_dir():
            raise StageError(f"The model folder {folder} of --model {model} does not exist.")
        found = folder_digest(folder)
        weights = found if file is None else digest([found, file])  # the folder has the architecture
        return {"name": f"{_LOCAL_DIR}{folder.name}", "weights": f"sha256:{weights}"}
    return {"name": model, "weights": f"sha256:{file}" if file else pretrained or ""}
