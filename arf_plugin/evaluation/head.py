"""A linear classification head beside CLIP's own weights: its place in a checkpoint, and how it classifies.

``arf probe`` writes it, ``--arf-head`` trains on from it, and evaluation uses it on the sets it was made for.
In a checkpoint, D being the dimension of the image features:

=======================  ====================================================
``arf_head.weight``      ``[classes, D]``
``arf_head.bias``        ``[classes]``
``arf_head.classnames``  uint8 ``[32]``, SHA-256 of the class names, one a line
=======================  ====================================================
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from arf_plugin.errors import EvaluationError

if TYPE_CHECKING:
    import torch

PREFIX = "arf_head."
NAMES = ("weight", "bias", "classnames")


@dataclasses.dataclass(frozen=True, eq=False)
class Head:
    """A linear classifier of unit image features."""

    weight: torch.Tensor  # [classes, D]
    bias: torch.Tensor  # [classes]
    digest: bytes  # SHA-256 of the class names, in the order of the classes

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Class scores ``[n, classes]`` of unit image features ``[n, D]``, in their dtype and on their device."""
        return features @ self.weight.to(features).T + self.bias.to(features)

    def fits(self, classnames: Sequence[str]) -> bool:
        """Whether the head was made for exactly these classes, in this order."""
        return self.digest == names_digest(classnames)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds of the head, by full name."""
        import torch

        digest = torch.tensor(list(self.digest), dtype=torch.uint8)
        return dict(zip((PREFIX + name for name in NAMES), (self.weight, self.bias, digest), strict=True))


def names_digest(classnames: Sequence[str]) -> bytes:
    """SHA-256 of class names."""
    return hashlib.sha256("\n".join(classnames).encode()).digest()


def split_head(weights: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Head | None]:
    """Parts a checkpoint's weights by name into CLIP's own and the head; None if there is none.

    Raises:
        EvaluationError: for a head that is incomplete or whose parts do not fit together.
    """
    own: dict[str, torch.Tensor] = {}
    parts: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        (parts if name.startswith(PREFIX) else own)[name.removeprefix(PREFIX)] = tensor
    if not parts:
        return own, None
    shapes = {name: list(parts[name].shape) for name in sorted(parts)}
    expected = {"bias": shapes.get("weight", [])[:1], "classnames": [32], "weight": shapes.get("weight")}
    if shapes != expected or parts["weight"].ndim != 2:
        raise EvaluationError(
            f"The checkpoint's head is damaged: found {shapes} under '{PREFIX}*', expected weight [classes, D], "
            "bias [classes] and classnames [32].\nMake it again with: arf probe"
        )
    return own, Head(parts["weight"], parts["bias"], bytes(parts["classnames"].tolist()))
