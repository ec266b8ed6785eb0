"""How many positions the texts of a batch need, for towers that may leave out the rest.

open_clip pads every text to the context length, 77 for CLIP, although class prompts and captions take 10 to 30
positions. A tower with a causal mask that is pooled at the end-of-text token computes the same features from the
positions up to that token alone. Ours, not the paper's.
"""

from __future__ import annotations

import dataclasses

import torch

# Few different lengths keep compiled kernels and memory blocks in use; a multiple of 8 suits tensor cores.
MULTIPLE = 8


@dataclasses.dataclass(frozen=True)
class TextTrimmer:
    """Finds the length to which a batch of texts can be cut without changing its features.

    Attributes:
        context_length: Positions of an untrimmed text.
        end_token: The token that the tower is pooled at; None where it is the one with the highest number.
    """

    context_length: int
    end_token: int | None = None

    def length(self, *texts: torch.Tensor) -> int:
        """Positions up to the last end-of-text token, rounded up to a multiple of `MULTIPLE` or the context length.

        Args:
            *texts: Tokens ``[N, L]`` of the parts of a batch, on the CPU.
        """
        needed = max(int(self.ends(tokens).max()) + 1 for tokens in texts)
        return min(-(-needed // MULTIPLE) * MULTIPLE, self.context_length)

    def ends(self, tokens: torch.Tensor) -> torch.Tensor:
        """Position ``[N]``, int64, that each text of ``[N, L]`` is pooled at: upstream's ``text_global_pool``."""
        if self.end_token is None:
            return tokens.argmax(dim=-1)
        return (tokens == self.end_token).int().argmax(dim=-1)
