"""Prompts that come with CLIP_benchmark."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from arf_plugin.errors import EvaluationError, MissingDependencyError
from arf_plugin.untrusted import read_json

IMAGENET = "imagenet1k"


def default_templates(name: str) -> list[str]:
    """CLIP_benchmark's English templates for a data set; those of ImageNet if it has none for it.

    Raises:
        MissingDependencyError: without CLIP_benchmark.
        EvaluationError: its file of templates is damaged.
    """
    found = importlib.util.find_spec("clip_benchmark")
    if found is None or found.origin is None:
        raise MissingDependencyError("clip-benchmark", "Evaluation", "evaluation")
    # The file and not the module: importing its data sets takes seconds.
    path = Path(found.origin).parent / "datasets" / "en_zeroshot_classification_templates.json"
    known = read_json(path, EvaluationError, advice="Install clip-benchmark again.")
    found_here = known.get(name, known.get(IMAGENET))
    if not isinstance(found_here, list) or not all(isinstance(each, str) for each in found_here):
        raise EvaluationError(f"{path} has no list of templates of {IMAGENET}. Install clip-benchmark again.")
    return found_here
