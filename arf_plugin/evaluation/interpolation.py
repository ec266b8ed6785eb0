"""WiSE-FT: a straight line in weight space between the original and the fine-tuned model.

Source: Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, section 3:
theta = (1 - alpha) * theta_original + alpha * theta_fine-tuned.

Both checkpoints are mapped from their files, so memory holds one mixture and pages of theirs that can be given back.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.checkpoints import (
    CONSTANT,
    Checkpoint,
    difference,
    fitted,
    listed,
    open_checkpoint,
    write_weights,
)
from arf_plugin.evaluation.head import PREFIX, Head, split_head
from arf_plugin.evaluation.run_settings import Settings, find_run, note

if TYPE_CHECKING:
    import torch

ALPHAS = tuple(number / 10 for number in range(11))
CHUNK = 1 << 20  # elements whose fp64 sums are held at a time
_IMAGE, _TEXTS = "visual.positional_embedding", ("positional_embedding", "text.positional_embedding")


def interpolate(
    original: Mapping[str, torch.Tensor], tuned: Mapping[str, torch.Tensor], alpha: float
) -> dict[str, torch.Tensor]:
    """Mixes two sets of weights, by :func:`mix`.

    Args:
        original: tensors by name.
        tuned: the same names and shapes.
        alpha: 0 is the original, 1 the fine-tuned model.

    Raises:
        EvaluationError: if the names or shapes differ, or alpha is outside [0, 1].
    """
    check_alpha(alpha)
    check_same(original, tuned, "The two checkpoints")
    return {name: mix(original[name], end, alpha) for name, end in tuned.items()}


def mix(start: torch.Tensor, end: torch.Tensor, alpha: float) -> torch.Tensor:
    """Mixes one tensor: ``(1 - alpha) * start + alpha * end``.

    Sums are taken in fp64 and rounded once, to the dtype of `end`. At 0 and 1 the result is the end point, bit by bit.
    Integer tensors (BatchNorm's counters) are taken from the nearer end point.

    Returns:
        A tensor of its own, contiguous, of the shape of both.
    """
    import torch

    if alpha in (0.0, 1.0) or not end.is_floating_point():
        return (start if alpha < 0.5 else end).clone(memory_format=torch.contiguous_format)
    return combine((start, end), (1.0 - alpha, alpha), end.dtype)


def combine(tensors: Sequence[torch.Tensor], shares: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """Sums tensors times their shares, in fp64, rounded once; integers are those of the first tensor.

    Args:
        tensors: of one shape.
        shares: a number for each.
        dtype: of the result.

    Returns:
        A tensor of its own, contiguous.
    """
    import torch

    if not dtype.is_floating_point:
        return tensors[0].clone(memory_format=torch.contiguous_format)
    total = torch.empty(tensors[0].shape, dtype=dtype)
    target, flat = total.view(-1), [tensor.reshape(-1) for tensor in tensors]
    for i in range(0, target.numel(), CHUNK):
        part = slice(i, i + CHUNK)
        parts = (share * tensor[part].double() for share, tensor in zip(shares, flat, strict=True))
        target[part] = functools.reduce(torch.Tensor.add_, parts)
    return total


def interpolate_files(original: Path, tuned: Path, alpha: float, out: Path) -> None:
    """Mixes two checkpoints and writes the result; see :func:`write_mixtures`."""
    write_mixtures(open_checkpoint(original), open_checkpoint(tuned), {out: alpha})


def write_mixtures(
    original: Checkpoint,
    tuned: Checkpoint,
    targets: Mapping[Path, float],
    advance: Callable[[int], object] = lambda count: None,
    flags: Settings | None = None,
) -> None:
    """Writes checkpoints along the line, in the form of the fine-tuned one; they tell of its run.

    Args:
        original: weights before fine-tuning.
        tuned: weights after it.
        targets: alphas by the file to write to.
        advance: told of every file that is written, for a progress bar.
        flags: how images and texts are seen, where that is not known from the fine-tuned one's run.

    Raises:
        EvaluationError: if the checkpoints are of different architectures, an alpha is outside [0, 1], or the disk is
            too full; nothing is written then.
    """
    starts = check_pair(original, tuned)
    for alpha in targets.values():
        check_alpha(alpha)

    def made(alpha: float) -> tuple[str, Callable[[], dict[str, torch.Tensor]]]:
        name = f"{original.path.stem} and {tuned.path.stem} at {alpha:g}"
        return name, lambda: interpolate(starts, tuned.weights, alpha)

    write_all(original, tuned, {path: made(alpha) for path, alpha in targets.items()}, advance, flags)


def write_all(
    original: Checkpoint,
    tuned: Checkpoint,
    targets: Mapping[Path, tuple[str, Callable[[], Mapping[str, torch.Tensor]]]],
    advance: Callable[[int], object],
    flags: Settings | None,
) -> None:
    """Writes checkpoints one after the other: by their files, their names and what makes their weights.

    The others are as :func:`write_mixtures` has them.
    """
    flags = flags or Settings()
    told = note(find_run(tuned.path, tuned.run, flags), flags)
    size = max(original.bytes, tuned.bytes)
    for folder in {path.parent for path in targets}:
        _require_space(folder, size, sum(path.parent == folder for path in targets))
    for path, (name, make) in targets.items():
        write_weights(path, make(), name, told)
        advance(1)


def _require_space(folder: Path, size: int, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if size * count > free:
        raise EvaluationError(
            f"{count} checkpoint(s) needs {size * count / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free. "
            "Make room, name another place, or write fewer checkpoints."
        )


def load_mixture(
    model: torch.nn.Module, original: Checkpoint, tuned: Checkpoint, alpha: float
) -> Head | None:
    """Loads the mixture of two checkpoints into a model: the same weights as a written mixture has.

    Args:
        model: a model of their architecture, on any device.
        original: weights before fine-tuning.
        tuned: weights after it.
        alpha: 0 is the original, 1 the fine-tuned model.

    Returns:
        The mixture of their linear heads, if they have some.

    Raises:
        EvaluationError: if one of the three is of another architecture, or alpha is outside [0, 1].
    """
    return load_made(model, interpolate(check_pair(original, tuned), tuned.weights, alpha), tuned.path)


def load_made(model: torch.nn.Module, made: Mapping[str, torch.Tensor], path: Path) -> Head | None:
    """Loads weights that were made of a checkpoint's, and returns the head among them, if there is one."""
    weights, head = split_head(made)
    try:
        model.load_state_dict(fitted(model, weights, path))
    except EvaluationError as error:
        raise EvaluationError(f"--model and {path} are of different architectures: {error}") from error
    return head


def check_alpha(alpha: float) -> None:
    """Raises an EvaluationError unless alpha is a number from 0 to 1."""
    if not 0.0 <= alpha <= 1.0:
        raise EvaluationError(
            f"alpha is {alpha}. Expected a number from 0 (the first) to 1 (the second checkpoint)."
        )


def check_pair(original: Checkpoint, tuned: Checkpoint) -> Mapping[str, torch.Tensor]:
    """Raises an EvaluationError unless both are weights of one architecture, with heads for the same classes.

    Returns:
        The original's weights in the form of the other's.
    """
    check_heads(original, tuned)
    starts = align(original.weights, tuned.weights)
    check_same(starts, tuned.weights, f"{original.path} and {tuned.path}")
    return starts


def check_heads(one: Checkpoint, other: Checkpoint) -> None:
    """Raises an EvaluationError unless both have a head for the same classes, or neither has one."""
    heads = [any(name.startswith(PREFIX) for name in end.weights) for end in (one, other)]
    if heads[0] != heads[1]:
        having, without = (one, other) if heads[0] else (other, one)
        raise EvaluationError(
            f"{having.path} has a classification head and {without.path} has none, so they cannot be mixed. Give two "
            "checkpoints with a head (arf probe makes the one before fine-tuning), or two without."
        )
    names = [end.weights.get(f"{PREFIX}classnames") for end in (one, other)]
    if names[0] is not None and names[1] is not None and names[0].tolist() != names[1].tolist():
        raise EvaluationError(
            f"The heads of {one.path} and {other.path} are for different class names. Mix checkpoints of one task."
        )


def check_same(original: Mapping[str, torch.Tensor], tuned: Mapping[str, torch.Tensor], which: str) -> None:
    """Raises an EvaluationError, about `which`, unless both have the same names and shapes."""
    if problems := difference(original, tuned):
        raise EvaluationError(
            f"{which} are of different architectures; in the second, {listed(problems)}. Only one model's weights can "
            "be mixed."
        )


def align(
    weights: Mapping[str, torch.Tensor], form: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """Converts weights to the names and shapes of others of one architecture, as open_clip does when it loads them.

    A run may give its model another image size or text length, or a loss with a bias (``--siglip``), than the weights
    that it started from had. What is converted: names of older text towers, position embeddings of another size, a bias
    of the loss that only one has (zero, as open_clip sets it), constant buffers. Whatever else differs is left for the
    caller to refuse.

    Args:
        weights: tensors by name.
        form: tensors of the wanted names and shapes; their values do not count, but for constant buffers.

    Returns:
        The weights; tensors that need no conversion are the given ones.
    """
    if weights.keys() == form.keys() and all(weights[name].shape == form[name].shape for name in form):
        return weights
    found = dict(weights)
    if _TEXTS[0] in found and _TEXTS[0] not in form and _TEXTS[1] in form:
        from open_clip.model import convert_to_custom_text_state_dict

        found = convert_to_custom_text_state_dict(found)
    for name in [name for name in found if name not in form]:
        if name == "logit_bias" or name.endswith(CONSTANT):
            del found[name]
    for name, wanted in form.items():
        if name not in found and name == "logit_bias":
            found[name] = wanted.new_zeros(wanted.shape)
        elif name not in found and name.endswith(CONSTANT):
            found[name] = wanted
        elif name in found and name.startswith("logit_") and found[name].numel() == wanted.numel():
            found[name] = found[name].reshape(wanted.shape)
    for name in (_IMAGE, *_TEXTS):
        if name in found and name in form:
            found[name] = _resized(name, found[name], form[name])
    return found


def _resized(name: str, positions: torch.Tensor, form: torch.Tensor) -> torch.Tensor:
    """Position embeddings of another length, interpolated by open_clip; the given ones if that cannot be."""
    if positions.ndim != 2 or form.ndim != 2 or positions.shape[1] != form.shape[1]:
        return positions
    if len(positions) == len(form):
        return positions
    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    state = {name: positions.float()}
    if name == _IMAGE:
        old, new = len(positions) - 1, len(form) - 1
        if (
            min(old, new) < 1 or math.isqrt(old) ** 2 != old or math.isqrt(new) ** 2 != new
        ):  # which grid is it?
            return positions
        grid = (math.isqrt(new), math.isqrt(new))
        resize_pos_embed(state, SimpleNamespace(visual=SimpleNamespace(grid_size=grid)))
    else:
        resize_text_pos_embed(state, SimpleNamespace(positional_embedding=form))
    return state[name].to(positions.dtype)
