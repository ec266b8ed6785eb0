"""WiSE-FT: a straight line in weight space between the original and the fine-tuned model.

Source: Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, section 3:
theta = (1 - alpha) * theta_original + alpha * theta_fine-tuned.

Checkpoints are mixed tensor by tensor. Whatever their size and that of the optimizer state in them, the memory needed
is that of a few of their largest tensors (:mod:`arf_plugin.evaluation.tensor_files`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from arf_plugin.errors import EvaluationError
from arf_plugin.evaluation.alignment import align
from arf_plugin.evaluation.checkpoints import fitted
from arf_plugin.evaluation.head import PREFIX
from arf_plugin.evaluation.run_flags import find_run, note
from arf_plugin.evaluation.settings import Settings
from arf_plugin.evaluation.tensor_files import TensorInfo, WeightsFile
from arf_plugin.evaluation.tensor_writer import require_space, write_order, writing

if TYPE_CHECKING:
    import torch

ALPHAS = tuple(number / 10 for number in range(11))
_GROUP = 64 << 20  # bytes of tensors read between opening a checkpoint and giving its pages back
_CHUNK = 1 << 20  # elements whose fp64 sums are held at a time


def interpolate(
    original: Mapping[str, torch.Tensor], tuned: Mapping[str, torch.Tensor], alpha: float
) -> dict[str, torch.Tensor]:
    """Mixes two sets of weights in memory, by :func:`mix`.

    Args:
        original: tensors by name.
        tuned: the same names and shapes.
        alpha: 0 is the original, 1 the fine-tuned model.

    Raises:
        EvaluationError: if the names or shapes differ, or alpha is outside [0, 1].
    """
    check_alpha(alpha)
    _check_same(
        {name: TensorInfo.of(tensor) for name, tensor in original.items()},
        {name: TensorInfo.of(tensor) for name, tensor in tuned.items()},
    )
    return {name: mix(original[name], end, alpha) for name, end in tuned.items()}


def mix(start: torch.Tensor, end: torch.Tensor, alpha: float) -> torch.Tensor:
    """Mixes one tensor: ``(1 - alpha) * start + alpha * end``.

    Sums are taken in fp64 and rounded once, to the dtype of `end`. At 0 and 1 the result is the end point, bit by bit.
    Integer tensors (BatchNorm's counters) are taken from the nearer end point.

    Returns:
        A tensor of its own, contiguous, of the shape of both.
    """
    import torch

    if _is_copy(alpha, end.dtype):
        return (start if alpha < 0.5 else end).clone(memory_format=torch.contiguous_format)
    mixed = torch.empty(end.shape, dtype=end.dtype)
    target, left, right = mixed.view(-1), start.reshape(-1), end.reshape(-1)
    for i in range(0, target.numel(), _CHUNK):
        part = slice(i, i + _CHUNK)
        target[part] = (1.0 - alpha) * left[part].double() + alpha * right[part].double()
    return mixed


def interpolate_files(original: Path, tuned: Path, alpha: float, out: Path) -> None:
    """Mixes two checkpoints and writes the result; see :func:`write_mixtures`."""
    write_mixtures(WeightsFile(original), WeightsFile(tuned), {out: alpha})


def write_mixtures(
    original: WeightsFile,
    tuned: WeightsFile,
    targets: Mapping[Path, float],
    advance: Callable[[int], object] = lambda count: None,
    flags: Settings | None = None,
) -> None:
    """Writes checkpoints along the line, reading both ends once for all of them.

    They have the form of the fine-tuned one (see :mod:`arf_plugin.evaluation.alignment`), and tell of its run.

    Args:
        original: weights before fine-tuning.
        tuned: weights after it.
        targets: alphas by the file to write to; each file appears under its name when all are whole.
        advance: told of every tensor that is written, for a progress bar.
        flags: how images and texts are seen, where that is not known from the fine-tuned one's run.

    Raises:
        EvaluationError: if the checkpoints are of different architectures, an alpha is outside [0, 1], or the disk is
            too full.
    """
    starts = check_pair(original, tuned)
    names = write_order(tuned.tensors)
    flags = flags or Settings()
    told = note(find_run(tuned.path, tuned.run, flags), flags)
    contents = {path: mixed_tensors(starts, tuned.tensors, alpha, names) for path, alpha in targets.items()}
    sizes = {path: sum(info.bytes for info in content.values()) for path, content in contents.items()}
    for folder in {path.parent for path in targets}:
        here = [size for path, size in sizes.items() if path.parent == folder]
        require_space(folder, sum(here), f"{len(here)} checkpoint(s)")
    with ExitStack() as stack:
        writes: dict[float, list[Callable[[torch.Tensor], None]]] = {}
        for path, alpha in targets.items():
            name = f"{original.path.stem} and {tuned.path.stem} at {alpha:g}"
            write = stack.enter_context(writing(path, contents[path], name, told))
            writes.setdefault(alpha, []).append(write)
        for alpha, tensor in _stream(original, tuned, names, list(writes)):
            for write in writes[alpha]:
                write(tensor)
                advance(1)


def load_mixture(
    model: torch.nn.Module, original: WeightsFile, tuned: WeightsFile, alpha: float
) -> torch.nn.Module:
    """Loads the mixture of two checkpoints into a model, with no copy of the whole in between.

    Args:
        model: a model of their architecture, on any device.
        original: weights before fine-tuning.
        tuned: weights after it.
        alpha: 0 is the original, 1 the fine-tuned model.

    Raises:
        EvaluationError: if one of the three is of another architecture, or alpha is outside [0, 1].
    """
    import torch

    check_alpha(alpha)
    check_pair(original, tuned)
    # What the model takes as it is, is mixed right into it. What open_clip converts (position embeddings of another
    # size), is mixed first, as it is in a written mixture: the two are then equal.
    with tuned.opened() as ends:
        mine = {name: tensor for name, tensor in ends.items() if not name.startswith(PREFIX)}
        sources = {id(tensor): name for name, tensor in mine.items()}
        try:
            state = fitted(model, mine, tuned.path)
        except EvaluationError as error:
            raise EvaluationError(
                f"--model and {tuned.path} are of different architectures: {error}"
            ) from error
        direct = {sources[id(tensor)]: name for name, tensor in state.items() if id(tensor) in sources}
        unchanged = {name for name, tensor in state.items() if id(tensor) not in sources}
        del ends, state
        rest = [name for name in mine if name not in direct]
        if rest:
            with original.opened() as starts:
                aligned = align(starts, mine)
                mixed = {name: mix(aligned[name], mine[name], alpha) for name in rest}
                del starts, aligned
            state = fitted(model, {**mine, **mixed}, tuned.path)
            converted = {name: state[name] for name in unchanged}
            del state
        del mine
    own = model.state_dict()  # shares its memory with the model
    with torch.no_grad():
        for name, (_, tensor) in zip(direct, _stream(original, tuned, list(direct), [alpha]), strict=True):
            own[direct[name]].copy_(tensor)
        for name in unchanged:
            own[name].copy_(converted[name])
    return model


def mixed_tensors(
    original: Mapping[str, TensorInfo], tuned: Mapping[str, TensorInfo], alpha: float, names: Sequence[str]
) -> dict[str, TensorInfo]:
    """Types and shapes of a mixture's tensors, in the order of `names`; see :func:`mix`."""
    check_alpha(alpha)
    nearer = original if alpha < 0.5 else tuned
    return {name: (nearer if _is_copy(alpha, tuned[name].dtype) else tuned)[name] for name in names}


def check_alpha(alpha: float) -> None:
    """Raises an EvaluationError unless alpha is a number from 0 to 1."""
    if not 0.0 <= alpha <= 1.0:
        raise EvaluationError(
            f"alpha is {alpha}. Expected a number from 0 (the first) to 1 (the second checkpoint)."
        )


def check_pair(original: WeightsFile, tuned: WeightsFile) -> dict[str, TensorInfo]:
    """Raises an EvaluationError unless both are weights of one architecture, with heads for the same classes.

    Returns:
        Shapes and types of the original's weights in the form of the other's.
    """
    heads = [any(name.startswith(PREFIX) for name in file.tensors) for file in (original, tuned)]
    if heads[0] != heads[1]:
        having, other = (original, tuned) if heads[0] else (tuned, original)
        raise EvaluationError(
            f"{having.path} has a classification head and {other.path} has none, so they cannot be mixed. Give two "
            "checkpoints with a head (arf probe makes the one before fine-tuning), or two without."
        )
    starts = original.tensors
    if {name: info.shape for name, info in starts.items()} != {n: i.shape for n, i in tuned.tensors.items()}:
        with original.opened() as start, tuned.opened() as end:
            starts = {name: TensorInfo.of(tensor) for name, tensor in align(start, end).items()}
            del start, end
    _check_same(starts, tuned.tensors, f"{original.path} and {tuned.path}")
    classes = f"{PREFIX}classnames"
    if classes in tuned.tensors:
        with original.opened() as start, tuned.opened() as end:
            same = start[classes].tolist() == end[classes].tolist()
        if not same:
            raise EvaluationError(
                f"The heads of {original.path} and {tuned.path} are for different class names. "
                "Mix checkpoints of one task."
            )
    return starts


def _stream(
    original: WeightsFile, tuned: WeightsFile, names: Sequence[str], alphas: Sequence[float]
) -> Iterator[tuple[float, torch.Tensor]]:
    """Yields every mixture of every tensor: names in the given order, for each of them all alphas."""
    for group in _groups(names, tuned.tensors):
        with original.opened() as starts, tuned.opened() as ends:
            aligned = align(starts, ends)
            for name in group:
                for alpha in alphas:
                    yield alpha, mix(aligned[name], ends[name], alpha)
            del starts, ends, aligned  # the last references to the mapped files


def _groups(names: Sequence[str], tensors: Mapping[str, TensorInfo]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name in names:
        if group and size + tensors[name].bytes > _GROUP:
            yield group
            group, size = [], 0
        group.append(name)
        size += tensors[name].bytes
    if group:
        yield group


def _is_copy(alpha: float, dtype: torch.dtype) -> bool:
    return alpha in (0.0, 1.0) or not dtype.is_floating_point


def _check_same(
    original: Mapping[str, TensorInfo], tuned: Mapping[str, TensorInfo], which: str = "The two checkpoints"
) -> None:
    problems = [f"'{name}' is missing" for name in original if name not in tuned]
    problems += [
        f"'{name}' is {list(tuned[name].shape)} and not {list(info.shape)}"
        for name, info in original.items()
        if name in tuned and tuned[name].shape != info.shape
    ]
    problems += [f"'{name}' is not expected" for name in tuned if name not in original]
    if problems:
        raise EvaluationError(
            f"{which} are of different architectures; in the second, {'; '.join(problems[:3])}"
            f"{f'; and {len(problems) - 3} more' if len(problems) > 3 else ''}. Only one model's weights can be mixed."
        )
