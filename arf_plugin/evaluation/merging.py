"""Models made of fine-tuned runs and the weights they started from: WiSE-FT, Model Stock, soups, LiNeS.

With w0 the start, w_i the N runs, and d_i = w_i - w0 their updates, tensor by tensor:

=========  =======================================================================================================
``wise``   WiSE-FT (Wortsman et al., CVPR 2022, arXiv 2109.01903), of one run: (1 - alpha) * w0 + alpha * w
``stock``  Model Stock (Jang et al., ECCV 2024, arXiv 2403.19522): t * mean(w_i) + (1 - t) * w0 with
           t = N c / (1 + (N - 1) c), c the mean cosine of all pairs of updates. The more the runs agree, the less of
           the start.
``soup``   a uniform soup (Wortsman et al., ICML 2022, arXiv 2203.05482): mean(w_i)
``lines``  LiNeS (Wang et al., ICLR 2025, arXiv 2410.17146), of one run: w0 + (a + b (l - 1) / (L - 1)) * d, l the layer
           from 1 to L of its tower. Shallow layers stay at the start, deep ones keep what they have learned.
=========  =======================================================================================================

What the papers leave open, and is ours:

* Sums are taken in fp64 and rounded once, to the dtype of the first run, whatever the checkpoints have.
* ``stock``: c <= 0 gives t = 0, the start. An update of zero has the cosine 0 with others, so a tensor that no run has
  moved is the start's. Tensors of one number (``logit_scale``) and statistics of BatchNorm, which no gradient has made,
  are the runs' mean.
* ``lines``: a layer is a block of a tower, through all of its stages. Embeddings and stem belong to the first layer;
  the last norm, pooling, projection, ``logit_scale`` and a classification head to the last. A tower of one block is
  that of its last layer.
* Integer tensors (BatchNorm's counters) are those of the first run; with ``wise`` and ``lines``, of the nearer end.

Checkpoints are mapped from their files: memory holds one result, never the runs.
"""

from __future__ import annotations

import functools
import math
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.checkpoints import (
    CONSTANT,
    Checkpoint,
    difference,
    listed,
    open_checkpoint,
    write_weights,
)
from arf_plugin.evaluation.head import PREFIX
from arf_plugin.evaluation.run_settings import Settings, find_run, note

if TYPE_CHECKING:
    import torch

METHODS = {"wise": 1, "stock": 0, "soup": 0, "lines": 2}  # and how many numbers each takes
ALPHAS = tuple(number / 10 for number in range(11))
LINES = tuple((i / 4, 1 - i / 4) for i in range(5))  # (a, b) to choose among: the last layer keeps its update
_CHUNK = 1 << 20  # elements whose fp64 sums are held at a time
_IMAGE, _TEXTS = "visual.positional_embedding", ("positional_embedding", "text.positional_embedding")
_STATISTICS = (".running_mean", ".running_var")  # of BatchNorm
# Names within a tower, after what wraps it: ModifiedResNet's and timm's `layer1.0`, `stages.1.blocks.0`, `blocks.3`,
# open_clip's `resblocks.3`, those of transformers' text towers `layer.3`, `layers.3`, `block.3`.
_WRAPPING = re.compile(r"^(trunk\.|transformer\.|encoder\.)+")
_BLOCK = re.compile(r"(?:resblocks|blocks|block|layers|layer|stages)\.?(\d+)\.(?:(?:blocks\.)?(\d+)\.)?")
_FIRST = re.compile(
    r"conv[123]|bn[123]|stem|patch_embed|class_embedding|positional_embedding|cls_token|reg_token|pos_embed|ln_pre"
    r"|norm_pre|token_embedding|embeddings|embed_tokens|embed_positions|cls_emb"
)
_LAST = re.compile(
    r"ln_post|proj|attn_?pool|norm|fc_norm|head|final_conv|ln_final|text_projection|pooler|(final_)?layer_norm"
    r"|logit_(scale|bias)"
)


