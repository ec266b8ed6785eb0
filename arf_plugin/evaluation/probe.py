"""Linear probe, a baseline: multinomial logistic regression on frozen image features.

    min over W, b:  mean cross-entropy(W f + b, cls) + l2/2 ||W||^2,   f = unit image features, D-dimensional

As Radford et al. (CLIP, appendix A.3) and Kumar et al. (LP-FT, arXiv 2202.10054) do, scikit-learn's L-BFGS fits it to
the optimum and accuracy on validation data chooses the strength of the penalty. Ours: unit features, as open_clip's
zero-shot classifiers have them; the grid; and that after the choice the probe is fitted to all task data, if the
validation part was cut from it. CLIP_benchmark's own probe needs a GPU and approximates the optimum by epochs of AdamW.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from arf_plugin.data.prompts import choose, class_index
from arf_plugin.errors import MissingDependencyError, TaskDataError
from arf_plugin.evaluation.head import Head, names_digest

if TYPE_CHECKING:
    import torch

GRID = tuple(10 ** (-half / 2) for half in range(15))  # 1 to 1e-7, from strong to weak
_BLOCK = 1 << 16  # images whose scores are in memory at once


class Labelled(NamedTuple):
    """One image as it is stored, and its class."""

    id: str
    image: bytes
    cls: int


@dataclass(frozen=True, eq=False)
class Features:
    """Frozen features of labelled images, by sample id; and why others were skipped, which cannot be decoded."""

    ids: list[str]
    vectors: torch.Tensor  # [n, D], fp32, unit norm
    labels: torch.Tensor  # [n], int64
    skipped: dict[str, str]

    def part(self, positions: Sequence[int]) -> Features:
        """Some of the images."""
        keep = list(positions)
        return Features([self.ids[i] for i in keep], self.vectors[keep], self.labels[keep], {})


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
        yield from _labelled_in_csv(data, classes, csv_img_key, csv_separator)
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


def _labelled_in_csv(path: str, classes: int, image_column: str, separator: str) -> Iterator[Labelled]:
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
    from arf_plugin.images import load_batches

    ids: list[str] = []
    labels: list[int] = []
    vectors: list[torch.Tensor] = []
    skipped: dict[str, str] = {}
    for batch in load_batches(
        samples,
        lambda sample: preprocess(decode_image(sample.image)),
        batch_size,
        workers,
        reject=lambda sample, error: skipped.update({sample.id: str(error)}),
    ):
        with torch.inference_mode():
            encode: Any = model.encode_image
            features = encode(torch.stack([pixels for _, pixels in batch]).to(device))
            vectors.append(torch.nn.functional.normalize(features.float(), dim=-1).cpu())
        ids += [sample.id for sample, _ in batch]
        labels += [sample.cls for sample, _ in batch]
        advance(len(batch))
    if not ids:
        raise TaskDataError(f"No image could be decoded ({len(skipped)} were tried).")
    return Features(ids, torch.cat(vectors), torch.tensor(labels), skipped)


def split(features: Features, fraction: float, seed: int = 0) -> tuple[Features, Features]:
    """Cuts a validation part off: of each class the same fraction, drawn by a hash of the sample ids.

    Returns:
        Training and validation part. A class of a single sample stays in the first.
    """
    by_class = defaultdict[int, list[int]](list)
    for position, label in enumerate(features.labels.tolist()):
        by_class[label].append(position)
    held: set[int] = set()
    for positions in by_class.values():
        order = sorted(positions, key=lambda i: choose(1 << 63, "validation", seed, features.ids[i]))
        held.update(order[: min(round(fraction * len(positions)), len(positions) - 1)])
    everything = range(len(features.ids))
    return features.part([i for i in everything if i not in held]), features.part(sorted(held))


def solutions(features: Features, classnames: Sequence[str], grid: Sequence[float]) -> Iterator[Head]:
    """Fits a logistic regression to its optimum for every strength of the penalty, each starting at the last optimum.

    The bias is free. Classes without a sample get scores below all others'.

    Yields:
        Heads in fp64.

    Raises:
        TaskDataError: if all samples are of one class.
        MissingDependencyError: without scikit-learn.
    """
    import torch

    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise MissingDependencyError("scikit-learn", "A linear probe", "evaluation") from None
    present = features.labels.unique()
    if len(present) < 2:
        raise TaskDataError(
            f"All {len(features.ids)} samples are of class {int(present[0])}. A probe needs two classes or more."
        )
    # CLIP's features share a large common part. Without it the same problem is far better conditioned, and the bias,
    # which is not penalised, takes the difference up again.
    vectors = features.vectors.double()
    mean = vectors.mean(dim=0)
    vectors -= mean
    # Of two classes scikit-learn fits one sigmoid, with the difference of their weights.
    two = len(present) == 2
    solver = LogisticRegression(tol=1e-8, max_iter=2000, warm_start=True)
    for l2 in grid:
        solver.C = (2 if two else 1) / (l2 * len(vectors))
        solver.fit(vectors.numpy(), features.labels.numpy())
        found, free = torch.from_numpy(solver.coef_), torch.from_numpy(solver.intercept_)
        if two:
            found, free = torch.cat([-found, found]) / 2, torch.cat([-free, free]) / 2
        free = free - found @ mean
        weight = found.new_zeros(len(classnames), found.shape[1])
        bias = free.new_full((len(classnames),), float((free - found.norm(dim=1)).min()) - 10)
        weight[present], bias[present] = found, free
        yield Head(weight, bias, names_digest(classnames))


def measure(head: Head, features: Features) -> tuple[float, float]:
    """Top-1 accuracy in percent, and mean cross-entropy."""
    import torch

    correct, loss = 0, 0.0
    for vectors, labels in zip(features.vectors.split(_BLOCK), features.labels.split(_BLOCK), strict=True):
        logits = head.logits(vectors.double())
        correct += int((logits.argmax(dim=1) == labels).sum())
        loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    return 100 * correct / len(features.labels), loss / len(features.labels)


def probe(
    task: Features,
    classnames: Sequence[str],
    validation: Features | None = None,
    fraction: float = 0.2,
    seed: int = 0,
    advance: Callable[[int], object] = lambda count: None,
) -> tuple[Head, dict[str, Any]]:
    """Chooses the penalty on validation data and fits the probe.

    Args:
        task: Features of the task data.
        classnames: Names of the classes.
        validation: Features to choose by; None cuts a part off the task data, and fits to all of it after the choice.
        fraction: Size of that part.
        seed: Draws that part.
        advance: Told of each strength of `GRID` that is done.

    Returns:
        The head in fp32, and a summary for people and JSON: the chosen ``l2``, and ``grid``, validation accuracy and
        cross-entropy of each. Equal accuracies are told apart by cross-entropy.

    Raises:
        TaskDataError: if the validation part is empty, or there is but one class.
    """
    training = task
    if validation is None:
        training, validation = split(task, fraction, seed)
    if not validation.ids:
        raise TaskDataError(
            f"{len(task.ids)} samples leave no validation part of {fraction:g}. Give --validation shards, or more."
        )
    heads, tried = [], []
    for l2, head in zip(GRID, solutions(training, classnames, GRID), strict=True):
        top1, loss = measure(head, validation)
        heads.append(head)
        tried.append({"l2": l2, "top1": round(top1, 4), "loss": round(loss, 6)})
        advance(1)
    best = max(range(len(tried)), key=lambda i: (tried[i]["top1"], -tried[i]["loss"]))
    head = heads[best]
    if training is not task:
        [head] = solutions(task, classnames, [GRID[best]])
    summary = {
        "classes": len(classnames),
        "samples": len(task.ids),
        "validation": len(validation.ids),
        "skipped": len(task.skipped),
        "classes_without_samples": len(classnames) - len(task.labels.unique()),
        "l2": GRID[best],
        "at_edge_of_grid": best in (0, len(GRID) - 1),
        "validation_top1": tried[best]["top1"],
        "training_top1": round(measure(head, task)[0], 4),
        "grid": tried,
    }
    return Head(head.weight.float(), head.bias.float(), head.digest), summary
