"""Anchor-based Robust Fine-tuning (ARF) for the open_clip trainer, and its parts for programs of one's own.

Importing this package imports nothing but the standard library's bare minimum: it is on the path of every Python
process in an environment that has the plugin. The names of `__all__` are imported when they are first used.
"""

__version__ = "0.1.0"
__all__ = [
    "AnchorSet",
    "AnchoredLoss",
    "OptimizerStep",
    "build_anchors",
    "evaluate",
    "fit",
    "interpolate",
    "merge",
    "sample_id",
]

TYPE_CHECKING = False
if TYPE_CHECKING:  # the typing module itself would cost every process a millisecond
    from arf_plugin.anchors.ids import sample_id
    from arf_plugin.api import AnchorSet, build_anchors, evaluate, fit, interpolate, merge
    from arf_plugin.data.batch import OptimizerStep
    from arf_plugin.losses.anchored import AnchoredLoss

_HOMES = {
    "AnchoredLoss": "arf_plugin.losses.anchored",
    "OptimizerStep": "arf_plugin.data.batch",
    "sample_id": "arf_plugin.anchors.ids",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value: object = getattr(importlib.import_module(_HOMES.get(name, "arf_plugin.api")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
