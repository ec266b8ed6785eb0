"""Prompts that come with CLIP_benchmark."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from arf_plugin.errors import MissingDependencyError

IMAGENET = "imagenet1k"


def default_templates(name: str) -> list[str]:
    """CLIP_benchmark's English templates for a data set; those of ImageNet if it has none for it.

    Raises:
        MissingDependencyError: without CLIP_benchmark.
    """
    found = importlib.util.find_spec("clip_benchmark")
    if found is None or found.origin is None:
        raise MissingDependencyError("clip-benchmark", "Evaluation", "evaluation")
    # The file and not the module: importing its data sets takes seconds.
    path = Path(found.origin).parent / "datasets" / "en_zeroshot_classification_templates.json"
    known = json.loads(path.read_text(encoding="utf-8"))
    return list(known.get(name, known[IMAGENET]))
