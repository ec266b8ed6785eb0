"""What importing a part of the package brings in, in fresh interpreters."""

from __future__ import annotations

import subprocess
import sys

import pytest


def imported(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import arf_plugin; dir(arf_plugin)",
        "import arf_plugin.errors",
        "import arf_plugin.cli.main as m; m.build_parser()",
    ],
)
def test_light_parts_import_no_torch(statement):
    assert not imported(statement) & {"torch", "numpy", "pandas", "pyarrow", "open_clip", "transformers"}


def test_the_training_path_needs_no_retrieval_and_no_captioner():
    hooks = ", ".join(f"arf_plugin.hooks.{name}" for name in ("data", "loss", "model"))
    found = imported(f"import open_clip_train.main, {hooks}")
    assert not found & {"faiss", "clip_retrieval", "clip_benchmark"}
    assert not {name for name in found if name.startswith(("arf_plugin.pipeline", "arf_plugin.evaluation"))}


def test_the_core_never_imports_the_hooks():
    names = ("data.batch", "data.pairs", "data.startup", "losses.anchored")
    found = imported("import " + ", ".join(f"arf_plugin.{name}" for name in names))
    assert not {name for name in found if name.startswith(("arf_plugin.hooks", "open_clip_train"))}
    # The task data come through pieces of open_clip's own pipeline.
    found = imported("import arf_plugin.data.loader")
    assert not {name for name in found if name.startswith("arf_plugin.hooks")}
