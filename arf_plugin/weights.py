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

from arf_plugin.safe_loading import safe_loading

if TYPE_CHECKING:
    import torch

_STATISTICS = (
    "running_mean",
    "running_var",
)  # of BatchNorm: buffers, as much part of the model as its weights
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth")  # that open_clip looks for in a folder


class Loaded:
    """The weights that were written from files."""

    def __init__(self) -> None:
        self._names: dict[int, set[str]] = {}
        self._owners: list[torch.nn.Module] = []  # keeps them, and so their ids

    def add(self, owner: torch.nn.Module, name: str) -> None:
        """Notes a weight of a module itself, not of one below it."""
        if id(owner) not in self._names:
            self._owners.append(owner)
        self._names.setdefault(id(owner), set()).add(name)

    def add_all(self, model: torch.nn.Module, but: Sequence[str] = ()) -> None:
        """Notes all weights of a model except some."""
        for name, owner, own, _ in _weights(model):
            if name not in but:
                self.add(owner, own)

    def random_parts(self, model: torch.nn.Module) -> list[str]:
        """Names of the model's weights that no file has given a value."""
        loaded = {id(t) for _, owner, own, t in _weights(model) if own in self._names.get(id(owner), ())}
        # One may have two names.
        return [name for name, _, _, tensor in _weights(model) if id(tensor) not in loaded]

    def around(self, load: Callable[..., Any], model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Calls a function that loads weights into a model, and notes those that it has written."""
        before = {(id(owner), own): (t, t._version) for _, owner, own, t in _weights(model)}
        result = load(model, *args, **kwargs)
        for _, owner, own, tensor in _weights(model):
            old, version = before.get((id(owner), own), (None, 0))
            if tensor is not old or tensor._version != version:
                self.add(owner, own)
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
        enter = stack.enter_context
        enter(patch.object(torch.nn.Module, "load_state_dict", watched(torch.nn.Module.load_state_dict)))
        # Some formats are copied tensor by tensor.
        enter(patch.object(open_clip.factory, "load_checkpoint", watched(open_clip.factory.load_checkpoint)))
        transformers = sys.modules.get("transformers")
        if transformers is not None:  # it is there before open_clip can build a text tower of it
            original = transformers.PreTrainedModel.__dict__["from_pretrained"]
            enter(patch.object(transformers.PreTrainedModel, "from_pretrained", _telling(original, loaded)))
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


tensors_only = safe_loading  # its former name, which the stages still use
