"""The texts of a task sample: its class prompt, and its caption anchor, found by the sample's id."""

from __future__ import annotations

from collections.abc import Callable

import torch

from arf_plugin.anchors.features import CaptionFeatures
from arf_plugin.checks.messages import missing_caption_message, missing_class_message, no_features_message
from arf_plugin.data.batch import Sample
from arf_plugin.data.captions import CaptionStore
from arf_plugin.data.prompts import ClassIndices, ClassPrompts, choose
from arf_plugin.errors import AnchorSetError, MissingCaptionError, TaskDataError


class TaskTexts:
    """Finds the texts of task samples.

    Args:
        classes: Class prompts, or class indices for a head; None to use the samples' own texts. Beside prompts, a
            sample without a class keeps its own text (plain mixing).
        captions: Caption anchors; None if that term is off.
        missing_caption: ``error`` or ``prompt``.
        seed: The run's seed, for the choice among templates and among several captions.
        epoch: Reads the current epoch, also in a loader worker.
        features: Those of the captions, if captions are held by these.
    """

    def __init__(
        self,
        classes: ClassPrompts | ClassIndices | None,
        captions: CaptionStore | None,
        missing_caption: str = "error",
        seed: int = 0,
        epoch: Callable[[], int] = lambda: 0,
        features: CaptionFeatures | None = None,
    ) -> None:
        self.classes, self.captions, self.features = classes, captions, features
        self.missing_caption, self.seed, self.epoch = missing_caption, seed, epoch

    def __call__(self, identity: str, cls: object | None, text: str | bytes | None) -> Sample | None:
        """Finds the texts of one sample, as parts of a batch; its own text, as bytes, is decoded where it is needed.

        Returns:
            None for a sample without a text of its own where one is needed, which open_clip skips.

        Raises:
            TaskDataError: The sample has a ``cls`` that is no class index, or none and no text in its place.
            MissingCaptionError: The sample has no caption, and that is an error.
            AnchorSetError: Its captions have no features, and need some.
            UnicodeDecodeError: The sample's own text is needed, and is not UTF-8.
        """
        if isinstance(self.classes, ClassIndices):
            return {"label": self.classes(_present(cls, identity), identity)}
        if self.classes is None or (cls is None and text is not None):
            prompt = text.decode("utf-8") if isinstance(text, bytes) else text
            if prompt is None:
                return None
        else:
            prompt = self.classes(_present(cls, identity), identity, self.seed, self.epoch())
        if self.captions is None:
            return {"text": prompt}
        return {"text": prompt, **self._caption(self.captions, identity, prompt)}

    def _caption(self, captions: CaptionStore, identity: str, prompt: str) -> Sample:
        found = captions.get(identity)
        if found:
            number = choose(len(found), "caption", self.seed, self.epoch(), identity)
            caption: Sample = {"caption_text": found[number]}
            if self.features is not None:
                vectors = self.features.get(identity)
                if len(vectors) != len(found):
                    raise AnchorSetError(no_features_message(f"A caption of {identity}"))
                caption["caption_text_feature"] = torch.tensor(vectors[number], dtype=torch.float32)
            return caption
        if self.missing_caption == "prompt":
            return {"caption_text": prompt}
        raise MissingCaptionError(missing_caption_message([identity]))


def _present(cls: object | None, identity: str) -> object:
    if cls is None:
        raise TaskDataError(missing_class_message(identity))
    return cls
