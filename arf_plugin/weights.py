"""Tells which weights of a model came from a file: what did not is random, whatever the library logged.

open_clip builds a model with random numbers and then loads what it finds: nothing if a folder has no weights, a part if
a checkpoint is of another kind, the towers alone if these are pretrained. :func:`watching` notes what each of its ways
of loading has written, so that nobody has to know them apart::

    with watching() as loaded:
        model = open_clip.create_model(...)
    loaded.random_parts(model)    # [] if every weight came from a file
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from arf_plugin.errors import FlagError, did_you_mean
from arf_plugin.files import not_there

if TYPE_CHECKING:
    import torch

# Of BatchNorm: buffers, as much part of the model as its weights.
_STATISTICS = ("running_mean", "running_var")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth")  # that open_clip looks for in a folder


def require_known(model: str, pretrained: str | None) -> None:
    """Refuses a model, or weights of it, that open_clip does not know, before anything is loaded or fetched.

    Raises:
        FlagError: With the name that is nearest.
    """
    import open_clip

    if ":" in model:  # it brings its weights along
        folder = Path(model.removeprefix("local-dir:"))
        if model.startswith("local-dir:") and not folder.is_dir():
            raise FlagError(f"--model {model}: {not_there(str(folder))}")
        return
    known = open_clip.list_models()
    if (name := model.replace("/", "-")) not in known:
        raise FlagError(
            f"open_clip knows no model {model!r}.{did_you_mean(name, known)} All names: "
            "python -c 'import open_clip; print(*open_clip.list_models())'"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained and pretrained.lower().replace("-", "_") not in tags and not Path(pretrained).exists():
        raise FlagError(
            f"There are no weights {pretrained!r} of {model}: no file, and no name that open_clip knows."
            f"{did_you_mean(pretrained, tags)} It knows: {', '.join(tags) or 'none'}."
        )


class Loaded:
    """The weights that were written from files, as (the module that owns it, its name there)."""

    def __init__(self) -> None:
        self._written: set[tuple[torch.nn.Module, str]] = set()  # modules are told apart by identity

    def add_all(self, model: torch.nn.Module, but: Sequence[str] = ()) -> None:
        """Notes all weights of a model except some."""
        self._written |= {(owner, own) for name, owner, own, _ in _weights(model) if name not in but}

    def random_parts(self, model: torch.nn.Module) -> list[str]:
        """Names of the model's weights that no file has given a value."""
        loaded = {id(t) for _, owner, own, t in _weights(model) if (owner, own) in self._written}
        # One may have two names.
        return [name for name, _, _, tensor in _weights(model) if id(tensor) not in loaded]

    def around(self, load: Callable[..., Any], model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Calls a function that loads weights into a model, and notes those that it has written."""
        before = {(owner, own): (t, t._version) for _, owner, own, t in _weights(model)}
        result = load(model, *args, **kwargs)
        for _, owner, own, tensor in _weights(model):
            old, version = before.get((owner, own), (None, 0))
            if tensor is not old or tensor._version != version:
                self._written.add((owner, own))
        return result


def _weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, str, torch.Tensor]]:
    """Yields (name, the module that owns it, its name there, tensor); a weight with two names comes twice."""
    for prefix, owner in model.named_modules():
        own = {**owner._parameters, **{n: owner._buffers[n] for n in _STATISTICS if n in owner._buffers}}
        for name, tensor in own.items():
            if tensor is not None:
                yield f"{prefix}.{name}" if prefix else name, owner, name, tensor


@contextmanager
def watching() -> Iterator[Loaded]:
    """Notes what is loaded into models within the block, by torch, open_clip or transformers; not thread-safe."""
    import open_clip.factory
    import torch

    loaded = Loaded()

    def watched(load: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(load)
        def wrapped(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            return loaded.around(load, model, *args, **kwargs)

        return wrapped

    with ExitStack() as stack:
        # Some formats are copied tensor by tensor, by open_clip.
        for owner, name in ((torch.nn.Module, "load_state_dict"), (open_clip.factory, "load_checkpoint")):
            stack.enter_context(patch.object(owner, name, watched(getattr(owner, name))))
        transformers = sys.modules.get("transformers")
        if transformers is not None:  # it is there before open_clip can build a text tower of it
            original = transformers.PreTrainedModel.__dict__["from_pretrained"]
            told = _telling(original, loaded)
            stack.enter_context(patch.object(transformers.PreTrainedModel, "from_pretrained", told))
        yield loaded


def _telling(original: Any, loaded: Loaded) -> Any:
    """``from_pretrained`` that notes what it loads, by its own account."""

    @functools.wraps(original.__func__)
    def wrapped(cls: type, *args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.pop("output_loading_info", False)
        model, info = original.__func__(cls, *args, output_loading_info=True, **kwargs)
        loaded.add_all(model, missing_weights(info))
        return (model, info) if wanted else model

    return classmethod(wrapped)


def missing_weights(info: dict[str, Any]) -> list[str]:
    """Names of the weights that transformers made up, from its ``output_loading_info``."""
    mismatched = (e[0] if isinstance(e, (tuple, list)) else e for e in info.get("mismatched_keys", ()))
    return sorted({*map(str, info.get("missing_keys", ())), *map(str, mismatched)})


def has_weights(folder: Path) -> bool:
    """Whether a folder has a file that open_clip would take for its weights."""
    return any(path.suffix in WEIGHT_SUFFIXES and path.is_file() for path in folder.iterdir())
