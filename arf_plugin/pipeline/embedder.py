"""open_clip models as the stages use them: loaded, identified, and their outputs normalized."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arf_plugin.anchors.files import file_digest, folder_digest
from arf_plugin.errors import FlagError, StageError

if TYPE_CHECKING:
    import torch

_LOCAL_DIR = "local-dir:"


def load_model(
    model: str, pretrained: str | None, device: torch.device, dtype: torch.dtype
) -> tuple[Any, Any, Any]:
    """Loads an open_clip model for inference.

    Returns:
        The model, its preprocessing (PIL image to [3, H, W]) and its tokenizer (texts to [n, L]).

    Raises:
        FlagError: for a bare model name without weights, which open_clip would fill with random numbers.
        StageError: if open_clip cannot load it.
    """
    import open_clip
    import torch

    if not pretrained and ":" not in model:
        raise FlagError(
            f"--model {model} needs weights: add --pretrained TAG_OR_FILE (tags: open_clip.list_pretrained()), or "
            "name a model that brings them along (local-dir:FOLDER, hf-hub:NAME)."
        )
    precision = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    try:
        built = open_clip.create_model_and_transforms(
            model, pretrained=pretrained, precision=precision, device=device
        )
        tokenizer = open_clip.get_tokenizer(model)
    except Exception as cause:  # open_clip raises many kinds for names, files and downloads
        raise StageError(
            f"open_clip cannot load the model {model!r} with pretrained {pretrained!r}: {cause}"
        ) from cause
    return built[0].eval(), built[2], tokenizer


def model_identity(model: str, pretrained: str | None) -> dict[str, str]:
    """Returns name and weights of a model as JSON; local weights by their digest, wherever they lie."""
    if model.startswith(_LOCAL_DIR):
        folder = Path(model[len(_LOCAL_DIR) :])
        if not folder.is_dir():
            raise StageError(f"The model folder {folder} of --model {model} does not exist.")
        return {"name": f"{_LOCAL_DIR}{folder.name}", "weights": f"sha256:{folder_digest(folder)}"}
    if pretrained and Path(pretrained).is_file():
        return {"name": model, "weights": f"sha256:{file_digest(Path(pretrained))}"}
    return {"name": model, "weights": pretrained or ""}


def unit_fp16(features: torch.Tensor) -> np.ndarray:
    """Normalizes feature vectors [n, d] in fp32 and returns them as fp16, as clip-retrieval stores them."""
    import torch

    return torch.nn.functional.normalize(features.float(), dim=-1).to(torch.float16).cpu().numpy()
