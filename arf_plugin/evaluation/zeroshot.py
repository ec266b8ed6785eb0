"""Classifiers of image features and their logits, computed as CLIP_benchmark computes them.

Zero-shot classifiers are built by CLIP_benchmark's own function and logits by the same operations in the same order,
so that scores equal its own to the last image. Its `accuracy` (1.6.2) fails with numpy 2.4, which no longer turns an
array of one element into a float; the counting is in :mod:`arf_plugin.evaluation.metrics`.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from arf_plugin.console import progress
from arf_plugin.errors import MissingDependencyError
from arf_plugin.evaluation.head import Head
from arf_plugin.evaluation.metrics import Predictions, predictions
from arf_plugin.evaluation.sets import EvaluationSet

if TYPE_CHECKING:
    import torch

SCALE = 100.0  # CLIP_benchmark's logit scale, whatever the model's own is
PRECISIONS = ("fp32", "amp")


class Classifier:
    """A model as a classifier of any set: zero-shot, or by its linear head on the classes that it was made for.

    Args:
        model: in evaluation mode, on `device`.
        head: the checkpoint's linear head, if it has one.
        tokenizer: texts to [n, L].
        device: where the model is.
        amp: under autocast, as CLIP_benchmark does by default (fp16 on a GPU, bf16 on the CPU).
        shown: whether long work shows a bar on a terminal.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        head: Head | None,
        tokenizer: Any,
        device: torch.device,
        amp: bool,
        shown: bool = True,
    ) -> None:
        self.model, self.head, self.tokenizer = model, head, tokenizer
        self.device, self.amp, self.shown = device, amp, shown
        self._columns: dict[tuple[str, tuple[str, ...]], torch.Tensor] = {}

    def uses_head(self, dataset: EvaluationSet) -> bool:
        """Whether the head classifies this set."""
        return self.head is not None and self.head.fits(dataset.classnames)

    def weights(self, dataset: EvaluationSet) -> torch.Tensor | Head:
        """What :meth:`predict` needs for a set: the head, or columns of unit norm [dimension, classes].

        A zero-shot classifier has per class the mean of the unit text features over the templates. Classes that an
        earlier set had with the same templates are not computed again.

        Raises:
            MissingDependencyError: without CLIP_benchmark.
        """
        import torch

        if self.head is not None and self.uses_head(dataset):
            return self.head
        known, templates = self._columns, dataset.templates
        new = [name for name in dict.fromkeys(dataset.classnames) if (name, templates) not in known]
        if new:
            columns = self._build(new, list(templates))
            known.update({(name, templates): columns[:, i] for i, name in enumerate(new)})
        return torch.stack([known[name, templates] for name in dataset.classnames], dim=1)

    def _build(self, names: list[str], templates: list[str]) -> torch.Tensor:
        try:
            from clip_benchmark.metrics.zeroshot_classification import zero_shot_classifier
        except ImportError:
            raise MissingDependencyError("clip-benchmark", "Evaluation", "evaluation") from None
        with progress("classifier", "classes", len(names), quiet=not self.shown) as bar:

            def counted() -> Iterator[str]:
                for name in names:
                    yield name
                    bar.update()

            # Our bar in place of its own, which would be written into logs, too.
            with contextlib.redirect_stderr(io.StringIO()):
                weights: torch.Tensor = zero_shot_classifier(
                    *(self.model, self.tokenizer, counted(), templates, self.device.type, self.amp)
                )
        return weights

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Unit image features [N, dimension] of images [N, 3, H, W] on the model's device."""
        import torch

        encode: Any = self.model.encode_image
        with torch.autocast(self.device.type, enabled=self.amp):
            return torch.nn.functional.normalize(encode(images), dim=-1)

    def classify(
        self, features: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | Head
    ) -> Predictions:
        """Classifies what :meth:`features` returned.

        Confidences are softmax probabilities at the model's own logit scale, or of the head's logits.

        Args:
            features: [N, dimension].
            target: int64 [N] on the model's device.
            weights: from :meth:`weights`.
        """
        import torch

        with torch.autocast(self.device.type, enabled=self.amp):
            if isinstance(weights, Head):
                return predictions(weights.logits(features), target)
            return predictions(SCALE * features @ weights, target, self._logit_scale() / SCALE)

    def predict(
        self, images: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | Head
    ) -> Predictions:
        """Classifies a batch of images; see :meth:`classify`."""
        import torch

        with torch.inference_mode():
            return self.classify(self.features(images), target, weights)

    def _logit_scale(self) -> float:
        own = getattr(self.model, "logit_scale", None)
        return SCALE if own is None else float(own.detach().float().exp())
