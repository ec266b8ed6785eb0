"""Small helpers for files that are either complete or absent."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from arf_plugin.files import replacing

__all__ = ["Stage", "bar", "read_json", "replacing", "unit_hash", "write_json", "write_text"]


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def unit_hash(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts only: the same on every machine and in every run.

    Splits by such numbers are stable: adding a concept or a vendor moves no other one.
    """
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def bar(**options: Any) -> tqdm:
    """A progress bar; where nobody watches, a line every half minute."""
    return tqdm(mininterval=0.3 if sys.stderr.isatty() else 30, **options)


class Stage:
    """A step whose result is complete if its marker file holds the digest of what it was made from."""

    def __init__(self, folder: Path, name: str, made_from: Any) -> None:
        self.marker = folder / f".{name}.done"
        self.digest = hashlib.sha256(json.dumps(made_from, sort_keys=True, default=str).encode()).hexdigest()

    @property
    def done(self) -> bool:
        """Whether a finished result of the same inputs is there."""
        return self.marker.is_file() and self.marker.read_text() == self.digest

    def finish(self) -> None:
        """Marks the step as finished; call it last."""
        write_text(self.marker, self.digest)
