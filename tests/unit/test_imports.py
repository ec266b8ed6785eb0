"""What may import what: read from the sources, and tried in fresh interpreters."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "arf_plugin"

# (importer, imported) of circles that are still there; a line that is not needed any more fails a test.
CIRCLES = {
    ("arf_plugin", "arf_plugin.api"),  # names of the package that are imported when they are used
}


def imports_of(path: Path, modules: set[str]) -> set[str]:
    """Modules of the package that a module imports anywhere, for types and within functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & modules or {node.module}
    return found & modules


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Imports by module; a folder's own module is ``arf_plugin.FOLDER``."""
    names = {
        path: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in PACKAGE.rglob("*.py")
    }
    return {name: imports_of(path, set(names.values())) - {name} for path, name in names.items()}


def test_no_circles(graph):
    exempt = {name: found - {b for a, b in CIRCLES if a == name} for name, found in graph.items()}
    try:
        TopologicalSorter(exempt).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_exceptions_are_needed(graph):
    """A circle that is gone leaves the list."""
    assert not {(a, b) for a, b in CIRCLES if b not in graph.get(a, set())}


def test_hooks_are_imported_by_the_start_up_file_and_the_commands_alone(graph):
    for name, found in graph.items():
        if not name.startswith(("arf_plugin.hooks", "arf_plugin.cli", "arf_plugin._boot")):
            # THE list of releases is read by others, too; it knows nothing of hooks.
            assert not {
                m for m in found if m.startswith("arf_plugin.hooks") and not m.endswith(".releases")
            }, name


def imported(*statements: str, beyond: str = "pass") -> list[set[str]]:
    """What a new interpreter has imported after each statement, beyond what it has for another."""
    code = f"import sys\n{beyond}\nown = set(sys.modules)\n"
    code += "".join(f"{statement}\nprint(*set(sys.modules) - own)\n" for statement in statements)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [set(line.split()) for line in done.stdout.splitlines()]


@pytest.mark.process
@pytest.mark.parametrize(
    "statement",
    [
        "import arf_plugin; dir(arf_plugin)",
        "import arf_plugin.cli.main as m; m.build_parser()",
        "from arf_plugin.cli.doctor import diagnose; assert diagnose()['hooks'][0]['applies']",
    ],
)
def test_light_parts_import_no_torch(statement):
    assert not imported(statement)[0] & {"torch", "numpy", "pandas", "pyarrow", "open_clip", "transformers"}


@pytest.mark.process
def test_the_training_path_needs_no_retrieval_no_captioner_and_no_evaluation(graph):
    """Beyond what open_clip imports itself, transformers among it. A run that is watched imports evaluation."""
    hooks = sorted(
        name for name in graph if name.startswith("arf_plugin.hooks.") and name.count("watch") == 0
    )
    (found,) = imported(f"import {', '.join(hooks)}", beyond="import open_clip_train.main")
    assert not found & {"faiss", "clip_retrieval", "clip_benchmark", "sklearn", "transformers"}
    assert not {name for name in found if name.startswith(("arf_plugin.pipeline", "arf_plugin.evaluation"))}


@pytest.mark.process
def test_the_core_never_imports_the_hooks():
    names = ("data.batch", "data.pairs", "data.startup", "losses.anchored")
    own = "import " + ", ".join(f"arf_plugin.{name}" for name in names)
    own, loader = imported(own, "import arf_plugin.data.loader")
    assert not {name for name in own if name.startswith(("arf_plugin.hooks", "open_clip_train"))}
    # The task data come through pieces of open_clip's own pipeline.
    assert not {name for name in loader if name.startswith("arf_plugin.hooks")}


@pytest.mark.process
def test_python_m_is_the_command():
    command = [sys.executable, "-m", "arf_plugin", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith(
        "arf-plugin "
    )
