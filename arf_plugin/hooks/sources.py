"""Where names of a package's modules come from, read from the sources: nothing is imported."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path


def exists(module: str) -> bool:
    """Whether a module is installed."""
    return _path(module) is not None


def origin(module: str, name: str) -> str | None:
    """Follows imports to where a name is defined.

    Returns:
        ``module:name``; for a name that stands for a module, ``MODULE:``. None if the module does not define the name.
    """
    found = _names(module).get(name)
    if found is None or found == (module, name):
        return None if found is None else f"{module}:{name}"
    source, imported = found
    return (origin(source, imported) if imported else None) or f"{source}:{imported}"


@functools.cache
def _path(module: str) -> Path | None:
    """The source of a module."""
    top, *parts = module.split(".")
    try:
        spec = importlib.util.find_spec(top)  # of a package that lies in none, so nothing is imported
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin)
    for part in parts:
        folder = path.parent / part
        path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    return path if path.suffix == ".py" and path.is_file() else None


@functools.cache
def _names(module: str) -> dict[str, tuple[str, str]]:
    """For each name that a module's own level binds: the module and the name there that it stands for."""
    path = _path(module)
    if path is None:
        return {}
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    names: dict[str, tuple[str, str]] = {}
    for node in _own_level(ast.parse(path.read_bytes()).body):
        if isinstance(node, ast.Import):
            for alias in node.names:
                whole = alias.name if alias.asname else alias.name.partition(".")[0]
                names[alias.asname or whole] = (whole, "")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names |= {alias.asname or alias.name: (source, alias.name) for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names[node.name] = (module, node.name)
        elif isinstance(node, ast.Assign):
            names |= {name.id: (module, name.id) for name in node.targets if isinstance(name, ast.Name)}
    return names


def _own_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, within ``if`` and ``try`` too; what comes first in them counts, so it is last here."""
    for node in body:
        yield node
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                yield from _own_level(handler.body)
            yield from _own_level(node.body)
        elif isinstance(node, ast.If):
            yield from _own_level(node.orelse)
            yield from _own_level(node.body)
