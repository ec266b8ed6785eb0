"""The texts of a task sample: its class prompt, and its caption anchor, joined by sample id.

open_clip's data pipelines carry one text per sample. Both texts therefore travel as one string with a NUL between
them, and `JointTokenizer` takes them apart where the pipeline calls the tokenizer.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from typing import Any

import torch

from arf_plugin.anchors.headers import ENCODING
from arf_plugin.anchors.ids import sample_id
from arf_plugin.anchors.images import IMAGE_EXTENSIONS, image_problem
from arf_plugin.checks.messages import missing_caption_message, missing_class_message
from arf_plugin.data.captions import CaptionStore
from arf_plugin.data.prompts import ClassIndices, ClassPrompts, choose
from arf_plugin.errors import MissingCaptionError, TaskDataError

SEPARATOR = "\0"


class TaskTexts:
    """Builds the joint text of a task sample.

    Args:
        prompts: Class prompts, or class indices for a head; None to use the sample's own text.
        captions: Caption anchors; None if that term is off.
        missing_caption: ``error`` or ``prompt``.
        seed: The run's seed, for the choice among templates and among several captions.
        epoch: Reads the current epoch, also in a loader worker.
        mix: Whether a sample without a class keeps its own text beside others' class prompts (plain mixing).
    """

    def __init__(
        self,
        prompts: ClassPrompts | ClassIndices | None,
        captions: CaptionStore | None,
        missing_caption: str = "error",
        seed: int = 0,
        epoch: Callable[[], int] = lambda: 0,
        mix: bool = True,
    ) -> None:
        self.prompts = prompts
        self.captions = captions
        self.missing_caption = missing_caption
        self.seed = seed
        self.epoch = epoch
        self.mix = mix

    def __call__(self, identity: str, cls: object | None, text: str | bytes | None) -> str | None:
        """Joins the texts of one sample.

        Args:
            identity: The sample's id.
            cls: Its class index, if it has one.
            text: Its own text, if it has one; as bytes, it is decoded only where it is needed.

        Returns:
            ``prompt`` or ``prompt NUL caption``; None for a sample without a text of its own where one is needed,
            which open_clip skips.

        Raises:
            TaskDataError: The sample has a ``cls`` that is no class index, or none and no text in its place.
            MissingCaptionError: The sample has no caption, and that is an error.
            UnicodeDecodeError: The sample's own text is needed, and is not UTF-8.
        """
        prompt = self._prompt(identity, cls, text)
        if prompt is None or self.captions is None:
            return prompt
        return f"{prompt}{SEPARATOR}{self._caption(identity, prompt)}"

    def _prompt(self, identity: str, cls: object | None, text: str | bytes | None) -> str | None:
        if self.prompts is None or (self.mix and cls is None and text is not None):
            own = text.decode("utf-8") if isinstance(text, bytes) else text
            return None if own is None else own.replace(SEPARATOR, " ")
        if cls is None:
            raise TaskDataError(missing_class_message(identity))
        return self.prompts(cls, identity, self.seed, self.epoch())

    def _caption(self, identity: str, prompt: str) -> str:
        assert self.captions is not None
        found = self.captions.get(identity)
        if found:
            return found[choose(len(found), "caption", self.seed, self.epoch(), identity)]
        if self.missing_caption == "prompt":
            return prompt
        raise MissingCaptionError(missing_caption_message([identity]))


class JoinedSamples:
    """open_clip's tar reader with the joint text written into each raw sample's ``txt``.

    Samples hold an image and a text and nothing else, so that the pipeline decodes nothing else. Those that it would
    skip (no image, neither ``txt`` nor ``cls``, a text that is needed and not UTF-8) are left to it.

    Args:
        read: open_clip's own ``tarfile_to_samples_nothrow``.
        texts: Builds the joint text.
    """

    def __init__(self, read: Callable[..., Iterator[dict[str, Any]]], texts: TaskTexts) -> None:
        self.read = read
        self.texts = texts

    def __call__(self, source: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
        """Yields raw samples (member suffix -> bytes), as the pipeline stage that this replaces does."""
        # webdataset lets the locale say how names are decoded; ids are the same under every locale.
        tarfile.TarFile.encoding = ENCODING
        for members in self.read(source, **kwargs):
            sample = {name: value for name, value in members.items() if name.startswith("__")}
            extension = next((name for name in IMAGE_EXTENSIONS if name in members), None)
            cls, text = members.get("cls"), members.get("txt")
            if extension is not None:
                image = sample[extension] = members[extension]
                if cls is not None or text is not None:
                    try:
                        joint = self.texts(_identity(members), cls, text)
                    except MissingCaptionError:
                        if image_problem(io.BytesIO(image), 0, len(image), decode=True) is None:
                            raise
                        continue  # no captioner could describe it, and open_clip would skip it too
                    except UnicodeDecodeError:
                        pass  # open_clip meets it again, names it and goes on
                    else:
                        text = None if joint is None else joint.encode()
            if text is not None:
                sample["txt"] = text
            yield sample


def _identity(sample: dict[str, Any]) -> str:
    url, key = sample["__url__"], sample["__key__"]
    if not (isinstance(url, str) and isinstance(key, str)):
        raise TaskDataError(
            f"A task sample has a member named like webdataset's own notes (url {url!r}, key {key!r}), so it has "
            "no id. Leave members such as KEY.__url__ out of the tars."
        )
    return sample_id(url, key)


class JointTokenizer:
    """Tokenizes a joint text into ``[1, 2, L]``: class prompt and caption of one sample.

    open_clip takes ``[0]`` of what its tokenizer returns for one sample, which leaves ``[2, L]``.

    Args:
        tokenizer: open_clip's tokenizer: list of n texts -> ``[n, L]``, int64.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        if name == "tokenizer":  # not yet set while unpickling
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def __call__(self, texts: str | list[str], *args: Any, **kwargs: Any) -> Any:
        """Tokenizes one joint text, alone or in a list."""
        joint = texts if isinstance(texts, str) else texts[0]
        return self.tokenizer(joint.split(SEPARATOR), *args, **kwargs)[None]


class LabelTokenizer:
    """Takes the tokenizer's place where a head classifies: the text is a class index, the result ``[1]``, int64.

    open_clip takes ``[0]`` of it for one sample, so the texts of a batch are its labels, ``[B]``.
    """

    def __call__(self, texts: str | list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Converts one class index, alone or in a list."""
        return torch.tensor([int(texts if isinstance(texts, str) else texts[0])])


class CsvTexts:
    """The captions list of open_clip's ``CsvDataset``, with joint texts in place of its own.

    Args:
        identities: The image path of each row, exactly as the CSV has it.
        classes: The column ``cls``, if there is one.
        own: The rows' own texts, if there are any.
        texts: Builds the joint text.
    """

    def __init__(
        self, identities: list[str], classes: list[Any] | None, own: list[str] | None, texts: TaskTexts
    ) -> None:
        self.identities = identities
        self.classes = classes
        self.own = own
        self.texts = texts

    def __len__(self) -> int:
        return len(self.identities)

    def __getitem__(self, row: int) -> str:
        cls = None if self.classes is None else self.classes[row]
        own = None if self.own is None else self.own[row]
        text = self.texts(self.identities[row], cls, own)
        assert text is not None, "the start-up check lets no row without a text pass"
        return text
