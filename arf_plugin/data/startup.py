"""What is checked before the first step."""

from __future__ import annotations

from typing import Any


def check_before_training(args: Any, config: Any, prompts: Any, shards: list[str]) -> None:
    """Placeholder."""
