"""A server of images on 127.0.0.1, some of which are gone, changed, slow, or not to be used."""

from __future__ import annotations

import threading
from collections import Counter

from support.knn_servers import LoopbackServer, send

JPEG = {"Content-Type": "image/jpeg"}
HTML = (200, {"Content-Type": "text/html"}, b"<h1>This domain is for sale</h1>")


class ImageServer(LoopbackServer):
    """Serves images by path, such as ``/3.jpg``.

    Args:
        images: by number.
        faults: by number: an HTTP status, ``drop``, ``html``, ``noai``, ``truncate``, ``swap`` (the image of another
            number), or an address that is redirected to.
    """

    def __init__(self, images: dict[int, bytes], faults: dict[int, int | str]):
        super().__init__()
        self.images, self.faults = images, faults
        self.asked: Counter[int] = Counter()
        self._lock = threading.Lock()

    def link(self, number: int) -> str:
        return f"{self.url}/{number}.jpg"

    def answer(self, handler, method, path, body):
        number = int(path.strip("/").removesuffix(".jpg"))
        with self._lock:
            self.asked[number] += 1
        fault = self.faults.get(number)
        image = (200, JPEG, self.images[number])
        if isinstance(fault, int):
            return send(handler, (fault, {}, b""))
        if fault == "drop":
            handler.close_connection = True
            return None
        if fault == "truncate":
            return send(handler, image, len(image[2]) // 2)
        if fault == "swap":
            image = (200, JPEG, self.images[(number + 1) % len(self.images)])
        elif fault == "noai":
            image = (200, JPEG | {"X-Robots-Tag": "noai"}, image[2])
        elif fault == "html":
            image = HTML
        elif fault is not None:
            image = (302, {"Location": fault}, b"")
        return send(handler, image)