@dataclass(frozen=True)
class Merge:
    """How weights are made of runs.

    Attributes:
        method: one of `METHODS`.
        numbers: WiSE-FT's alpha, from 0 (the start) to 1 (the run); LiNeS's a and b, where both ends of the scale, a
            and a + b, are from 0 to 1.

    Raises:
        EvaluationError: for another method, or other numbers.
    """

    method: str
    numbers: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise EvaluationError(f"method is {self.method!r}, expected one of {', '.join(METHODS)}.")
        if len(self.numbers) != METHODS[self.method]:
            raise EvaluationError(
                f"WiSE-FT takes alpha, LiNeS a and b, the others no number; {self.method!r} got {self.numbers}."
            )
        if self.method == "wise" and not 0.0 <= self.numbers[0] <= 1.0:
            raise EvaluationError(
                f"alpha is {self.numbers[0]}. Expected a number from 0 (the first) to 1 (the second checkpoint)."
            )
        if self.method == "lines":
            (first, b), last = self.numbers, sum(self.numbers)
            if not (0.0 <= first <= 1.0 and -1e-9 <= last <= 1.0 + 1e-9):
                raise EvaluationError(
                    f"LiNeS with a {first:g} and b {b:g} scales updates by {first:g} in the first "
                    f"and by {last:g} in the last layer. Expected both from 0 (as it was) to 1 (as fine-tuned)."
                )

    @property
    def text(self) -> str:
        """What tells it from others of its method, for tables and keys: the numbers, or else the method."""
        return " ".join(f"{number:g}" for number in self.numbers) or self.method

    def __str__(self) -> str:
        return f"{self.method} {self.text}" if self.numbers else self.method

    def check_count(self, count: int, least_of_soup: int = 1) -> None:
        """Raises an EvaluationError unless the method takes that many runs."""
        if self.method == "wise" and count > 1:
            raise EvaluationError(
                f"WiSE-FT mixes one fine-tuned checkpoint with the original, {count} were given. Several are merged "
                "with --method stock or --method soup."
            )
        if self.method == "lines" and count > 1:
            raise EvaluationError(f"--method lines takes one fine-tuned checkpoint, {count} were given.")
        if count < {"stock": 2, "soup": least_of_soup}.get(self.method, 1):
            raise EvaluationError(
                f"--method {self.method} merges two fine-tuned checkpoints or more; {count} given."
            )


