"""Linear probe, a baseline: multinomial logistic regression on frozen image features.

    min over W, b:  mean cross-entropy(W f + b, cls) + l2/2 ||W||^2,   f = unit image features, D-dimensional

As Radford et al. (CLIP, appendix A.3) and Kumar et al. (LP-FT, arXiv 2202.10054) do, an L-BFGS solver fits it to the
optimum and accuracy on validation data chooses the strength of the penalty. The problem is convex: where the solver
starts, from zero here, does not matter. Ours: unit features, as open_clip's zero-shot classifiers have them; the grid;
and that after the choice the probe is fitted to all task data, if the validation part was cut from it.
CLIP_benchmark's own probe needs a GPU and approximates the optimum by epochs of AdamW.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from arf_plugin.data.prompts import choose, class_index
from arf_plugin.errors import TaskDataError
from arf_plugin.evaluation.head import Head, names_digest

if TYPE_CHECKING:
    import torch

GRID = tuple(10 ** (-half / 2) for half in range(15))  # 1 to 1e-7, from strong to weak
BLOCK = 1 << 16  # rows whose scores are in memory at once


@dataclasses.dataclass(frozen=True)
class Labelled:
    """One image as it is stored, and its class."""

    id: str
    image: bytes
    cls: int


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """Frozen features of labelled images.

    Attributes:
        ids: Sample ids.
        vectors: ``[n, D]``, fp32, unit norm.
        labels: ``[n]``, int64.
        skipped: Reasons by id, of images that cannot be decoded.
    """

    ids: list[str]
    vectors: torch.Tensor
    labels: torch.Tensor
    skipped: dict[str, str]

    def part(self, rows: Sequence[int]) -> Features:
        """Some of the rows."""
        keep = list(rows)
        return Features([self.ids[row] for row in keep], self.vectors[keep], self.labels[keep], {})


def labelled_images(
    data: str,
    classes: int,
    dataset_type: str = "auto",
    csv_img_key: str = "filepath",
    csv_separator: str = "\t",
) -> Iterator[Labelled]:
    """Yields the images of task data that have a file, with their classes; arguments as open_clip names them.

    Raises:
        TaskDataError: for a sample without a class, or with one that is none.
    """
    from arf_plugin.anchors.ids import sample_id
    from arf_plugin.anchors.images import IMAGE_EXTENSIONS
    from arf_plugin.anchors.tars import scan_samples
    from arf_plugin.anchors.task import expand_urls, is_csv

    if is_csv(data, dataset_type):
        yield from _labelled_rows(data, classes, csv_img_key, csv_separator)
        return
    for url in expand_urls(data):
        for sample in scan_samples(url, TaskDataError, read=(*IMAGE_EXTENSIONS, "cls")):
            if sample.image is None:
                continue
            identity = sample_id(url, sample.key)
            if "cls" not in sample.members:
                raise TaskDataError(
                    f"Sample {identity} has no 'cls' (found: {', '.join(sorted(sample.members))}). A probe needs the "
                    "class of every image: write the class index beside it (KEY.cls)."
                )
            cls = class_index(sample.members["cls"].data, identity, classes)
            yield Labelled(identity, sample.image.data or b"", cls)


def _labelled_rows(path: str, classes: int, image_column: str, separator: str) -> Iterator[Labelled]:
    from pathlib import Path

    import pandas as pd

    from arf_plugin.anchors.task import read_csv_ids

    ids = read_csv_ids(path, image_column, separator)
    frame = pd.read_csv(path, sep=separator)
    if "cls" not in frame:
        raise TaskDataError(
            f"{path} has no column 'cls' (found: {', '.join(map(str, frame.columns))}), which a probe needs. Add it."
        )
    for identity, cls in zip(ids, frame["cls"].tolist(), strict=True):
        label = class_index(cls, identity, classes)
        try:
            yield Labelled(identity, Path(identity).read_bytes(), label)
        except OSError:
            yield Labelled(identity, b"", label)  # rejected where it is decoded, like a damaged image


def embed(
    model: torch.nn.Module,
    preprocess: Callable[[Any], torch.Tensor],
    samples: Iterator[Labelled],
    device: torch.device,
    batch_size: int = 256,
    workers: int = 2,
    advance: Callable[[int], object] = lambda count: None,
) -> Features:
    """Embeds labelled images with a frozen model, without augmentation; images that cannot be decoded are skipped.

    Raises:
        TaskDataError: if none is left.
    """
    import torch

    from arf_plugin.anchors.images import decode_image
    from arf_plugin.pipeline.source import map_ordered

    ids: list[str] = []
    labels: list[int] = []
    vectors: list[torch.Tensor] = []
    pixels: list[torch.Tensor] = []
    skipped: dict[str, str] = {}

    def forward() -> None:
        with torch.inference_mode():
            features = model.encode_image(torch.stack(pixels).to(device))
            vectors.append(torch.nn.functional.normalize(features.float(), dim=-1).cpu())
        advance(len(pixels))
        pixels.clear()

    decoded = map_ordered(
        lambda sample: preprocess(decode_image(sample.image)), samples, workers, ahead=2 * batch_size
    )
    for sample, image in decoded:
        if isinstance(image, Exception):
            skipped[sample.id] = str(image)
            continue
        ids.append(sample.id)
        labels.append(sample.cls)
        pixels.append(image)
        if len(pixels) == batch_size:
            forward()
    if pixels:
        forward()
    if not ids:
        raise TaskDataError(f"No image could be decoded ({len(skipped)} were tried).")
    return Features(ids, torch.cat(vectors), torch.tensor(labels), skipped)


def split(features: Features, fraction: float, seed: int = 0) -> tuple[Features, Features]:
    """Cuts a validation part off: of each class the same fraction, drawn by a hash of the sample ids.

    Returns:
        Training and validation part. A class of a single sample stays in the first.
    """
    by_class: dict[int, list[int]] = {}
    for row, label in enumerate(features.labels.tolist()):
        by_class.setdefault(label, []).append(row)
    held: set[int] = set()
    for rows in by_class.values():
        order = sorted(rows, key=lambda row: choose(1 << 63, "validation", seed, features.ids[row]))
        held.update(order[: min(round(fraction * len(rows)), len(rows) - 1)])
    everything = range(len(features.ids))
    return features.part([row for row in everything if row not in held]), features.part(sorted(held))


def fit(
    features: Features,
    classes: int,
    l2: float,
    device: torch.device | str = "cpu",
    start: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fits a logistic regression to its optimum, in fp64.

    Args:
        features: What to fit.
        classes: Number of classes.
        l2: Strength of the penalty on the weights; the bias is free.
        device: Where to compute.
        start: Weight and bias near the optimum, which saves time and changes nothing else.

    Returns:
        Weight ``[classes, D]`` and bias ``[classes]``, fp64, on the CPU.
    """
    import torch

    vectors, labels = features.vectors.to(device), features.labels.to(device)
    # CLIP's features share a large common part. Without it the same problem is far better conditioned, and the bias,
    # which is not penalised, takes the difference up again below.
    mean = vectors.double().mean(dim=0)
    weight = torch.zeros(classes, vectors.shape[1], dtype=torch.float64, device=device)
    bias = torch.zeros(classes, dtype=torch.float64, device=device)
    if start is not None:
        weight.copy_(start[0])
        bias.copy_(start[1].to(device) + weight @ mean)
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    solver = torch.optim.LBFGS(
        parameters,
        max_iter=2000,
        max_eval=4000,
        tolerance_grad=1e-8,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> torch.Tensor:
        solver.zero_grad()
        penalty = l2 / 2 * weight.square().sum()
        penalty.backward()
        total = penalty.detach()
        for rows, targets in zip(vectors.split(BLOCK), labels.split(BLOCK), strict=True):
            logits = (rows.double() - mean) @ weight.T + bias
            loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / len(labels)
            loss.backward()
            total = total + loss.detach()
        return total

    solver.step(objective)
    with torch.no_grad():
        return weight.detach().cpu(), (bias - weight @ mean).detach().cpu()


def measure(weight: torch.Tensor, bias: torch.Tensor, features: Features) -> tuple[float, float]:
    """Top-1 accuracy in percent, and mean cross-entropy."""
    import torch

    correct, loss = 0, 0.0
    for rows, targets in zip(features.vectors.split(BLOCK), features.labels.split(BLOCK), strict=True):
        logits = rows.double() @ weight.T + bias
        correct += int((logits.argmax(dim=1) == targets).sum())
        loss += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    return 100 * correct / len(features.labels), loss / len(features.labels)


def probe(
    task: Features,
    classnames: Sequence[str],
    validation: Features | None = None,
    fraction: float = 0.2,
    seed: int = 0,
    device: torch.device | str = "cpu",
    grid: Sequence[float] = GRID,
    advance: Callable[[int], object] = lambda count: None,
) -> tuple[Head, dict[str, Any]]:
    """Chooses the penalty on validation data and fits the probe.

    Args:
        task: Features of the task data.
        classnames: Names of the classes.
        validation: Features to choose by; None cuts a part off the task data, and fits to all of it after the choice.
        fraction: Size of that part.
        seed: Draws that part.
        device: Where to compute.
        grid: Strengths to try.
        advance: Told of each strength that is done.

    Returns:
        The head in fp32, and a summary for people and JSON: the chosen ``l2``, and ``grid``, validation accuracy and
        cross-entropy of each. Equal accuracies are told apart by cross-entropy.

    Raises:
        TaskDataError: if the validation part is empty.
    """
    training = task
    if validation is None:
        training, validation = split(task, fraction, seed)
    if not validation.ids:
        raise TaskDataError(
            f"{len(task.ids)} samples leave no validation part of {fraction:g}. Give --validation shards, or more."
        )
    path, solutions, start = [], [], None
    for l2 in sorted(grid, reverse=True):
        start = fit(training, len(classnames), l2, device, start)
        top1, loss = measure(*start, validation)
        path.append({"l2": l2, "top1": round(top1, 4), "loss": round(loss, 6)})
        solutions.append(start)
        advance(1)
    best = max(range(len(path)), key=lambda i: (path[i]["top1"], -path[i]["loss"]))
    weight, bias = solutions[best]
    if training is not task:
        weight, bias = fit(task, len(classnames), path[best]["l2"], device, solutions[best])
    summary = {
        "classes": len(classnames),
        "samples": len(task.ids),
        "validation": len(validation.ids),
        "skipped": len(task.skipped),
        "classes_without_samples": len(classnames) - len(set(task.labels.tolist())),
        "l2": path[best]["l2"],
        "at_edge_of_grid": best in (0, len(path) - 1),
        "validation_top1": path[best]["top1"],
        "training_top1": round(measure(weight, bias, task)[0], 4),
        "grid": path,
    }
    return Head(weight.float(), bias.float(), names_digest(classnames)), summary
