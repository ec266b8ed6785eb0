"""Models made of fine-tuned runs and the weights they started from: Model Stock, soups, LiNeS.

With w0 the start, w_i the N runs, and d_i = w_i - w0 their updates, tensor by tensor:

=========  =======================================================================================================
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
* Integer tensors (BatchNorm's counters) are those of the first run; with ``lines``, of the nearer end.

Checkpoints are mapped from their files: memory holds one result, never the runs.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.checkpoints import Checkpoint, listed
from arf_plugin.evaluation.head import PREFIX
from arf_plugin.evaluation.interpolation import (
    CHUNK,
    align,
    check_heads,
    check_pair,
    check_same,
    combine,
    mix,
    write_all,
)
from arf_plugin.evaluation.run_settings import Settings

if TYPE_CHECKING:
    import torch

METHODS = ("stock", "soup", "lines")
LINES = tuple((i / 4, 1 - i / 4) for i in range(5))  # (a, b) to choose among: the last layer keeps its update
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
        lines: a and b of LiNeS; both ends of the scale, a and a + b, are from 0 (the start) to 1 (the run).

    Raises:
        EvaluationError: for another method, or a scale outside [0, 1].
    """

    method: str
    lines: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise EvaluationError(f"method is {self.method!r}, expected one of {', '.join(METHODS)}.")
        if (self.lines is None) == (self.method == "lines"):
            raise EvaluationError("a and b are LiNeS's: method 'lines' needs them, the others have none.")
        if self.lines is not None:
            first, last = self.lines[0], sum(self.lines)
            if not (0.0 <= first <= 1.0 and -1e-9 <= last <= 1.0 + 1e-9):
                raise EvaluationError(
                    f"LiNeS with a {self.lines[0]:g} and b {self.lines[1]:g} scales updates by {first:g} in the first "
                    f"and by {last:g} in the last layer. Expected both from 0 (as it was) to 1 (as fine-tuned)."
                )

    def __str__(self) -> str:
        return self.method if self.lines is None else f"lines {self.lines[0]:g} {self.lines[1]:g}"

    def check_count(self, count: int) -> None:
        """Raises an EvaluationError unless the method takes that many runs."""
        if self.method == "lines" and count != 1:
            raise EvaluationError(f"lines takes one fine-tuned checkpoint, {count} were given.")
        if count < (2 if self.method == "stock" else 1):
            raise EvaluationError(f"{self.method} merges two fine-tuned checkpoints or more; {count} given.")

    def title(self, runs: Sequence[Path]) -> str:
        """What records call the result."""
        return f"{self} of {', '.join(map(str, runs))}"


def merge(
    how: Merge, runs: Sequence[Mapping[str, torch.Tensor]], start: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Merges sets of weights.

    Args:
        how: the method.
        runs: fine-tuned weights by name: one for ``lines``, two or more for ``stock``.
        start: what they started from, with the same names and shapes; ``soup`` does not look at it.

    Returns:
        Tensors of their own, of the shapes and dtypes of the first run.

    Raises:
        EvaluationError: if names or shapes differ, or the number of runs does not fit; for ``lines``, if a name tells
            no layer.
    """
    how.check_count(len(runs))
    for number, run in enumerate(runs[1:], 2):
        check_same(runs[0], run, f"The first and the {number}. fine-tuned checkpoint")
    if how.method == "soup":
        return {name: _mean([run[name] for run in runs]) for name in runs[0]}
    if start is None:
        raise EvaluationError(f"{how.method} needs the weights before fine-tuning, too.")
    check_same(start, runs[0], "The checkpoints before and after fine-tuning")
    if how.lines is not None:
        (a, b), (run,) = how.lines, runs
        scales = {name: min(max(a + b * depth, 0.0), 1.0) for name, depth in depths(run).items()}
        return {name: mix(start[name], tensor, scales[name]) for name, tensor in run.items()}
    return {name: _stock(name, start[name], [run[name] for run in runs]) for name in runs[0]}


def _mean(runs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean, in the dtype of the first; integers are those of the first."""
    return combine(runs, [1 / len(runs)] * len(runs), runs[0].dtype)


def _stock(name: str, start: torch.Tensor, runs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Model Stock of one tensor."""
    if not runs[0].is_floating_point() or runs[0].numel() < 2 or name.endswith(_STATISTICS):
        return _mean(runs)
    share = stock_share(start, runs)
    return combine([start, *runs], [1 - share, *[share / len(runs)] * len(runs)], runs[0].dtype)


def stock_share(start: torch.Tensor, runs: Sequence[torch.Tensor]) -> float:
    """Model Stock's t of one tensor: the share of the runs' mean, from 0 to 1.

    Args:
        start: the tensor before fine-tuning.
        runs: after it, two or more.
    """
    import torch

    count = len(runs)
    flat = [tensor.reshape(-1) for tensor in (start, *runs)]
    products = torch.zeros(count, count, dtype=torch.float64)  # of the updates
    size = max(1, CHUNK // (4 * count))
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
    blocks: dict[str, set[tuple[int, ...]]] = {"visual": set(), "text": set()}
    for name, place in places.items():
        if isinstance(place, tuple):
            blocks[_tower(name)].add(place)
    order = {tower: {block: i for i, block in enumerate(sorted(found))} for tower, found in blocks.items()}
    found = {}
    for name, place in places.items():
        if isinstance(place, tuple):
            numbers = order[_tower(name)]
            place = numbers[place] / (len(numbers) - 1) if len(numbers) > 1 else 1.0
        assert place is not None
        found[name] = place
    return found


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


def merge_checkpoints(
    how: Merge, runs: Sequence[Checkpoint], original: Checkpoint | None = None
) -> dict[str, torch.Tensor]:
    """Merges opened checkpoints; the original is brought to the form of the runs, as open_clip would.

    Raises:
        EvaluationError: as :func:`merge`, with the files' names; also for heads that are not for the same classes.
    """
    how.check_count(len(runs))
    starts = check_runs(runs, None if how.method == "soup" else original)
    return merge(how, [run.weights for run in runs], starts)


def check_runs(
    runs: Sequence[Checkpoint], original: Checkpoint | None = None
) -> Mapping[str, torch.Tensor] | None:
    """Raises an EvaluationError unless all are weights of one architecture, runs in one form.

    Returns:
        The original's weights in the form of the runs.
    """
    first = runs[0]
    for run in runs[1:]:
        check_heads(first, run)
        check_same(first.weights, run.weights, f"{first.path} and {run.path}")
    return None if original is None else check_pair(original, first)


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


def write_merges(
    original: Checkpoint,
    runs: Sequence[Checkpoint],
    targets: Mapping[Path, Merge],
    advance: Callable[[int], object] = lambda count: None,
    flags: Settings | None = None,
) -> None:
    """Writes merged checkpoints; they tell of the first run, as mixtures do of theirs.

    Args:
        original: weights before fine-tuning.
        runs: weights after it.
        targets: methods by the file to write to.
        advance: told of every file that is written, for a progress bar.
        flags: how images and texts are seen, where that is not known from the first run.

    Raises:
        EvaluationError: as :func:`merge_checkpoints`, or if the disk is too full; nothing is written then.
    """
    for how in targets.values():
        how.check_count(len(runs))
        check_runs(runs, original)

    def made(how: Merge) -> tuple[str, Callable[[], Any]]:
        name = f"{how} of {', '.join(run.path.stem for run in runs)}, from {original.path.stem}"
        return name, lambda: merge_checkpoints(how, runs, original)

    write_all(original, runs[0], {path: made(how) for path, how in targets.items()}, advance, flags)