def merge(
    how: Merge, runs: Sequence[Mapping[str, torch.Tensor]], start: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Merges sets of weights.

    Args:
        how: the method.
        runs: fine-tuned weights by name: one for ``wise`` and ``lines``, two or more for ``stock``.
        start: what they started from, with the same names and shapes; ``soup`` does not look at it.

    Returns:
        Tensors of their own, of the shapes and dtypes of the first run.

    Raises:
        EvaluationError: if names or shapes differ, or the number of runs does not fit; for ``lines``, if a name tells
            no layer.
    """
    how.check_count(len(runs))
    first = runs[0]
    for number, run in enumerate(runs[1:], 2):
        _check_same(first, run, f"The first and the {number}. fine-tuned checkpoint")
    if how.method == "soup":
        return {name: _mean([run[name] for run in runs]) for name in first}
    if start is None:
        raise EvaluationError(f"{how.method} needs the weights before fine-tuning, too.")
    _check_same(start, first, "The checkpoints before and after fine-tuning")
    if how.method == "stock":
        return {name: _stock(name, start[name], [run[name] for run in runs]) for name in first}
    if how.method == "wise":
        scales = dict.fromkeys(first, how.numbers[0])
    else:
        a, b = how.numbers
        scales = {name: min(max(a + b * depth, 0.0), 1.0) for name, depth in depths(first).items()}
    return {name: mix(start[name], tensor, scales[name]) for name, tensor in first.items()}


def mix(start: torch.Tensor, end: torch.Tensor, alpha: float) -> torch.Tensor:
    """Mixes one tensor: ``(1 - alpha) * start + alpha * end``, a tensor of its own with the dtype of `end`.

    At 0 and 1 the result is the end point, bit by bit.
    """
    import torch

    if alpha in (0.0, 1.0) or not end.is_floating_point():
        return (start if alpha < 0.5 else end).clone(memory_format=torch.contiguous_format)
    return _combine((start, end), (1.0 - alpha, alpha), end.dtype)


def _combine(tensors: Sequence[torch.Tensor], shares: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """Sums tensors times their shares, in fp64, rounded once; integers are those of the first tensor."""
    import torch

    if not dtype.is_floating_point:
        return tensors[0].clone(memory_format=torch.contiguous_format)
    total = torch.empty(tensors[0].shape, dtype=dtype)
    target, flat = total.view(-1), [tensor.reshape(-1) for tensor in tensors]
    for i in range(0, target.numel(), _CHUNK):
        part = slice(i, i + _CHUNK)
        parts = (share * tensor[part].double() for share, tensor in zip(shares, flat, strict=True))
        target[part] = functools.reduce(torch.Tensor.add_, parts)
    return total


def _mean(runs: Sequence[torch.Tensor]) -> torch.Tensor:
    return _combine(runs, [1 / len(runs)] * len(runs), runs[0].dtype)


def _stock(name: str, start: torch.Tensor, runs: Sequence[torch.Tensor]) -> torch.Tensor:
    if not runs[0].is_floating_point() or runs[0].numel() < 2 or name.endswith(_STATISTICS):
        return _mean(runs)
    share = stock_share(start, runs)
    return _combine([start, *runs], [1 - share, *[share / len(runs)] * len(runs)], runs[0].dtype)


def stock_share(start: torch.Tensor, runs: Sequence[torch.Tensor]) -> float:
    """Model Stock's t of one tensor: the share of the mean of two or more `runs`, from 0 to 1."""
    import torch

    count = len(runs)
    flat = [tensor.reshape(-1) for tensor in (start, *runs)]
    products = torch.zeros(count, count, dtype=torch.float64)  # of the updates
    size = max(1, _CHUNK // (4 * count))
    for i in range(0, start.numel(), size):
        first, *others = (tensor[i : i + size].double() for tensor in flat)
        updates = torch.stack(others).sub_(first)
        products += updates @ updates.T
    lengths = products.diagonal().sqrt()
    scale = lengths.outer(lengths)
    cosines = torch.where(scale > 0, products / scale, 0.0).clamp(-1.0, 1.0)
    cosine = cosines[tuple(torch.triu_indices(count, count, 1))].mean().item()
    return count * cosine / (1 + (count - 1) * cosine) if cosine > 0 else 0.0


def depths(names: Iterable[str]) -> dict[str, float]:
    """Where in its tower each parameter is: (l - 1) / (L - 1), from 0 in the first to 1 in the last layer.

    Args:
        names: of one model's weights, as open_clip has them.

    Raises:
        EvaluationError: naming parameters whose names tell no layer.
    """
    places = {name: _place(name) for name in names}
    if unknown := [f"'{name}'" for name, place in places.items() if place is None]:
        raise EvaluationError(
            f"LiNeS scales updates by layer, and these names tell no layer: {listed(unknown)}. Expected the towers of "
            "open_clip: its own transformers and ResNets, timm's (visual.trunk) and transformers' text towers. "
            "--method wise works for any model."
        )
    found: dict[str, float] = {}
    for tower in ("visual", "text"):
        here = {name: place for name, place in places.items() if _tower(name) == tower}
        blocks = sorted({place for place in here.values() if isinstance(place, tuple)})
        last = len(blocks) - 1
        depth = {block: number / last if last else 1.0 for number, block in enumerate(blocks)}
        found |= {name: depth[p] if isinstance(p, tuple) else p for name, p in here.items() if p is not None}
    return {name: found[name] for name in places}


def _tower(name: str) -> str:
    return "visual" if name.startswith("visual.") else "text"


def _place(name: str) -> float | tuple[int, ...] | None:
    """The block of a parameter, or 0 for the first layer and 1 for the last; None if the name does not tell."""
    if name.startswith(PREFIX):
        return 1.0
    inner = _WRAPPING.sub("", name.removeprefix(f"{_tower(name)}."))
    if found := _BLOCK.match(inner):
        return int(found[1]), int(found[2] or 0)
    part = inner.partition(".")[0]
    return 0.0 if _FIRST.fullmatch(part) else 1.0 if _LAST.fullmatch(part) else None


def align_all(
    runs: Sequence[Checkpoint], original: Checkpoint | None = None
) -> Mapping[str, torch.Tensor] | None:
    """Raises an EvaluationError unless all are weights of one architecture, with heads for the same classes or none.

    Runs are to be of one form already.

    Returns:
        The original's weights in the form of the runs.
    """
    first = runs[0]
    for run in runs[1:]:
        _check_heads(first, run)
        _check_same(first.weights, run.weights, f"{first.path} and {run.path}")
    if original is None:
        return None
    _check_heads(original, first)
    starts = align(original.weights, first.weights)
    _check_same(starts, first.weights, f"{original.path} and {first.path}")
    return starts


def _check_heads(one: Checkpoint, other: Checkpoint) -> None:
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


def _check_same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], which: str) -> None:
    if problems := difference(one, other):
        raise EvaluationError(
            f"{which} are of different architectures; in the second, {listed(problems)}. Only one model's weights can "
            "be mixed."
        )


