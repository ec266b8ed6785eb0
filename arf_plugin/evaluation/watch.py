"""Zero-shot accuracy of a model that is being trained: measured between epochs, and training does not notice.

The scores are those of ``arf evaluate``: the same classifier, the same counting. What differs is that the model is the
live one, so its modes and every random number generator are put back as they were.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from arf_plugin.console import progress
from arf_plugin.errors import EvaluationError, MissingDependencyError
from arf_plugin.evaluation import batches
from arf_plugin.evaluation.distributed import Processes
from arf_plugin.evaluation.metrics import Predictions, accuracies, joined
from arf_plugin.evaluation.records import packed
from arf_plugin.evaluation.sets import EvaluationSet, find_sets
from arf_plugin.evaluation.zeroshot import Classifier
from arf_plugin.resume.rng import restore_rng, rng_state

Features = dict[str, torch.Tensor]
_Part = tuple[Predictions, torch.Tensor]  # what a batch gave: answers and features


@dataclass(frozen=True)
class Observation:
    """What was seen of one set."""

    dataset: EvaluationSet
    metrics: dict[str, float]  # in percent, see :func:`arf_plugin.evaluation.metrics.accuracies`
    right: str  # which images were right, see :func:`arf_plugin.evaluation.records.packed`
    features: (
        Features  # image [N, D] in the set's order, text [C, D] of the classes; unit, float32, on the CPU
    )
    seconds: float  # how long all sets of the round took


def open_sets(folders: Sequence[str]) -> list[EvaluationSet]:
    """Opens the sets in or below folders, as ``arf evaluate --data`` reads them.

    Raises:
        EvaluationError: for a folder that is missing or holds no set, a set that is malformed, and two of one name.
        MissingDependencyError: without CLIP_benchmark, which builds the classifiers.
    """
    if importlib.util.find_spec("clip_benchmark") is None:
        raise MissingDependencyError("clip-benchmark", "--arf-watch", "evaluation")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            sets = [found for folder in folders for found in find_sets(Path(folder))]
    except EvaluationError as error:
        raise EvaluationError(f"--arf-watch: {error}") from error
    for warning in caught:  # into the trainer's log
        logging.warning(f"ARF watch: {warning.message}")
    names = [dataset.name for dataset in sets]
    for name in names:
        if names.count(name) > 1:
            raise EvaluationError(
                f"--arf-watch: two sets are called '{name}'. Name a folder above both, so that results can tell them "
                "apart."
            )
    return sets


@dataclass
class Observer:
    """Measures a live model on sets of images.

    Several processes share the images and the classes. All of them must call :meth:`observe`, and all get the result.

    """

    sets: Sequence[EvaluationSet]
    preprocess: Callable[[Any], torch.Tensor]  # the model's transform for evaluation
    tokenizer: Any  # texts to [n, L]
    device: torch.device
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]  # what the trainer runs forwards in
    amp: bool  # whether that is mixed precision
    dtype: torch.dtype | None  # of images that go into the model; None for float32
    batch_size: int
    workers: int  # processes that decode images
    processes: Processes  # those that train together

    def observe(self, model: torch.nn.Module) -> list[Observation]:
        """Measures the model, open_clip's without wrappers, on every set.

        Raises:
            EvaluationError: in every process, if one of them cannot read an image.
        """
        start = time.perf_counter()
        texts = []
        with left_alone(model), torch.no_grad(), self.autocast():
            classifier = Classifier(model, None, self.tokenizer, self.device, self.amp, self.processes.first)

            def prepare(dataset: EvaluationSet) -> Callable[[torch.Tensor, torch.Tensor], _Part]:
                weights = self._weights(classifier, dataset)
                texts.append(weights.T.float().cpu())

                def use(images: torch.Tensor, target: torch.Tensor) -> _Part:
                    features = classifier.features(images.to(dtype=self.dtype))
                    return classifier.classify(features, target, weights), features.float().cpu()

                return use

            total = sum(dataset.images for dataset in self.sets)
            with progress("watch", "images", total, quiet=not self.processes.first) as bar:
                measured = list(
                    batches.shared(
                        self.sets,
                        prepare,
                        self.preprocess,
                        batch_size=self.batch_size,
                        workers=self.workers,
                        device=self.device,
                        processes=self.processes,
                        advance=bar.update,
                    )
                )
        seconds = time.perf_counter() - start
        found = []
        for (dataset, parts), text in zip(measured, texts, strict=True):
            answers, images = zip(*parts, strict=True)
            both = joined(answers)
            metrics = accuracies(both, len(dataset.classnames))
            right = packed((both.target == both.predicted).numpy())
            features = {"image": torch.cat(images), "text": text}
            found.append(Observation(dataset, metrics, right, features, seconds))
        return found

    def _weights(self, classifier: Classifier, dataset: EvaluationSet) -> torch.Tensor:
        """The zero-shot classifier [D, C], each process building its share of the classes."""
        world, names = self.processes.world, dataset.classnames
        mine = names[self.processes.rank :: world] or names[:1]  # more processes than classes: not used
        share = classifier.weights(replace(dataset, classnames=mine))
        assert isinstance(share, torch.Tensor), "without a head"
        shares = self.processes.gather(share.cpu())
        columns = [shares[n % world][:, n // world] for n in range(len(names))]
        return torch.stack(columns, dim=1).to(self.device)


@contextlib.contextmanager
def left_alone(model: torch.nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode, and afterwards every module of it and all random numbers back.

    Each module by itself: frozen BatchNorm layers are in evaluation mode amid others that train.
    """
    modes = {module: module.training for module in model.modules()}
    numbers = rng_state()
    try:
        model.eval()
        yield
    finally:
        restore_rng(numbers)
        for module, mode in modes.items():
            module.training = mode
