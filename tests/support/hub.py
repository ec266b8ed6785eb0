"""A dataset on a hub like Hugging Face's, on 127.0.0.1: as much of its API as listing and reading files takes."""

from __future__ import annotations

import hashlib
import json
from urllib.parse import unquote, urlsplit

from support.knn_servers import LoopbackServer, send

COMMIT = "0" * 40
NAME = "someone/pictures"


class Hub(LoopbackServer):
    """Serves one dataset, `NAME`.

    Args:
        files: content by path.
    """

    def __init__(self, files: dict[str, bytes]):
        super().__init__()
        self.files = files
        self.read: list[str] = []

    def answer(self, handler, method, path, body):
        path = unquote(urlsplit(path).path)
        api, resolve = f"/api/datasets/{NAME}", f"/datasets/{NAME}/resolve/main/"
        if path in (api, f"{api}/revision/main"):
            return send(handler, _json({"id": NAME, "sha": COMMIT, "siblings": [], "private": False}))
        if path.startswith(f"{api}/tree/main"):
            below = path.removeprefix(f"{api}/tree/main").strip("/")
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
                for name, data in self.files.items()
                if name.startswith(below)
            ]
            return send(handler, _json(tree))
        if path.startswith(resolve) and (name := path.removeprefix(resolve)) in self.files:
            data = self.files[name]
            said = {"X-Repo-Commit": COMMIT, "ETag": f'"{_oid(data)}"'}
            if method == "HEAD":
                return send(handler, (200, said, data), 0)
            self.read.append(name)
            return send(handler, (200, said, data))
        return send(handler, (404, {"X-Error-Code": "RepoNotFound"}, b""))


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _json(value):
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()
