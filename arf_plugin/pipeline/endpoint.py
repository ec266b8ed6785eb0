"""Captions from a server of chat completions, as OpenAI's API has them: vLLM, SGLang, ``transformers serve``."""

from __future__ import annotations

import base64
import io
import os
import re
from typing import TYPE_CHECKING, Any

from arf_plugin.errors import FlagError, ServiceError
from arf_plugin.files import digest
from arf_plugin.pipeline.service import Refused, ServerFault, ServiceClient, shown

if TYPE_CHECKING:
    import PIL.Image

    from arf_plugin.pipeline.captioner import Endpoint, Generation

KEY = "ARF_CAPTIONER_KEY"  # the environment variable that holds the server's key
LARGEST_SENT = 4 << 20  # bytes of an image that is sent as it is stored
LONGEST_SIDE = 2048  # pixels of one that is not
LARGEST_REPLY = 1 << 20  # bytes
_ABOUT_THE_IMAGE = (400, 413, 415, 422)  # statuses that may refuse one image and no other
_SENT = re.compile(rb"(?P<jpeg>\xff\xd8)|(?P<png>\x89PNG\r\n\x1a\n)|(?P<webp>RIFF.{4}WEBP)", re.S)


class EndpointCaptioner(ServiceClient):
    """A model of such a server.

    Args:
        endpoint: the server.
        model: its name there.
        generation: settings of the generation; without ``top_p`` it is greedy.

    Raises:
        FlagError: the key can be none.
    """

    expected = (
        "Expected a server of OpenAI-compatible chat completions at --captioner-url (such as "
        "http://127.0.0.1:8000/v1), as --captioner one of its models that take images (GET .../v1/models lists them), "
        f"and its key, if it wants one, in the environment variable {KEY}."
    )
    too_large = "Expected one caption."

    def __init__(self, endpoint: Endpoint, model: str, generation: Generation) -> None:
        key = os.environ.get(KEY, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise FlagError(f"{KEY} holds characters that no key has. Expected ASCII text in one line.")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        super().__init__(endpoint.address, endpoint.timeout, endpoint.patience, headers)
        self._model, self._generation = model, generation

    def check(self) -> None:
        """Asks for a caption of a white picture.

        Raises:
            ServiceError: the server is set up for something else, or does not answer; it says what to change.
        """
        import PIL.Image

        try:
            self._ask(_data_url(b"", PIL.Image.new("RGB", (224, 224), "white")), 0, "the first request")
        except ServerFault as cause:
            raise ServiceError(f"{cause}. {self.expected}") from cause
        except ValueError as cause:
            raise ServiceError(f"{self.url}: {self._model!r} {cause}") from cause
        self.proven = True

    def captions(self, name: str, encoded: bytes, image: PIL.Image.Image) -> list[str]:
        """Captions of an image, as many as asked for.

        Args:
            name: id of the sample, which seeds the sampling: captions depend on nothing else's order.
            encoded: the image as it is stored.
            image: the same, decoded to RGB.

        Raises:
            ValueError: the server refuses this image, or the model said nothing; the reason as a clause.
            ServiceError: the server fails for good or answers nonsense.
        """
        url = _data_url(encoded, image)
        what = f"the image {shown(name)}"
        seeds = [
            int(digest([self._generation.seed, name, number])[:7], 16)
            for number in range(self._generation.captions_per_image)
        ]
        try:
            return [self._ask(url, seed, what) for seed in seeds]
        except Refused as cause:
            if cause.status not in _ABOUT_THE_IMAGE:
                raise
            self.check()  # raises where another image is refused, too
            raise ValueError(f"is refused by the server: {cause.status} {cause.said}") from cause

    def _ask(self, image: str, seed: int, what: str) -> str:
        how = self._generation
        content = [
            {"type": "image_url", "image_url": {"url": image}},
            {"type": "text", "text": how.prompt},
        ]
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": how.max_new_tokens,
            "temperature": 0.0,
        }
        if how.top_p is not None:
            body |= {"temperature": how.temperature, "top_p": how.top_p, "seed": seed}
        reply = self.ask("POST", "/chat/completions", body, what=what, largest=LARGEST_REPLY)
        choices = reply.get("choices") if isinstance(reply, dict) else None
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = choice.get("message") if isinstance(choice, dict) else None
        text = message.get("content", 0) if isinstance(message, dict) else 0
        if not isinstance(text, (str, type(None))):
            raise ServiceError(
                f"{self.url} answered {shown(reply, 300)}; expected choices[0].message.content, a text. {self.expected}"
            )
        if not text and isinstance(choice, dict) and choice.get("finish_reason") == "length":
            raise ValueError(
                f"said nothing within --max-new-tokens {how.max_new_tokens}: allow more, or if the model thinks before "
                "it speaks, switch that off at the server"
            )
        return (text or "").encode("utf-8", "ignore").decode()  # JSON can spell halves of characters


def _data_url(encoded: bytes, image: PIL.Image.Image) -> str:
    """The image's own bytes if they are such as every server reads, and not too many; else a JPEG."""
    kind = _SENT.match(encoded)
    if kind is not None and len(encoded) <= LARGEST_SENT:
        return f"data:image/{kind.lastgroup};base64,{base64.b64encode(encoded).decode()}"
    image = image.copy()  # the smaller one is in its place
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
