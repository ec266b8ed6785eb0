"""Runs img2dataset in the environment that has it, with the limits that it lacks; see ``download.py``.

A program of the standard library and img2dataset: ``PYTHON img2dataset_run.py ARGUMENTS``, JSON of the arguments of
``img2dataset.download``. It ends with the process that holds the other end of its standard input. A shard needs no more
processes, each of which would import cv2, pandas and wandb first; should img2dataset start some, they import this
file again, so the limits hold there, too.
"""

from __future__ import annotations

import http.client
import importlib
import ipaddress
import json
import os
import signal
import socket
import sys
import threading
import time
import urllib.request
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

LARGEST = 1 << 26  # bytes of a reply; photos have millions
DEADLINE = 60.0  # seconds for a whole reply; img2dataset's timeout is one for each wait for bytes


class Limits(urllib.request.HTTPRedirectHandler):
    """Replies end, and redirects lead to no place that only this machine's network reaches."""

    def http_response(
        self, request: urllib.request.Request, response: http.client.HTTPResponse
    ) -> http.client.HTTPResponse:
        """Has a reply be read in pieces, up to a size and a time."""
        end, length = time.monotonic() + DEADLINE, response.headers.get("Content-Length")

        def read() -> bytes:
            content = bytearray()
            while part := response.read1(1 << 16):
                content += part
                if len(content) > LARGEST:
                    raise OSError(f"more than {LARGEST >> 20} MiB")
                if time.monotonic() > end:
                    raise OSError("timed out as a whole")
            if length is not None and len(content) != int(length):
                raise OSError("incomplete reply")
            return bytes(content)

        response.read = read  # type: ignore[method-assign, assignment]
        return response

    https_response = http_response

    def redirect_request(self, req: urllib.request.Request, *reply: Any) -> urllib.request.Request | None:
        """Follows to public http and https addresses, and to other pages of the host that was asked for."""
        to = urlsplit(reply[-1])
        if to.scheme not in ("http", "https") or not (
            to.netloc == urlsplit(req.full_url).netloc or _is_public(to.hostname or "")
        ):
            raise OSError(f"redirected to {to.scheme}://{to.netloc}, which was not followed")
        return super().redirect_request(req, *reply)


def _is_public(host: str) -> bool:
    return all(ipaddress.ip_address(found[4][0]).is_global for found in socket.getaddrinfo(host, None))


def _end_with_parent() -> None:
    sys.stdin.read()
    os.killpg(0, signal.SIGKILL)


urllib.request.install_opener(urllib.request.build_opener(Limits))

if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules have common names
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it would ask a server whether there is a newer one
    main: Any = importlib.import_module("img2dataset.main")
    main.multiprocessing_distributor = lambda count, download, reader, *_: [download(row) for row in reader]
    main.LoggerProcess = lambda *_: mock.MagicMock()  # it prints rates
    main.download(**json.loads(sys.argv[1]))
