"""The model before fine-tuning, as a file: a checkpoint, or weights that open_clip knows by name."""

from __future__ import annotations

from pathlib import Path

from arf_plugin.anchors.files import cache_folder, digest, file_digest
from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.tensor_files import TensorInfo
from arf_plugin.evaluation.tensor_writer import write_order, writing


def find_original(text: str) -> Path:
    """Finds a checkpoint by its path, or by ``MODEL@PRETRAINED`` as open_clip calls it.

    Named weights are loaded by open_clip once and kept in the cache folder, so that they can be read tensor by tensor.

    Args:
        text: a path, or for example ``ViT-B-16-quickgelu@openai``.

    Returns:
        The path of a checkpoint.

    Raises:
        EvaluationError: if there is no such file, or open_clip does not know the name.
    """
    path = Path(text)
    if path.is_file():
        return path
    model, at, pretrained = text.rpartition("@")
    if not at or not model or not pretrained:
        raise EvaluationError(
            f"There is no checkpoint at {text}. Expected a .pt or .safetensors file, or MODEL@PRETRAINED "
            "for weights that open_clip knows, such as ViT-B-16-quickgelu@openai."
        )
    if ":" in model:  # open_clip ignores a tag then, and takes random weights where it finds none
        raise EvaluationError(
            f"{text}: the weights of {model.split(':')[0]}: models have no tag. Name their file instead, such as "
            "FOLDER/open_clip_model.safetensors."
        )
    return _cached(model, pretrained)


def _cached(model: str, pretrained: str) -> Path:
    import open_clip
    import torch

    from arf_plugin.evaluation.candidates import build

    identity = file_digest(Path(pretrained)) if Path(pretrained).is_file() else pretrained
    path = cache_folder() / "originals" / f"{digest([model, identity, open_clip.__version__])[:32]}.pt"
    if path.exists():
        return path
    try:
        weights = build(model, pretrained, torch.device("cpu"), own_weights=True)[0].state_dict()
    except EvaluationError as cause:
        raise EvaluationError(
            f"open_clip cannot load {model}@{pretrained}: {cause}\nIts list: python -c "
            "'import open_clip; print(*open_clip.list_pretrained(), sep=\"\\n\")'"
        ) from cause
    tensors = {name: TensorInfo.of(weights[name]) for name in weights}
    names = write_order(tensors)
    with writing(path, {name: tensors[name] for name in names}, f"{model}@{pretrained}") as write:
        for name in names:
            write(weights[name])
    return path
