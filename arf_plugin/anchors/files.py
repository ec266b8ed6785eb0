"""Files that appear whole or not at all, and digests of what went into them."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TEMPORARY = ".incomplete-"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` that takes its name once the block has succeeded.

    Two processes may write the same file at once: each has a temporary name of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}@{socket.gethostname()}@{path.name}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Returns the folder for what can be derived again: ``ARF_CACHE_DIR``, else ``~/.cache/arf-plugin``."""
    return Path(os.environ.get("ARF_CACHE_DIR") or Path.home() / ".cache" / "arf-plugin")


def remove_incomplete(folder: Path, *, all_hosts: bool = True) -> None:
    """Removes what killed processes left behind in a folder.

    Args:
        folder: the folder; those below are left alone.
        all_hosts: removes every temporary file; otherwise only those of processes of this host that are gone, for
            folders that another stage may be writing to.
    """
    for path in folder.glob(f"{_TEMPORARY}*"):
        pid, _, rest = path.name.removeprefix(_TEMPORARY).partition("@")
        here = rest.startswith(f"{socket.gethostname()}@")
        if all_hosts or (here and not (pid.isdigit() and _is_alive(int(pid)))):
            path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_json(path: Path, value: Any) -> None:
    """Writes JSON with sorted keys, so that equal values are equal bytes."""
    with replacing(path) as temporary:
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def digest(value: Any) -> str:
    """Returns the SHA-256 of a JSON value in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def folder_digest(folder: Path) -> str:
    """Returns one SHA-256 over the names and contents of all files below a folder, hidden ones left out."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    return digest([[str(p.relative_to(folder)), file_digest(p)] for p in files])