def check_moved(original: Checkpoint, runs: Sequence[Checkpoint]) -> None:
    """Warns of runs that hold the original's weights; raises an EvaluationError if all runs hold the same."""
    first = runs[0].weights
    if len(runs) > 1 and all(_equal(first, run.weights) for run in runs[1:]):
        raise EvaluationError(
            f"{' and '.join(str(run.path) for run in runs)} hold the same weights, so there is nothing to merge. Give "
            "runs that differ, by their seed or their settings."
        )
    start = align(original.weights, first)
    for run in runs:
        if _equal(start, run.weights):
            warnings.warn(
                f"{run.path} holds the weights of {original.path}: it has not been fine-tuned.", stacklevel=3
            )


def _equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


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
    if not difference(weights, form):
        return weights
    found = dict(weights)
    if _TEXTS[0] in found and _TEXTS[0] not in form and _TEXTS[1] in form:
        from open_clip.model import convert_to_custom_text_state_dict

        found = convert_to_custom_text_state_dict(found)
    for name in found.keys() - form.keys():
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
    old, new = (len(each) if each.ndim == 2 else 0 for each in (positions, form))
    if not old or not new or old == new or positions.shape[1] != form.shape[1]:
        return positions
    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    state = {name: positions.float()}
    if name == _IMAGE:
        sides = [math.isqrt(length - 1) for length in (old, new)]
        if min(sides) < 1 or [side**2 + 1 for side in sides] != [old, new]:  # which grid is it?
            return positions
        resize_pos_embed(state, SimpleNamespace(visual=SimpleNamespace(grid_size=(sides[1], sides[1]))))
    else:
        resize_text_pos_embed(state, SimpleNamespace(positional_embedding=form))
    return state[name].to(positions.dtype)


def write_merges(
    original: Checkpoint,
    runs: Sequence[Checkpoint],
    targets: Mapping[Path, Merge],
    advance: Callable[[int], object] = lambda count: None,
    flags: Settings | None = None,
) -> None:
    """Writes merged checkpoints, in the form of the first run; they tell of that run.

    Args:
        original: weights before fine-tuning.
        runs: weights after it.
        targets: methods by the file to write to.
        advance: told of every file that is written, for a progress bar.
        flags: how images and texts are seen, where that is not known from the first run.

    Raises:
        EvaluationError: if the checkpoints are of different architectures or their number does not fit, or the disk is
            too full; nothing is written then.
    """
    for how in targets.values():
        how.check_count(len(runs))
    starts, first, flags = align_all(runs, original), runs[0], flags or Settings()
    told = note(find_run(first.path, first.run, flags), flags)
    size = max(original.bytes, first.bytes)
    for folder, count in Counter(path.parent for path in targets).items():
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if size * count > free:
            raise EvaluationError(
                f"{count} checkpoint(s) needs {size * count / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free. "
                "Make room, name another place, or write fewer checkpoints."
            )
    for path, how in targets.items():
        if how.method == "wise":
            name = f"{original.path.stem} and {first.path.stem} at {how.text}"
        else:
            name = f"{how} of {', '.join(run.path.stem for run in runs)}, from {original.path.stem}"
        write_weights(path, merge(how, [run.weights for run in runs], starts), name, told)
        advance(1)


def interpolate_files(original: Path, tuned: Path, alpha: float, out: Path) -> None:
    """Mixes two checkpoints as WiSE-FT does and writes the result; see :func:`write_merges`."""
    how = Merge("wise", (alpha,))
    write_merges(open_checkpoint(original), [open_checkpoint(tuned)], {out: how})
